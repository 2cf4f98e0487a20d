//! What somebody writes who adds `minicache-core` to a model of their own: a cache, a prompt, some tokens one by one,
//! another continuation, and a step back; several sequences in one step; and a method of their own.

mod first_exact;

use minicache_core::settings::{Quant, StartLayer};
use minicache_core::{
    Batch, CacheSpec, KvCache, MiniCache, ModelShape, Resources, Result, Sequence, States, build,
};

use first_exact::FirstExact;

const SHAPE: ModelShape = ModelShape {
    layers: 4,
    heads: 8,
    kv_heads: 2,
    head_dim: 64,
    scale: 0.125,
    ..ModelShape::PLAIN
};

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
    own_method()?;
    batch()
}

/// A method of one's own attends as any other.
fn own_method() -> Result<()> {
    let [mut exact, mut own]: [Box<dyn KvCache>; 2] =
        [build(&CacheSpec::default(), &SHAPE, &Resources::default())?, Box::new(FirstExact::new(&SHAPE))];
    for tokens in [300, 1, 1, 7] {
        let [want, got] = [step(&mut *exact, tokens)?, step(&mut *own, tokens)?];
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.1, "{worst}");
    }
    let [full, packed] = [&exact, &own].map(|cache| cache.footprint().total());
    assert!(2 * packed < full, "{packed} of {full} bytes");
    println!("first tokens exact, the rest in 4 bits: {packed} bytes for {} tokens", own.len());
    Ok(())
}

/// Several sequences go through the layers together; a step that is not finished has not been.
fn batch() -> Result<()> {
    let kivi = || build(&CacheSpec::by_name("kivi-2")?, &SHAPE, &Resources::default());
    let mut sequences = [Sequence::new(kivi()?), Sequence::new(Box::new(FirstExact::new(&SHAPE)))];
    let mut lengths = Vec::new();
    for (tokens, finish) in [([40, 25], true), ([1, 1], false), ([1, 12], true)] {
        let all = tokens.iter().sum::<usize>();
        let q_dim = SHAPE.heads * SHAPE.head_dim;
        let mut out = vec![0.0; all * q_dim];
        let mut batch = Batch::begin(sequences.iter_mut().zip(tokens))?;
        for layer in 0..SHAPE.layers {
            let (q, k) = (states(layer, all, q_dim), states(layer + 1, all, SHAPE.kv_dim()));
            batch.attend(layer, States::new(&q, &k, &k), &mut out)?;
        }
        if finish {
            batch.finish()?;
        } else {
            drop(batch);
        }
        lengths.push([sequences[0].len(), sequences[1].len()]);
    }
    assert_eq!(lengths, [[40, 25], [40, 25], [41, 37]]);
    Ok(())
}
