//! What somebody writes who adds `minicache-core` to a model of their own: a cache, a prompt, some tokens one by one,
//! another continuation, and a step back.

use minicache_core::settings::{Quant, StartLayer};
use minicache_core::{CacheSpec, KvCache, MiniCache, ModelShape, Resources, Result, build};

const SHAPE: ModelShape =
    ModelShape { layers: 4, heads: 8, kv_heads: 2, head_dim: 64, window: None, scale: 0.125 };

/// States that a model would compute from `tokens` tokens in one layer.
fn states(layer: usize, tokens: usize, width: usize) -> Vec<f32> {
    (0..tokens * width).map(|i| ((i * 37 + layer * 11) as f32).sin()).collect()
}

/// All layers of one step; gives the last layer's output.
fn step(cache: &mut dyn KvCache, tokens: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; tokens * SHAPE.heads * SHAPE.head_dim];
    for layer in 0..SHAPE.layers {
        let q = states(layer, tokens, SHAPE.heads * SHAPE.head_dim);
        let [k, v] = [layer + 1, layer + 2].map(|of| states(of, tokens, SHAPE.kv_dim()));
        cache.attend_into(layer, &q, &k, &v, &mut out)?;
    }
    cache.finish_step()?;
    Ok(out)
}

fn main() -> Result<()> {
    let merged = MiniCache {
        start_layer: StartLayer::Layer(2),
        quant: Some(Quant { bits: 4, ..Quant::default() }),
        ..MiniCache::default()
    };
    for spec in [CacheSpec::default(), CacheSpec::by_name("kivi-2")?, CacheSpec::MiniCache(merged)] {
        let mut cache = build(&spec, &SHAPE, &Resources::default())?;
        step(&mut *cache, 500)?;
        let mut other = cache.fork();
        for _ in 0..20 {
            step(&mut *cache, 1)?;
        }
        let first = step(&mut *other, 1)?;
        assert!(first.iter().all(|x| x.is_finite()));
        match other.truncate(500) {
            Ok(()) => assert_eq!(step(&mut *other, 1)?, first),
            Err(why) => println!("{}: {why}", spec.label()),
        }
        let bytes = cache.footprint().total();
        let ratio = SHAPE.full_bytes(cache.len()) as f64 / bytes as f64;
        println!("{}: {bytes} bytes for {} tokens, {ratio:.2}x", spec.label(), cache.len());
    }
    Ok(())
}
