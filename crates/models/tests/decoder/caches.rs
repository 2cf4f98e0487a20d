//! Every cache on every family of models: attention is attention over what the cache says it restores, batches change
//! nothing, and what leaves a sliding window leaves the cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minicache_core::latent::{Basis, Grouping, LatentPlan};
use minicache_core::{
    CacheSpec, Footprint, KvCache, ModelShape, Resources, Restored, Result, Sequence, States,
};
use minicache_models::calibrate::{BasisOptions, basis, collect};
use minicache_models::{Decoder, LogitsFor, Safetensors, Step};

use crate::{Golden, MODELS, golden, golden_with};

const SPECS: [&str; 25] = [
    "full",
    "mean",
    "max_norm",
    "minicache",
    "{ method = \"minicache\", start_layer = 0, granularity = \"head\", retention = { rule = \"top_fraction\", gamma = 0.1 } }",
    "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, residual = 8 } }",
    "{ method = \"minicache\", start_layer = 0, granularity = \"head\", quant = { bits = 2, residual = 0, retained = true } }",
    "{ method = \"minicache\", start_layer = 1, key_space = \"pre_rope\", retention = { joint = true } }",
    "{ method = \"minicache\", merge = \"values\", residual = 5 }",
    "kivi-2",
    "{ method = \"rtn\", quant = { bits = 4, residual = 0 } }",
    "smoothquant",
    "fp8",
    "rotated-4",
    "turboquant-2",
    "{ method = \"turboquant\", inner_product = true }",
    "{ method = \"h2o\", heavy = 6, recent = 6 }",
    "{ method = \"sinks\", sinks = 2, recent = 9 }",
    "{ method = \"snapkv\", kept = 15, window = 6, kernel = 3 }",
    "{ method = \"expected_attention\", kept = 0.5 }",
    "{ method = \"xkv\", rank_k = 6, rank_v = 9 }",
    "{ method = \"xkv\", group = 3, rank_k = 0.2, rank_v = 1.0 }",
    "{ method = \"latent\", k = { group = 4, bits = 4 }, v = { group = 2, bits = 3 } }",
    "{ method = \"latent\", residual = 6, k = { group = 2, rate = 3.0 }, v = { group = 4, rate = 2.0 } }",
    "{ method = \"latent\", k = { group = 4, heads = \"all\", rate = 3.0 }, v = { group = 2, heads = \"all\", rate = 2.0 } }",
];

/// A made-up text.
fn text(tokens: usize, seed: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * i * 31 + i * 17 + seed * 53) % 200) as u32).collect()
}

/// Two and four layers, one KV head and all of them.
fn groupings(golden: &Golden) -> Vec<Grouping> {
    let widths = [1, golden.decoder.shape().kv_heads];
    let grouping = |layers| widths.iter().map(move |&heads| Grouping { layers, heads });
    [2, 4].into_iter().flat_map(grouping).collect()
}

fn calibrated(golden: &Golden, keys: &[Grouping], values: &[Grouping]) -> Basis {
    let texts: Vec<Vec<u32>> = (0..4).map(|seed| text(60, 100 + seed)).collect();
    let moments = collect(&golden.decoder, texts.iter().map(Vec::as_slice), keys, values, 4).unwrap();
    let weights = Safetensors::open(&golden.dir).unwrap();
    basis(&moments, golden.decoder.config(), &weights, BasisOptions::default()).unwrap()
}

/// What caches of a model need; texts of a few hundred tokens calibrate its latents.
struct Caches {
    shape: ModelShape,
    golden: Golden,
    basis: Basis,
}

impl Caches {
    fn new(name: &str) -> Self {
        Self::of(golden(name))
    }

    fn of(golden: Golden) -> Self {
        let groupings = groupings(&golden);
        let basis = calibrated(&golden, &groupings, &groupings);
        Self { shape: *golden.decoder.shape(), golden, basis }
    }

    fn decoder(&self) -> &Decoder {
        &self.golden.decoder
    }

    /// An empty sequence that is going to have `planned_len` tokens.
    fn empty(&self, spec: &str, planned_len: usize) -> Sequence {
        let cache = self.empty_of(&CacheSpec::parse(spec).unwrap(), planned_len);
        self.decoder().sequence(cache, planned_len)
    }

    fn empty_of(&self, spec: &CacheSpec, planned_len: usize) -> Box<dyn KvCache> {
        let rotary = self.decoder().rotary(planned_len);
        let plan = |latent| LatentPlan::new(latent, &self.shape, &self.basis, rotary.clone()).unwrap();
        let latent = match spec {
            CacheSpec::Latent(latent) => Some(Arc::new(plan(latent))),
            _ => None,
        };
        let resources = Resources { rotary: Some(rotary.clone()), latent };
        minicache_core::build(spec, &self.shape, &resources).unwrap()
    }
}

#[test]
fn a_basis_does_not_depend_on_what_is_calibrated_beside_it() {
    let golden = golden("llama3");
    let groupings = groupings(&golden);
    let together = calibrated(&golden, &groupings, &groupings);
    for (i, grouping) in groupings.into_iter().enumerate() {
        let keys = calibrated(&golden, &[grouping], &[]).keys;
        let values = calibrated(&golden, &[], &[grouping]).values;
        assert!(keys == together.keys[i..=i], "keys of {grouping:?}");
        assert!(values == together.values[i..=i], "values of {grouping:?}");
    }
}

/// Logits of the last token of each sequence after one forward step.
fn forward(decoder: &Decoder, sequences: &mut [(&[u32], &mut Sequence)]) -> Vec<Vec<f32>> {
    let mut steps: Vec<Step<'_>> = sequences
        .iter_mut()
        .map(|(tokens, sequence)| Step { tokens, sequence, logits: LogitsFor::Last })
        .collect();
    decoder.forward(&mut steps).unwrap().iter().map(<[f32]>::to_vec).collect()
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= tolerance * largest, "{what}: {g}, not {w} (of {largest})");
    }
}

/// A cache whose attention is compared with attention by its definition over what it restores.
struct Checked {
    inner: Box<dyn KvCache>,
    what: String,
    /// Of the largest number of an output vector.
    tolerance: f32,
    calls: Arc<AtomicUsize>,
}

impl KvCache for Checked {
    fn shape(&self) -> &ModelShape {
        self.inner.shape()
    }

    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        received: &mut Vec<f32>,
    ) -> Result<()> {
        let (s, len) = (*self.shape(), self.inner.len());
        let past = self.inner.restored(layer)?;
        self.inner.attend_held(layer, states, out, received)?;
        let States { q, k, v, .. } = states;
        let new = k.len() / s.kv_dim();
        // Positions with their keys and values: those held, then the step's own.
        let keys: Vec<f32> = past.keys.iter().chain(k).copied().collect();
        let values: Vec<f32> = past.values.iter().chain(v).copied().collect();
        let positions: Vec<usize> = past.positions.iter().copied().chain(len..len + new).collect();
        for token in 0..new {
            let position = len + token;
            let seen: Vec<usize> = (0..positions.len())
                .filter(|&i| positions[i] <= position && s.window.is_none_or(|w| position - positions[i] < w))
                .collect();
            for head in 0..s.heads {
                let at = |i: usize| (i * s.kv_heads + head / s.group()) * s.head_dim;
                let row = (token * s.heads + head) * s.head_dim;
                let dot = |i: usize| -> f64 {
                    let key = &keys[at(i)..at(i) + s.head_dim];
                    q[row..row + s.head_dim].iter().zip(key).map(|(a, b)| f64::from(a * b)).sum()
                };
                let scores: Vec<f64> = seen.iter().map(|&i| f64::from(s.scale) * dot(i)).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                let want: Vec<f32> = (0..s.head_dim)
                    .map(|c| {
                        let value = |&i: &usize| f64::from(values[at(i) + c]);
                        (seen.iter().zip(&weights).map(|(i, w)| w * value(i)).sum::<f64>() / total) as f32
                    })
                    .collect();
                let what = format!("{}, layer {layer}, position {position}, head {head}", self.what);
                close(&out[row..row + s.head_dim], &want, self.tolerance, &what);
            }
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, received: &[f32]) -> Result<()> {
        self.inner.store(layer, states, received)
    }

    fn finish_step(&mut self) -> Result<()> {
        self.inner.finish_step()
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        self.inner.restored(layer)
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self {
            inner: self.inner.fork(),
            what: self.what.clone(),
            calls: self.calls.clone(),
            ..*self
        })
    }
}

#[test]
fn every_cache_attends_to_what_it_restores_in_every_model() {
    for name in MODELS {
        let model = Caches::new(name);
        let tokens = text(70, 0);
        let exact = forward(model.decoder(), &mut [(&tokens[..40], &mut model.golden.sequence())]);
        for spec in SPECS {
            if model.shape.window.is_some() && CacheSpec::parse(spec).unwrap().needs_attention() {
                // KV heads may then hold different numbers of tokens, which `restored` cannot show.
                continue;
            }
            let stored = CacheSpec::parse(spec).unwrap();
            let f32s = stored.clone().with_f32();
            // Beside f16 numbers weights have 16 bits; latents are weighed by them twice, and values are restored from
            // the metric of W_o, in which what it makes little of is small.
            let beside_f16 = if matches!(stored, CacheSpec::Latent(_)) { 1e-2 } else { 3e-3 };
            for (stored, tolerance) in [(&stored, beside_f16), (&f32s, 1e-4)] {
                let what = format!("{spec} in {name}");
                let inner = model.empty_of(stored, tokens.len());
                let calls = Arc::new(AtomicUsize::new(0));
                let cache = Checked { inner, what: what.clone(), tolerance, calls: calls.clone() };
                let mut sequence = model.decoder().sequence(Box::new(cache), tokens.len());
                // A prompt reads its own states exactly, whatever it is stored as.
                let got = forward(model.decoder(), &mut [(&tokens[..40], &mut sequence)]);
                close(&got[0], &exact[0], 1e-4, &what);
                for token in tokens[40..].chunks(1) {
                    forward(model.decoder(), &mut [(token, &mut sequence)]);
                }
                assert_eq!((sequence.len(), calls.load(Ordering::Relaxed)), (70, 31 * model.shape.layers));
                assert!(sequence.footprint().total() > 0, "{what}");
            }
        }
    }
}

#[test]
fn batches_change_nothing() {
    for name in MODELS {
        let model = Caches::new(name);
        let texts = [text(50, 1), text(30, 2), text(41, 3)];
        for spec in SPECS {
            let alone: Vec<Vec<Vec<f32>>> = texts
                .iter()
                .map(|text| {
                    let mut sequence = model.empty(spec, text.len());
                    let (prompt, rest) = text.split_at(20);
                    let chunks = std::iter::once(prompt).chain(rest.chunks(1));
                    chunks.flat_map(|c| forward(model.decoder(), &mut [(c, &mut sequence)])).collect()
                })
                .collect();
            // The second joins five steps after the first, the third five after that; each leaves at its end.
            let mut all: Vec<Sequence> = texts.iter().map(|t| model.empty(spec, t.len())).collect();
            let mut done = [0; 3];
            for step in 0..45 {
                let mut who = Vec::new();
                let mut sequences: Vec<(&[u32], &mut Sequence)> = Vec::new();
                for (i, (sequence, text)) in all.iter_mut().zip(&texts).enumerate() {
                    let at = sequence.len();
                    if step >= 5 * i && at < text.len() {
                        let next = if at == 0 { &text[..20] } else { &text[at..at + 1] };
                        sequences.push((next, sequence));
                        who.push(i);
                    }
                }
                if sequences.is_empty() {
                    continue;
                }
                let got = forward(model.decoder(), &mut sequences);
                for (i, logits) in who.into_iter().zip(got) {
                    close(&logits, &alone[i][done[i]], 1e-3, &format!("{spec} in {name}, sequence {i}"));
                    done[i] += 1;
                }
            }
            assert_eq!(done, [31, 11, 22]);
        }
    }
}

#[test]
fn what_leaves_a_sliding_window_leaves_the_cache() {
    const TOKENS: usize = 1536;
    let long = |name: &str| Caches::of(golden_with(name, |config| config.context = TOKENS));
    let (sliding, open) = (long("mistral-sliding"), long("mistral"));
    assert_eq!(sliding.shape.window, Some(16));
    let tokens = text(TOKENS, 4);
    for spec in SPECS {
        let mut sequence = sliding.empty(spec, TOKENS);
        // Tokens are dropped by pages; of models this small a page holds up to 512. Most in each of two rounds of them.
        let mut most = [0, 0];
        for (i, token) in tokens.chunks(1).enumerate() {
            forward(sliding.decoder(), &mut [(token, &mut sequence)]);
            if let Some(round) = (i / 512).checked_sub(1) {
                most[round] = sequence.footprint().total().max(most[round]);
            }
            if i % 64 == 0 && !CacheSpec::parse(spec).unwrap().needs_attention() {
                let held = sequence.restored(0).unwrap().positions;
                assert!(held.iter().all(|p| i + 1 - p < 16), "{spec} at {i}: {held:?}");
            }
        }
        let [early, late] = most;
        // The pages of retained tokens, few as these are, take longer to come round.
        assert!(late <= early + early / 20, "{spec}: {early} bytes at most, 512 tokens later {late}");
        // Caches that drop tokens of their own accord are bounded anyway.
        if !CacheSpec::parse(spec).unwrap().drops_tokens() {
            let mut sequence = open.empty(spec, TOKENS);
            // The first token alone, as above: a prompt may be stored otherwise than what follows.
            for tokens in [&tokens[..1], &tokens[1..]] {
                forward(open.decoder(), &mut [(tokens, &mut sequence)]);
            }
            let whole = sequence.footprint().total();
            assert!(5 * late < 4 * whole, "{spec}: {late} bytes with a window, {whole} without");
        }
    }
}
