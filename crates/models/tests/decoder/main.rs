//! The decoder against logits and KV states that transformers computed, on tiny models of every family (how: see
//! `fixtures/write_qwen3.py`).
#![allow(clippy::unwrap_used)]

mod aligned;
mod caches;
mod forms;
mod inputs;
mod random;
mod reference;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use minicache_core::settings::StoreType;
use minicache_core::{CacheSpec, Resources, Sequence};
use minicache_models::{Decoder, LoadOptions, Logits, LogitsFor, ModelConfig, Safetensors, Step};
use reference::ReferenceCache;

const MODELS: [&str; 10] = [
    "llama2",
    "llama3",
    "llama-tied",
    "mistral",
    "mistral-sliding",
    "phi3",
    "phi3-longrope",
    "mixtral",
    "qwen2",
    "qwen3",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Golden {
    dir: PathBuf,
    decoder: Decoder,
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    tensors: HashMap<String, Tensor>,
}

fn golden(name: &str) -> Golden {
    golden_in(&fixture(name), &LoadOptions::default())
}

fn golden_in(dir: &Path, options: &LoadOptions) -> Golden {
    load(dir, options, |_| {})
}

/// A fixture with another configuration.
fn golden_with(name: &str, change: impl Fn(&mut ModelConfig)) -> Golden {
    load(&fixture(name), &LoadOptions::default(), change)
}

fn load(dir: &Path, options: &LoadOptions, change: impl Fn(&mut ModelConfig)) -> Golden {
    let json = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let mut config = ModelConfig::from_json(&json).unwrap();
    change(&mut config);
    let decoder = Decoder::load(&config, &Safetensors::open(dir).unwrap(), options).unwrap();
    let tensors = candle_core::safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
    let tokens = tensors["tokens"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    let logits = tensors["logits"].to_vec2().unwrap();
    Golden { dir: dir.to_path_buf(), decoder, tokens, logits, tensors }
}

impl Golden {
    fn sequence(&self) -> Sequence {
        self.decoder.sequence(Box::new(ReferenceCache::new(*self.decoder.shape())), self.tokens.len())
    }

    fn full(&self, dtype: StoreType) -> Sequence {
        let spec = CacheSpec::default().with_dtype(dtype);
        let cache = minicache_core::build(&spec, self.decoder.shape(), &Resources::default()).unwrap();
        self.decoder.sequence(cache, self.tokens.len())
    }

    /// Runs one chunk of tokens and gives the logits of all of them.
    fn step(&self, tokens: &[u32], sequence: &mut Sequence) -> Vec<Vec<f32>> {
        let step = Step { tokens, sequence, logits: LogitsFor::All };
        rows(&self.decoder.forward(&mut [step]).unwrap(), 0)
    }

    /// Logits within 1e-4 of the largest golden logit.
    fn check_logits(&self, what: &str, from: usize, got: &[Vec<f32>]) {
        let largest = self.logits.iter().flatten().fold(0f32, |m, x| m.max(x.abs()));
        for (i, got) in got.iter().enumerate() {
            for (a, b) in got.iter().zip(&self.logits[from + i]) {
                assert!((a - b).abs() <= 1e-4 * largest, "{what}, token {}: {a} instead of {b}", from + i);
            }
        }
    }

    /// KV states within 1e-4 of each tensor's largest; a golden file of fewer tokens holds the newest.
    fn check_states(&self, what: &str, sequence: &Sequence) {
        let shape = *self.decoder.shape();
        for layer in 0..shape.layers {
            let restored = sequence.restored(layer).unwrap();
            for (side, got) in [("key", &restored.keys), ("value", &restored.values)] {
                let want = &self.tensors[&format!("layer.{layer}.{side}")];
                let tokens = want.dim(1).unwrap();
                let want: Vec<f32> = want.transpose(0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let got = &got[got.len() - tokens * shape.kv_dim()..];
                let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 1e-4 * largest, "{what}, layer {layer} {side}: {worst} of {largest}");
            }
        }
    }
}

/// A sequence's logits, token by token.
fn rows(logits: &Logits, sequence: usize) -> Vec<Vec<f32>> {
    logits.of(sequence).chunks_exact(logits.vocab()).map(<[f32]>::to_vec).collect()
}

/// One prefill, token by token, and in chunks.
fn check_folder(name: &str, golden: &Golden) {
    for chunk in [golden.tokens.len(), 1, 7] {
        let what = format!("{name}, {chunk} tokens at a time");
        let mut sequence = golden.sequence();
        for (i, tokens) in golden.tokens.chunks(chunk).enumerate() {
            let logits = golden.step(tokens, &mut sequence);
            assert_eq!(logits.len(), tokens.len());
            golden.check_logits(&what, i * chunk, &logits);
        }
        golden.check_states(&what, &sequence);
    }
}

#[test]
fn logits_and_states_equal_golden() {
    for name in MODELS {
        check_folder(name, &golden(name));
    }
}

/// `MINICACHE_GOLDEN=DIR` checks every model folder in DIR that holds a `golden.safetensors` of the same form.
#[test]
fn other_golden_folders() {
    let Ok(dir) = std::env::var("MINICACHE_GOLDEN") else { return };
    let mut checked = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.join("golden.safetensors").is_file() && path.join("config.json").is_file() {
            check_folder(&path.display().to_string(), &golden_in(&path, &LoadOptions::default()));
            checked += 1;
        }
    }
    assert!(checked > 0, "no model folders there");
}

#[test]
fn the_full_cache_equals_golden() {
    for name in MODELS {
        let golden = golden(name);
        let mut whole = golden.full(StoreType::F32);
        golden.check_logits(name, 0, &golden.step(&golden.tokens, &mut whole));
        golden.check_states(name, &whole);
        let mut single = golden.full(StoreType::F32);
        for (i, token) in golden.tokens.iter().enumerate() {
            golden.check_logits(name, i, &golden.step(&[*token], &mut single));
        }
        golden.check_states(name, &single);
    }
}

#[test]
fn ragged_batches_equal_golden() {
    for name in MODELS {
        let golden = golden(name);
        // Four copies of the sequence advance by unequal chunks; they end at different times.
        let chunks = [1, 5, 17, 48];
        let mut sequences: Vec<Sequence> = chunks.iter().map(|_| golden.sequence()).collect();
        let total = golden.tokens.len();
        while sequences.iter().any(|s| s.len() < total) {
            let mut starts = Vec::new();
            let mut steps = Vec::new();
            for (sequence, chunk) in sequences.iter_mut().zip(chunks) {
                let start = sequence.len();
                if start == total {
                    continue;
                }
                // A sequence of one token at a time asks for all, the others in turn for none, last, all.
                let logits =
                    [LogitsFor::All, LogitsFor::None, LogitsFor::Last, LogitsFor::All][steps.len() % 4];
                starts.push((start, logits));
                steps.push(Step {
                    tokens: &golden.tokens[start..total.min(start + chunk)],
                    sequence,
                    logits,
                });
            }
            let counts: Vec<usize> = steps.iter().map(|s| s.tokens.len()).collect();
            let out = golden.decoder.forward(&mut steps).unwrap();
            assert_eq!(out.len(), starts.len());
            for (i, ((start, logits), n)) in starts.into_iter().zip(counts).enumerate() {
                let rows = rows(&out, i);
                match logits {
                    LogitsFor::None => assert!(rows.is_empty()),
                    LogitsFor::Last => {
                        assert_eq!(rows.len(), 1);
                        golden.check_logits(name, start + n - 1, &rows);
                    }
                    LogitsFor::All => {
                        assert_eq!(rows.len(), n);
                        golden.check_logits(name, start, &rows);
                    }
                }
            }
        }
        for sequence in &sequences {
            golden.check_states(name, sequence);
        }
    }
}
