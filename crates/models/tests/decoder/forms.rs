//! The same model in other weight forms, and the decoder's other entry points.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use minicache_config::WeightMode;
use minicache_core::{Rotary, Sequence};
use minicache_models::{
    Decoder, Experts, LoadOptions, LogitsFor, ModelConfig, Safetensors, Step, WeightSource,
};

use crate::random::Random;
use crate::reference::ReferenceCache;
use crate::{fixture, golden, golden_in, rows};

fn reference(decoder: &Decoder) -> Sequence {
    decoder.sequence(Box::new(ReferenceCache::new(*decoder.shape())), 0)
}

/// Logits of all golden tokens in one prefill.
fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut sequence = reference(decoder);
    let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::All };
    decoder.forward(&mut [step]).unwrap().into_data()
}

/// Largest difference over largest number.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn config(name: &str) -> ModelConfig {
    ModelConfig::from_json(&std::fs::read_to_string(fixture(name).join("config.json")).unwrap()).unwrap()
}

/// Writes a fixture's weights in `dtype`, in three shards with an index.
fn reshard(name: &str, dtype: DType, dir: &Path) {
    std::fs::copy(fixture(name).join("config.json"), dir.join("config.json")).unwrap();
    std::fs::copy(fixture(name).join("golden.safetensors"), dir.join("golden.safetensors")).unwrap();
    let all = candle_core::safetensors::load(fixture(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<_> = all.keys().cloned().collect();
    names.sort();
    let mut places = serde_json::Map::new();
    for (number, names) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let file = format!("model-{}-of-3.safetensors", number + 1);
        let shard: HashMap<_, _> =
            names.iter().map(|n| (n.clone(), all[n].to_dtype(dtype).unwrap())).collect();
        candle_core::safetensors::save(&shard, dir.join(&file)).unwrap();
        places.extend(names.iter().map(|n| (n.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "weight_map": places });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn half_precision_shards_are_kept_and_computed_exactly() {
    for (name, dtype, loss) in [("llama-tied", DType::F16, 2e-2), ("mixtral", DType::BF16, 2e-1)] {
        let dir = tempfile::tempdir().unwrap();
        reshard(name, dtype, dir.path());
        let options = |weights| LoadOptions { weights, ..LoadOptions::default() };
        let stored = golden_in(dir.path(), &options(WeightMode::Quantized));
        let wide = golden_in(dir.path(), &options(WeightMode::F32));
        let (a, b) = (logits(&stored.decoder, &stored.tokens), logits(&wide.decoder, &wide.tokens));
        assert!(distance(&a, &b) < 1e-5, "{name}: {}", distance(&a, &b));
        let exact: Vec<f32> = stored.logits.iter().flatten().copied().collect();
        assert!(distance(&a, &exact) < loss, "{name}: {}", distance(&a, &exact));
        let (half, whole) = (stored.decoder.weight_bytes(), wide.decoder.weight_bytes());
        assert!(half * 10 < whole * 6, "{name}: {half} of {whole} bytes");
    }
}

/// A model large enough to be computed with quantised weights: 3.3 million numbers.
fn medium() -> Random {
    let mut config = config("qwen2");
    (config.hidden, config.intermediate, config.vocab, config.layers) = (256, 512, 4000, 2);
    (config.heads, config.kv_heads, config.head_dim) = (8, 4, 32);
    config.rope.rotary_dim = 32;
    Random::new(config)
}

#[test]
fn quantised_weights_in_every_mode() {
    let tokens: Vec<u32> = (3..40).collect();
    for tied in [false, true] {
        let mut source = medium();
        source.config.tied = tied;
        // Values in another type than queries and keys: they cannot be joined into one matrix.
        source.quantized =
            |name| Some(if name.contains("v_proj") { GgmlDType::Q5_1 } else { GgmlDType::Q8_0 });
        let run = |weights| {
            let options = LoadOptions { weights, ..LoadOptions::default() };
            let decoder = Decoder::load(&source.config, &source, &options).unwrap();
            (logits(&decoder, &tokens), decoder.weight_bytes())
        };
        let (exact, whole) = run(WeightMode::F32);
        for mode in [WeightMode::Auto, WeightMode::Quantized] {
            let (got, bytes) = run(mode);
            // Activations are rounded to 8 bits.
            assert!(distance(&got, &exact) < 3e-2, "{mode:?}: {}", distance(&got, &exact));
            assert!(distance(&got, &exact) > 0.0, "{mode:?}: not quantised");
            assert!(bytes * 10 < whole * 3, "{mode:?}: {bytes} of {whole} bytes");
        }
    }
}

#[test]
fn tiny_quantised_models_are_computed_exactly() {
    let mut source = Random::new(config("mixtral"));
    source.quantized = |_| Some(GgmlDType::Q8_0);
    let tokens: Vec<u32> = (3..40).collect();
    let run = |weights| {
        let options = LoadOptions { weights, ..LoadOptions::default() };
        logits(&Decoder::load(&source.config, &source, &options).unwrap(), &tokens)
    };
    assert_eq!(run(WeightMode::Auto), run(WeightMode::F32));
}

/// Experts cost nothing where they are not chosen: a token through 2 of 8 takes as long as through 2 of 2.
#[test]
fn time_of_a_token_does_not_grow_with_the_number_of_experts() {
    let decoder = |count: usize| {
        let mut config = config("mixtral");
        (config.hidden, config.intermediate, config.vocab, config.layers) = (128, 1024, 100, 2);
        (config.heads, config.kv_heads, config.head_dim) = (4, 2, 32);
        config.rope.rotary_dim = 32;
        config.experts = Some(Experts { count, used: 2 });
        let source = Random::new(config);
        Decoder::load(&source.config, &source, &LoadOptions::default()).unwrap()
    };
    let decoders = [decoder(2), decoder(8)];
    let mut best = [f64::INFINITY; 2];
    // In turns and the best of many, so that other work on the machine does not decide.
    for _ in 0..40 {
        for (decoder, best) in decoders.iter().zip(&mut best) {
            let mut sequence = reference(decoder);
            let start = std::time::Instant::now();
            let step = Step { tokens: &[7], sequence: &mut sequence, logits: LogitsFor::None };
            decoder.forward(&mut [step]).unwrap();
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    assert!(
        best[1] < 2.0 * best[0],
        "{:.1} us with 2 experts, {:.1} us with 8",
        best[0] * 1e6,
        best[1] * 1e6
    );
}

#[test]
fn an_observer_sees_the_residual_stream() {
    let golden = golden("llama-tied");
    let (tokens, shape) = (&golden.tokens, *golden.decoder.shape());
    let mut seen = Vec::new();
    let (mut a, mut b) = (golden.sequence(), golden.sequence());
    let mut steps = [
        Step { tokens: &tokens[..5], sequence: &mut a, logits: LogitsFor::Last },
        Step { tokens: &tokens[..2], sequence: &mut b, logits: LogitsFor::None },
    ];
    let mut observe = |layer: usize, x: &[f32]| {
        seen.push((layer, x.chunks_exact(32).map(<[f32]>::to_vec).collect::<Vec<_>>()));
    };
    let out = golden.decoder.forward_observed(&mut steps, &mut observe).unwrap();
    golden.check_logits("observed", 4, &rows(&out, 0));
    assert!(out.of(1).is_empty() && out.len() == 2);
    assert_eq!(
        seen.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(),
        (0..shape.layers).collect::<Vec<_>>()
    );
    let source = Safetensors::open(fixture("llama-tied")).unwrap();
    let table = source.dense("model.embed_tokens.weight", &[200, 32]).unwrap().to_vec2::<f32>().unwrap();
    let rows: Vec<_> = tokens[..5].iter().chain(&tokens[..2]).map(|t| table[*t as usize].clone()).collect();
    assert_eq!(seen[0].1, rows);
    // Both sequences start alike, so their streams do too.
    assert!(seen.iter().all(|(_, x)| x.len() == 7 && distance(&x[5], &x[0]) < 1e-5));
}

#[test]
fn progress_counts_every_part() {
    let config = config("llama2");
    let (calls, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (calls_in, last_in) = (calls.clone(), last.clone());
    let progress = move |done: usize, of: usize| {
        assert!((1..=of).contains(&done));
        calls_in.fetch_add(1, Ordering::Relaxed);
        last_in.fetch_max(done, Ordering::Relaxed);
    };
    let options = LoadOptions { progress: Some(Arc::new(progress)), ..LoadOptions::default() };
    let decoder = Decoder::load(&config, &Safetensors::open(fixture("llama2")).unwrap(), &options).unwrap();
    assert_eq!((calls.load(Ordering::Relaxed), last.load(Ordering::Relaxed)), (6, 6));
    assert_eq!(decoder.device_map().to_string(), "cpu: layers 0..=3 (239.6 kB)");
}

#[test]
fn rotary_undoes_what_the_decoder_did_to_keys() {
    let golden = golden("phi3-longrope");
    let mut sequence = golden.sequence();
    golden.step(&golden.tokens, &mut sequence);
    let shape = *golden.decoder.shape();
    let restored = sequence.restored(0).unwrap();
    let rotary = golden.decoder.rotary(golden.tokens.len());
    // Equal tokens have equal keys in the first layer, once unrotated.
    let mut keys = restored.keys.clone();
    for (i, head) in keys.chunks_exact_mut(shape.head_dim).enumerate() {
        rotary.unrotate(i / shape.kv_heads, head);
    }
    let mut alone = golden.sequence();
    let token = [golden.tokens[30]];
    let step = Step { tokens: &token, sequence: &mut alone, logits: LogitsFor::None };
    golden.decoder.forward(&mut [step]).unwrap();
    let mut want = alone.restored(0).unwrap().keys;
    want.chunks_exact_mut(shape.head_dim).for_each(|head| rotary.unrotate(0, head));
    let got = &keys[30 * shape.kv_dim()..31 * shape.kv_dim()];
    assert!(distance(got, &want) < 1e-5, "{}", distance(got, &want));
}
