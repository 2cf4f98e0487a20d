//! Whole models on the emulated device against the host: every family, every cache with kernels and some without, prefill,
//! token by token, ragged batches, and layers spread over two devices.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::DType;
use minicache_config::WeightMode;
use minicache_core::{CacheSpec, Resources, Sequence};
use minicache_device::check::resources;
use minicache_device::driver::Driver;
use minicache_device::{Device, Emulated};
use minicache_models::{Decoder, LoadOptions, LogitsFor, ModelConfig, Safetensors, Step, Target};

const FAMILIES: [&str; 10] = [
    "llama2",
    "llama3",
    "llama-tied",
    "mistral",
    "mistral-sliding",
    "mixtral",
    "phi3",
    "phi3-longrope",
    "qwen2",
    "qwen3",
];

fn emulated(index: usize, bytes: usize) -> Target {
    let driver: Arc<dyn Driver> = Arc::new(Emulated::new(index, bytes).unwrap());
    Target::Device(Device::new(driver))
}

/// A tiny model, in f32 or with weights and activations rounded to halves.
fn load(family: &str, weights: WeightMode, devices: Vec<Target>) -> Decoder {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
    let config = ModelConfig::from_dir(&dir).unwrap();
    let options = LoadOptions { weights, devices, dtype: Some(DType::F16), ..LoadOptions::default() };
    Decoder::load(&config, &Safetensors::open(&dir).unwrap(), &options).unwrap()
}

fn sequence(decoder: &Decoder, spec: &CacheSpec, planned: usize) -> Sequence {
    let rotary = decoder.rotary(planned);
    let latent = resources(spec, decoder.shape(), Some(rotary.clone())).unwrap().latent;
    let resources = Resources { rotary: Some(rotary), latent };
    decoder.sequence(decoder.cache(spec, &resources).unwrap(), planned)
}

/// Logits of two sequences with caches of `specs`: a prefill, another beside a single token, then token by token.
fn logits(decoder: &Decoder, specs: [&CacheSpec; 2]) -> Vec<f32> {
    let tokens: Vec<u32> = (0..90).map(|i| i * 37 % 200).collect();
    let mut sequences = specs.map(|spec| sequence(decoder, spec, 90));
    let mut out = Vec::new();
    let mut run = |parts: [&[u32]; 2], sequences: &mut [Sequence]| {
        let mut steps: Vec<Step<'_>> = parts
            .into_iter()
            .zip(sequences)
            .filter(|(tokens, _)| !tokens.is_empty())
            .map(|(tokens, sequence)| Step { tokens, sequence, logits: LogitsFor::All })
            .collect();
        out.extend(decoder.forward(&mut steps).unwrap().into_data());
    };
    run([&tokens[..70], &[]], &mut sequences);
    run([&tokens[70..71], &tokens[..40]], &mut sequences);
    let mut forks = [sequences[0].fork(), sequences[1].fork()];
    for i in 0..6 {
        run([&tokens[71 + i..72 + i], &tokens[40 + i..41 + i]], &mut sequences);
    }
    run([&tokens[5..6], &tokens[10..25]], &mut forks);
    out
}

fn compare(family: &str, devices: Vec<Target>, specs: [&str; 2]) {
    let specs = specs.map(|spec| CacheSpec::parse(spec).unwrap());
    let specs = [&specs[0], &specs[1]];
    let of = |weights, devices| logits(&load(family, weights, devices), specs);
    // Activations of halves, in rows as short as these, move the largest logits by some thousandths; where they are whole,
    // what is left is the order of sums.
    let mut modes = vec![(WeightMode::F32, 1e-3)];
    if specs.iter().all(|spec| spec.name() == "full") {
        modes.push((WeightMode::Quantized, 1e-2));
    }
    for (mode, tolerance) in modes {
        let (want, got) = (of(mode, Vec::new()), of(mode, devices.clone()));
        assert_eq!(want.len(), got.len());
        let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
        eprintln!("{family} {mode:?} {:?}: {worst:.1e}", specs.map(|s| s.label()));
        assert!(worst < tolerance, "{family} with {specs:?} in {mode:?}: {worst}");
    }
}

#[test]
fn every_family() {
    for family in FAMILIES {
        compare(family, vec![emulated(0, 1 << 28)], ["full", "full"]);
    }
}

#[test]
fn caches_and_those_without_kernels_beside_them() {
    for specs in [
        ["kivi-4", "kivi-4"],
        ["kivi-8", "full"],
        [
            "{ method = \"minicache\", start_layer = 0 }",
            "{ method = \"minicache\", start_layer = 0, quant = { bits = 8 } }",
        ],
        ["rank_one", "h2o"],
        ["expected_attention", "{ method = \"expected_attention\", kept = 30, future = 40 }"],
        ["sinks", "{ method = \"sinks\", sinks = 2, recent = 11 }"],
        ["h2o", "{ method = \"h2o\", recent = 9, heavy = 20 }"],
        ["snapkv", "{ method = \"snapkv\", kept = 30, window = 7, kernel = 3 }"],
        ["{ method = \"xkv\", rank_k = 6, rank_v = 9 }", "full"],
        ["{ method = \"mean\", merge = \"values\" }", "fp8"],
        [
            "{ method = \"latent\", activation_bits = 24, residual = 9, k = { group = 2, heads = \"all\" }, v = { group = 2 } }",
            "{ method = \"latent\", activation_bits = 24, k = { rate = 3.0 }, v = { rate = 2.0, trellis = true } }",
        ],
    ] {
        compare("llama3", vec![emulated(0, 1 << 28)], specs);
    }
}

/// A model with a sliding window, whose heads then hold different numbers of tokens.
#[test]
fn tokens_dropped_under_a_sliding_window() {
    compare(
        "mistral-sliding",
        vec![emulated(0, 1 << 28)],
        ["{ method = \"h2o\", recent = 4, heavy = 6 }"; 2],
    );
    compare("mistral-sliding", vec![emulated(0, 1 << 28)], ["sinks", "snapkv"]);
}

#[test]
fn the_likeliest_tokens_are_those_of_the_logits() {
    let decoder = load("llama3", WeightMode::F32, vec![emulated(0, 1 << 28)]);
    let host = load("llama3", WeightMode::F32, Vec::new());
    let tokens: Vec<u32> = (0..40).collect();
    let of = |decoder: &Decoder| {
        let mut sequence = sequence(decoder, &CacheSpec::default(), 40);
        let mut steps = [Step { tokens: &tokens, sequence: &mut sequence, logits: LogitsFor::All }];
        decoder.forward_greedy(&mut steps).unwrap()
    };
    assert_eq!(of(&decoder), of(&host));
}

/// What predictions come to on the device is what comes of the logits, in the order of the caller's steps.
#[test]
fn scores_are_those_of_the_logits() {
    let specs = ["full", "kivi-2", "full", "kivi-4"].map(|spec| CacheSpec::parse(spec).unwrap());
    let decoder = load("llama3", WeightMode::F32, vec![emulated(0, 1 << 28)]);
    let tokens: Vec<u32> = (0..43).map(|i| i * 37 % 200).collect();
    let refs: Vec<&CacheSpec> = specs.iter().collect();
    let mut sequences: Vec<Sequence> = specs.iter().map(|spec| sequence(&decoder, spec, 60)).collect();
    decoder.fill_on_gpu(&tokens[..40], &refs, &mut sequences).unwrap();
    fn steps<'s>(sequences: &'s mut [Sequence], tokens: &'s [u32]) -> Vec<Step<'s>> {
        let step = |sequence| Step { tokens: &tokens[40..42], sequence, logits: LogitsFor::All };
        sequences.iter_mut().map(step).collect()
    }
    let references = [0, 0, 3, 3];
    let targets: Vec<u32> = references.iter().flat_map(|_| [tokens[41], tokens[42]]).collect();
    let mut forks: Vec<Sequence> = sequences.iter().map(Sequence::fork).collect();
    let logits = decoder.forward(&mut steps(&mut forks, &tokens)).unwrap();
    let mut batch = steps(&mut sequences, &tokens);
    let scores = decoder.score_on_gpu(&mut batch, &references, &targets).unwrap().unwrap();
    let vocab = decoder.config().vocab;
    let log_probs = |step: usize, row: usize| -> Vec<f64> {
        let x: Vec<f64> =
            logits.of(step)[row * vocab..(row + 1) * vocab].iter().map(|&x| f64::from(x)).collect();
        let sum = x.iter().map(|x| x.exp()).sum::<f64>().ln();
        x.iter().map(|x| x - sum).collect()
    };
    let top = |x: &[f64]| (0..vocab).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a))).unwrap();
    for (i, score) in scores.iter().enumerate() {
        let (step, row) = (i / 2, i % 2);
        let (own, full) = (log_probs(step, row), log_probs(references[step], row));
        let kl: f64 = full.iter().zip(&own).map(|(p, q)| p.exp() * (p - q)).sum();
        assert!((score.nll + own[targets[i] as usize]).abs() < 1e-4, "{i}: {score:?}");
        assert!((score.kl - kl).abs() < 1e-6 + 1e-3 * kl, "{i}: {score:?}, {kl}");
        assert_eq!(score.agrees, top(&own) == top(&full), "{i}");
        assert_eq!(references[step] == step, kl == 0.0);
    }
    for (references, targets) in
        [(&[0, 0, 3, 4][..], &targets[..]), (&references, &targets[1..]), (&[0], &targets)]
    {
        let error =
            decoder.score_on_gpu(&mut steps(&mut sequences, &tokens), references, targets).unwrap_err();
        assert!(error.to_string().contains("as many tokens"), "{error}");
    }
}

/// A prompt that fills several caches is what each has as a step of its own, also where methods take turns in a step.
#[test]
fn one_prompt_fills_all_caches() {
    let specs = [
        "full",
        "kivi-4",
        "h2o",
        "fp8",
        "{ method = \"minicache\", start_layer = 0 }",
        "{ method = \"h2o\", recent = 9, heavy = 20 }",
        "{ method = \"latent\", activation_bits = 24, residual = 9, k = { group = 2 }, v = { group = 2 } }",
        "full",
        "kivi-4",
    ];
    let specs = specs.map(|spec| CacheSpec::parse(spec).unwrap());
    let tokens: Vec<u32> = (0..50).map(|i| i * 37 % 200).collect();
    let devices = [vec![emulated(0, 1 << 28)], vec![emulated(0, 1 << 26), emulated(1, 1 << 26)]];
    for (devices, specs) in devices.into_iter().zip([&specs[..], &specs[..6]]) {
        let decoder = load("llama3", WeightMode::F32, devices);
        let of = |spec| sequence(&decoder, spec, 60);
        let mut together: Vec<Sequence> = specs.iter().map(of).collect();
        let mut alone: Vec<Sequence> = specs.iter().map(of).collect();
        let refs: Vec<&CacheSpec> = specs.iter().collect();
        let last = decoder.fill_on_gpu(&tokens, &refs, &mut together).unwrap().unwrap();
        for sequence in &mut alone {
            let mut steps = [Step { tokens: &tokens, sequence, logits: LogitsFor::Last }];
            assert_close(&last, decoder.forward(&mut steps).unwrap().of(0));
        }
        let next = |sequences: &mut [Sequence]| {
            let step = |sequence| Step { tokens: &tokens[..1], sequence, logits: LogitsFor::Last };
            let mut steps: Vec<Step<'_>> = sequences.iter_mut().map(step).collect();
            decoder.forward(&mut steps).unwrap()
        };
        for _ in 0..3 {
            let (together, whole) = (next(&mut together), next(&mut alone));
            for (i, spec) in specs.iter().enumerate() {
                eprintln!("{}", spec.label());
                assert_close(together.of(i), whole.of(i));
            }
        }
        for (sequence, other) in together.iter().zip(&alone) {
            assert_eq!(sequence.footprint(), other.footprint());
        }
        let greedy = {
            let step = |sequence| Step { tokens: &tokens[..1], sequence, logits: LogitsFor::Last };
            let mut forks: Vec<Sequence> = together.iter().map(Sequence::fork).collect();
            let mut steps: Vec<Step<'_>> = forks.iter_mut().map(step).collect();
            decoder.forward_greedy(&mut steps).unwrap()
        };
        for (sequence, token) in alone.iter_mut().zip(greedy) {
            let mut steps = [Step { tokens: &tokens[..1], sequence, logits: LogitsFor::Last }];
            assert_eq!(decoder.forward_greedy(&mut steps).unwrap(), [token]);
        }
        let again = decoder.fill_on_gpu(&tokens, &refs, &mut together).unwrap_err().to_string();
        assert!(again.contains("first step"), "{again}");
    }
    // Who is named is who it is for the caller, whose third step is the second of its method.
    let decoder = load("llama3", WeightMode::F32, vec![emulated(0, 1 << 28)]);
    let mut mixed = [0, 1, 0].map(|spec| sequence(&decoder, &specs[spec], 60));
    let step = |(sequence, token)| Step { tokens: token, sequence, logits: LogitsFor::Last };
    let mut steps: Vec<Step<'_>> = mixed.iter_mut().zip([&[1u32][..], &[1], &[u32::MAX]]).map(step).collect();
    let wrong = decoder.forward(&mut steps).unwrap_err().to_string();
    assert!(wrong.contains("sequence 2"), "{wrong}");
    let host = load("llama3", WeightMode::F32, Vec::new());
    assert!(host.fill_on_gpu(&tokens, &[], &mut []).unwrap().is_none());
}

fn assert_close(a: &[f32], b: &[f32]) {
    let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(a.len() == b.len() && worst <= 1e-5 * largest, "{worst} of {largest}");
}

#[test]
fn layers_on_two_devices() {
    let two = || vec![emulated(0, 1 << 26), emulated(1, 1 << 26)];
    for family in ["qwen2", "phi3", "llama-tied"] {
        let decoder = load(family, WeightMode::F32, two());
        assert!(
            decoder.device_map().to_string().contains("emulated:1: layers 2..=3"),
            "{}",
            decoder.device_map()
        );
        compare(family, two(), ["{ method = \"minicache\", start_layer = 0 }", "kivi-4"]);
    }
    compare("llama-tied", two(), ["h2o", "expected_attention"]);
    let decoder = load("llama3", WeightMode::F32, two());
    let apart = CacheSpec::parse("{ method = \"minicache\", start_layer = 1 }").unwrap();
    assert!(sequence(&decoder, &apart, 9).cache_mut().as_any_mut().is_none(), "a pair on two devices");
}

#[test]
fn a_device_that_is_too_small_says_so() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama2");
    let (config, source) = (ModelConfig::from_dir(&dir).unwrap(), Safetensors::open(&dir).unwrap());
    let options = LoadOptions { devices: vec![emulated(0, 50_000)], ..LoadOptions::default() };
    let message = Decoder::load(&config, &source, &options).unwrap_err().to_string();
    assert!(message.starts_with("device: the model needs"), "{message}");

    // Weights fit, and some sequences: the first that does not stays as it was, and the others go on. The second cache runs
    // out in the middle of a step, where it is known how many tokens are kept.
    let keeping =
        "{ method = \"minicache\", start_layer = 0, retention = { rule = \"top_fraction\", gamma = 0.9 } }";
    for spec in ["full", keeping] {
        let spec = CacheSpec::parse(spec).unwrap();
        let decoder = load("llama2", WeightMode::F32, vec![emulated(0, 1_500_000)]);
        let tokens = vec![1u32; 60];
        let fill = |sequence: &mut Sequence| {
            let mut steps = [Step { tokens: &tokens, sequence, logits: LogitsFor::Last }];
            decoder.forward(&mut steps).map(minicache_models::Logits::into_data)
        };
        let (mut sequences, mut first) = (Vec::new(), Vec::new());
        let (mut last, message) = loop {
            let mut next = sequence(&decoder, &spec, 0);
            match fill(&mut next) {
                Err(error) => break (next, error.to_string()),
                Ok(logits) => first = logits,
            }
            sequences.push(next);
            assert!(sequences.len() < 1000, "nothing is ever full");
        };
        assert!(message.contains("cannot be allocated"), "{message}");
        assert!(sequences.len() > 1 && last.is_empty(), "{} {}", sequences.len(), last.len());
        sequences.truncate(1);
        assert_eq!(fill(&mut last).unwrap(), first, "{}", spec.label());
        let mut step = [Step { tokens: &tokens[..1], sequence: &mut sequences[0], logits: LogitsFor::Last }];
        decoder.forward(&mut step).unwrap();
    }
}
