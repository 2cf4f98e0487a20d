//! What caches promise: golden merges of an independent reference, attention over what is restored, forks, windows.
#![allow(clippy::unwrap_used)]

mod archive;
mod batch;
mod evicted;
mod factored;
mod latent;
mod numbers;
mod softmax;
mod truncate;

use std::path::{Path, PathBuf};

use minicache_core::{CacheSpec, Error, KvCache, ModelShape, PairStates, Resources, build, merge_pair};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

fn read(path: &Path) -> std::collections::HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |t: safetensors::tensor::TensorView<'_>| match t.dtype() {
        safetensors::Dtype::F32 => {
            t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        _ => t.data().iter().map(|&b| f32::from(b)).collect(),
    };
    file.tensors().into_iter().map(|(n, t)| (n, (t.shape().to_vec(), numbers(t)))).collect()
}

/// (heads, tokens, dim) to (tokens, heads, dim).
fn token_major(x: &[f32], heads: usize, dim: usize) -> Vec<f32> {
    let tokens = x.len() / heads / dim;
    (0..x.len()).map(|i| x[((i / dim % heads) * tokens + i / dim / heads) * dim + i % dim]).collect()
}

fn golden_folders() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all = [here.join("tests/fixtures"), here.join("../../../shared/golden/merge")];
    all.into_iter().filter(|p| p.join("cases.json").exists()).collect()
}

#[test]
fn merges_equal_the_independent_reference() {
    let mut checked = 0;
    for folder in golden_folders() {
        let cases: Vec<serde_json::Value> =
            serde_json::from_str(&std::fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
        for pair in 0..3 {
            let file = folder.join(format!("pair{pair}.safetensors"));
            if !file.exists() {
                continue;
            }
            let input = read(&file);
            let shape = &input["a.key"].0;
            let (kv_heads, head_dim) = (shape[0], shape[2]);
            let x = |name: &str| token_major(&input[name].1, kv_heads, head_dim);
            let (key_a, key_b, value_a, value_b) = (x("a.key"), x("b.key"), x("a.value"), x("b.value"));
            let states = PairStates {
                kv_heads,
                head_dim,
                key_a: &key_a,
                key_b: &key_b,
                value_a: &value_a,
                value_b: &value_b,
            };
            for case in &cases {
                let golden = read(&folder.join(format!("pair{pair}.case{}.safetensors", case["case"])));
                let text = match case["rule"].as_str().unwrap() {
                    "" => format!("{{ method = {}, granularity = {} }}", case["method"], case["granularity"]),
                    rule => format!(
                        "{{ method = {}, t = {}, granularity = {}, retention = {{ rule = \"{rule}\", gamma = {} }} }}",
                        case["method"], case["t"], case["granularity"], case["gamma"]
                    ),
                };
                let got = merge_pair(&CacheSpec::parse(&text).unwrap(), &states).unwrap();
                for (name, ours) in [
                    ("a.key", &got.restored[0].keys),
                    ("b.key", &got.restored[1].keys),
                    ("a.value", &got.restored[0].values),
                    ("b.value", &got.restored[1].values),
                ] {
                    let want = token_major(&golden[name].1, kv_heads, head_dim);
                    let top = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    for (o, w) in ours.iter().zip(&want) {
                        assert!((o - w).abs() <= 1e-5 * top, "pair {pair} {text} {name}: {o} {w}");
                    }
                }
                for (name, ours) in
                    [("retained.key", &got.retained_keys), ("retained.value", &got.retained_values)]
                {
                    let (shape, marks) = &golden[name];
                    let want: Vec<Vec<usize>> = marks
                        .chunks_exact(shape[1])
                        .map(|lane| (0..shape[1]).filter(|&i| lane[i] > 0.0).collect())
                        .collect();
                    assert_eq!(*ours, want, "pair {pair} {text} {name}");
                }
                assert!(got.footprint.total() > 0);
                checked += 1;
            }
        }
    }
    assert!(checked >= 9, "only {checked} golden cases found");
}

fn shape(kv_heads: usize, group: usize, head_dim: usize, window: Option<usize>) -> ModelShape {
    let scale = (head_dim as f32).sqrt().recip();
    ModelShape { layers: 4, heads: kv_heads * group, kv_heads, head_dim, window, scale, ..ModelShape::PLAIN }
}

struct StepStates {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn random_states(rng: &mut StdRng, shape: &ModelShape, tokens: usize) -> StepStates {
    let mut x = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_dim());
    StepStates { q: x(tokens * q), k: x(tokens * kv), v: x(tokens * kv) }
}

/// Attention through every kind of step, against its definition over what is restored, for the cache of `spec` and
/// for the same with f32 numbers beside the codes, whose weights are not rounded to 16 bits.
fn check_against_restored(spec: &CacheSpec, shape: &ModelShape, resources: &Resources, seed: u64) {
    let f32s = spec.clone().with_f32();
    // Latents go through a basis on the way in and out, which rounds twice more.
    let fine = if matches!(spec, CacheSpec::Latent(_)) { 5e-5 } else { 1e-5 };
    // So do rotations, and what is rounded before is spread by them.
    let coarse = if matches!(spec, CacheSpec::Rotated(_)) { 2e-4 } else { 1e-4 };
    for (spec, tolerance) in [(spec, coarse), (&f32s, fine)] {
        let mut cache = build(spec, shape, resources).unwrap();
        check_steps(&mut *cache, seed, tolerance, &spec.label());
    }
}

fn check_steps(cache: &mut dyn KvCache, seed: u64, tolerance: f32, what: &str) {
    let shape = *cache.shape();
    let mut rng = StdRng::seed_from_u64(seed);
    for tokens in [150, 1, 1, 7, 1, 40, 1] {
        let states: Vec<_> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect();
        let len = cache.len();
        let past = |l| reference(&shape, l, &cache.restored(l).unwrap(), len, &states[l], &[]);
        let want: Vec<_> = (0..shape.layers).map(past).collect();
        let got = step(cache, &states);
        for l in 0..shape.layers {
            close(
                &got[l],
                &want[l],
                tolerance,
                &format!("{what}, {shape:?}, layer {l}, {tokens} tokens at {len}"),
            );
        }
    }
    assert_eq!(cache.len(), 201);
}

/// Runs one step over all layers; gives each layer's output.
fn step(cache: &mut dyn KvCache, layers: &[StepStates]) -> Vec<Vec<f32>> {
    let out = layers.iter().enumerate().map(|(l, s)| {
        let mut out = vec![0.0; s.q.len()];
        cache.attend_into(l, &s.q, &s.k, &s.v, &mut out).unwrap();
        out
    });
    let out = out.collect();
    cache.finish_step().unwrap();
    out
}

/// Attention by its definition in f64, over restored states plus the step's own; `sinks` are scores by query head.
fn reference(
    shape: &ModelShape,
    layer: usize,
    past: &minicache_core::Restored,
    len: usize,
    s: &StepStates,
    sinks: &[f32],
) -> Vec<f32> {
    let (dim, kv) = (shape.head_dim, shape.kv_dim());
    let tokens = s.k.len() / kv;
    let mut out = vec![0.0; s.q.len()];
    for t in 0..tokens {
        for h in 0..shape.heads {
            let q = &s.q[(t * shape.heads + h) * dim..][..dim];
            let head = h / shape.group();
            let position = len + t;
            let seen = |p: usize| p <= position && shape.window_of(layer).is_none_or(|w| position - p < w);
            let mut rows: Vec<(&[f32], &[f32])> = Vec::new();
            for (i, &p) in past.positions.iter().enumerate() {
                if seen(p) {
                    let at = i * kv + head * dim;
                    rows.push((&past.keys[at..at + dim], &past.values[at..at + dim]));
                }
            }
            for i in 0..=t {
                if seen(len + i) {
                    let at = i * kv + head * dim;
                    rows.push((&s.k[at..at + dim], &s.v[at..at + dim]));
                }
            }
            let dot = |k: &[f32]| {
                q.iter().zip(k).map(|(a, b)| f64::from(a * b)).sum::<f64>() * f64::from(shape.scale)
            };
            let capped = |s: f64| shape.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh());
            let scores: Vec<f64> = rows.iter().map(|(k, _)| capped(dot(k))).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sink = sinks.get(h).map_or(0.0, |&s| (f64::from(s) - top).exp());
            let total: f64 = weights.iter().sum::<f64>() + sink;
            for c in 0..dim {
                let sum: f64 = weights.iter().zip(&rows).map(|(w, (_, v))| w * f64::from(v[c])).sum();
                out[(t * shape.heads + h) * dim + c] = (sum / total) as f32;
            }
        }
    }
    out
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance, "{what}: number {i} is {g}, not {w}");
    }
}

const SPECS: [&str; 34] = [
    "full",
    "{ method = \"full\", dtype = \"f32\" }",
    "mean",
    "max_norm",
    "minicache",
    "{ method = \"minicache\", dtype = \"f32\", magnitudes = \"f32\", granularity = \"head\", start_layer = 0 }",
    "{ method = \"minicache\", retention = { rule = \"top_fraction\", gamma = 0.2, joint = true }, start_layer = 1 }",
    "{ method = \"minicache\", merge = \"values\", start_layer = 0, retention = { gamma = 0.3 } }",
    "{ method = \"minicache\", start_layer = 0, residual = 24 }",
    "{ method = \"minicache\", start_layer = 1, granularity = \"head\", residual = 170, quant = { bits = 4, residual = 0 } }",
    "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, group = 32, residual = 32, retained = true } }",
    "{ method = \"minicache\", start_layer = 0, granularity = \"head\", quant = { bits = 2, residual = 0 } }",
    "{ method = \"minicache\", pairs = { keys = [0, 2], values = [1] }, quant = { bits = 4 } }",
    "{ method = \"mean\", start_layer = 0, sinks = 3 }",
    "{ method = \"minicache\", start_layer = 1, sinks = 151, quant = { bits = 4 }, retention = { rule = \"top_fraction\" } }",
    "kivi-2",
    "{ method = \"kivi\", quant = { bits = 4, group = 64, residual = 64 } }",
    "rtn-3",
    "smoothquant",
    "{ method = \"rank_one\", sinks = 1 }",
    "{ method = \"rank_one\", start_layer = 0, granularity = \"head\", quant = { bits = 4 } }",
    "fp8",
    "{ method = \"rotated\", quant = { bits = 4, group = 64, residual = 20 } }",
    "rotated-2",
    "turboquant-1",
    "turboquant-4",
    "{ method = \"turboquant\", bits = 3, inner_product = true }",
    "{ method = \"turboquant\", bits = 4, inner_product = true }",
    "{ method = \"h2o\", heavy = 20, recent = 0.2 }",
    "{ method = \"sinks\", recent = 30 }",
    "{ method = \"snapkv\", kept = 40, window = 9, kernel = 3 }",
    "{ method = \"expected_attention\", kept = 0.3 }",
    "{ method = \"xkv\", rank_k = 5, rank_v = 0.1 }",
    "{ method = \"xkv\", group = 3, rank_k = 0.3, rank_v = 1.0 }",
];

#[test]
fn attention_is_attention_over_the_restored_cache() {
    for (case, (kv_heads, group, dim, window)) in
        [(1, 1, 8, None), (2, 3, 64, None), (2, 2, 80, Some(50)), (1, 4, 96, None), (2, 1, 128, Some(17))]
            .into_iter()
            .enumerate()
    {
        let shape = shape(kv_heads, group, dim, window);
        for text in SPECS {
            let ranks = CacheSpec::parse(text).unwrap().needs_attention();
            if window.is_some() && ranks {
                // Heads may then hold different numbers of tokens, which `restored` cannot show.
                continue;
            }
            let spec = CacheSpec::parse(text).unwrap();
            check_against_restored(&spec, &shape, &Resources::default(), case as u64);
        }
    }
}

#[test]
fn methods_that_drop_tokens_hold_little_more_than_they_keep() {
    let shape = shape(2, 2, 64, None);
    let mut rng = StdRng::seed_from_u64(4);
    for (text, kept) in [
        ("{ method = \"sinks\", recent = 100 }", 104),
        ("{ method = \"sinks\", recent = 0.2 }", 4 + 140),
        ("{ method = \"h2o\", heavy = 0.1, recent = 50 }", 50 + 70),
    ] {
        let mut cache = build(&CacheSpec::parse(text).unwrap(), &shape, &Resources::default()).unwrap();
        for tokens in std::iter::once(500).chain(std::iter::repeat_n(1, 200)) {
            let states: Vec<_> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect();
            step(&mut *cache, &states);
        }
        // Room for 32 tokens more, and a number or two beside each.
        let held = cache.footprint().total() as f64 / (shape.full_bytes(1) as f64 * 1.05);
        assert!(held > 0.9 * kept as f64 && held < (kept + 33) as f64, "{text}: room for {held} tokens");
    }
}

#[test]
fn a_full_f32_cache_restores_exactly_and_chunking_changes_nothing() {
    let shape = shape(2, 2, 16, None);
    let mut rng = StdRng::seed_from_u64(1);
    let states: Vec<_> = (0..4).map(|_| random_states(&mut rng, &shape, 90)).collect();
    let spec = CacheSpec::parse("{ method = \"full\", dtype = \"f32\" }").unwrap();
    let mut whole = build(&spec, &shape, &Resources::default()).unwrap();
    let want = step(&mut *whole, &states);
    let mut parts = build(&spec, &shape, &Resources::default()).unwrap();
    let mut at = 0;
    for tokens in [1, 30, 2, 57] {
        let cut = |x: &[f32], width: usize| x[at * width..(at + tokens) * width].to_vec();
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_dim());
        let chunk: Vec<_> = states
            .iter()
            .map(|s| StepStates { q: cut(&s.q, q), k: cut(&s.k, kv), v: cut(&s.v, kv) })
            .collect();
        let got = step(&mut *parts, &chunk);
        for l in 0..4 {
            close(&got[l], &cut(&want[l], q), 1e-5, "chunked");
        }
        at += tokens;
    }
    for (l, s) in states.iter().enumerate() {
        assert_eq!(whole.restored(l).unwrap().keys, s.k);
        assert_eq!(parts.restored(l).unwrap().values, s.v);
    }
}

#[test]
fn forks_go_their_own_ways() {
    let shape = shape(2, 2, 32, None);
    for text in SPECS {
        let mut rng = StdRng::seed_from_u64(2);
        let mut states = |tokens| (0..4).map(|_| random_states(&mut rng, &shape, tokens)).collect::<Vec<_>>();
        let (prefix, one, other) = (states(70), states(1), states(1));
        let fresh = || build(&CacheSpec::parse(text).unwrap(), &shape, &Resources::default()).unwrap();
        let run = |continuation: &[&Vec<StepStates>]| {
            let mut cache = fresh();
            step(&mut *cache, &prefix);
            continuation.iter().map(|s| step(&mut *cache, s)).last().unwrap()
        };
        let (want_left, want_right) = (run(&[&one, &other]), run(&[&other, &other]));
        let mut left = fresh();
        step(&mut *left, &prefix);
        let mut right = left.fork();
        step(&mut *left, &one);
        step(&mut *right, &other);
        assert_eq!(step(&mut *left, &other), want_left, "{text}");
        assert_eq!(step(&mut *right, &other), want_right, "{text}");
    }
}

#[test]
fn a_window_drops_what_has_left_it() {
    let spec = CacheSpec::parse("minicache").unwrap();
    let mut rng = StdRng::seed_from_u64(3);
    let mut bytes = Vec::new();
    for window in [Some(100), None] {
        let shape = shape(2, 2, 32, window);
        let mut cache = build(&spec, &shape, &Resources::default()).unwrap();
        for _ in 0..20 {
            let states: Vec<_> = (0..4).map(|_| random_states(&mut rng, &shape, 50)).collect();
            step(&mut *cache, &states);
        }
        assert_eq!(cache.restored(0).unwrap().positions.len(), window.map_or(1000, |w| w - 1));
        bytes.push(cache.footprint().total());
    }
    assert!(bytes[0] * 4 < bytes[1], "{bytes:?}");
}

#[test]
fn bad_states_are_refused_with_layer_and_position() {
    let shape = shape(1, 1, 8, None);
    let mut cache = build(&CacheSpec::default(), &shape, &Resources::default()).unwrap();
    let mut rng = StdRng::seed_from_u64(4);
    let mut s = random_states(&mut rng, &shape, 5);
    s.v[3 * 8 + 2] = f32::NAN;
    let mut out = vec![0.0; s.q.len()];
    let e = cache.attend_into(2, &s.q, &s.k, &s.v, &mut out).unwrap_err().to_string();
    assert!(e.contains("value state of layer 2 at position 3"), "{e}");
    let e = cache.attend_into(2, &s.q, &s.k[1..], &s.v, &mut out).unwrap_err().to_string();
    assert!(e.contains("keys"), "{e}");
    let e = cache.attend_into(9, &s.q, &s.k, &s.v, &mut out).unwrap_err().to_string();
    assert!(e.contains("layer"), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn retained_tokens_come_back_exactly_and_magnitudes_are_kept(seed in 0u64..1000, gamma in 0.01f64..0.5) {
        let (kv_heads, head_dim, tokens) = (2, 16, 40);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut x = || (0..tokens * kv_heads * head_dim).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
        let (key_a, key_b, value_a, value_b) = (x(), x(), x(), x());
        let states = PairStates {
            kv_heads, head_dim, key_a: &key_a, key_b: &key_b, value_a: &value_a, value_b: &value_b,
        };
        let spec = format!("{{ method = \"minicache\", retention = {{ gamma = {gamma} }} }}");
        let got = merge_pair(&CacheSpec::parse(&spec).unwrap(), &states).unwrap();
        let norm = |x: &[f32]| x.iter().map(|v| v * v).sum::<f32>().sqrt();
        for t in 0..tokens {
            let at = t * kv_heads * head_dim..(t + 1) * kv_heads * head_dim;
            let (ours, original) = (&got.restored[1].keys[at.clone()], &key_b[at]);
            if got.retained_keys[0].contains(&t) {
                prop_assert_eq!(ours, original);
            } else {
                prop_assert!((norm(ours) - norm(original)).abs() < 1e-5 * norm(original));
            }
        }
        prop_assert!(!got.retained_keys[0].is_empty() && got.retained_keys[0].len() < tokens);
    }
}

#[test]
fn first_tokens_of_merging_methods_stay_exact_and_take_no_part_in_the_rule() {
    let shape = shape(2, 2, 16, None);
    let mut rng = StdRng::seed_from_u64(3);
    let steps = [1usize, 2, 30, 1, 1]
        .map(|tokens| (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect::<Vec<_>>());
    let f32s = "dtype = \"f32\", magnitudes = \"f32\", start_layer = 0";
    for method in ["mean", "max_norm", "minicache"] {
        for granularity in ["token", "head"] {
            let filled = |sinks: usize, rule: &str| {
                let rule = if method == "minicache" { rule } else { "" };
                let text = format!(
                    "{{ method = \"{method}\", {f32s}, granularity = \"{granularity}\", sinks = {sinks}{rule} }}"
                );
                let mut cache =
                    build(&CacheSpec::parse(&text).unwrap(), &shape, &Resources::default()).unwrap();
                steps.iter().for_each(|s| drop(step(&mut *cache, s)));
                cache
            };
            let none = ", retention = { gamma = 0.0 }";
            let (with, without) = (filled(5, none), filled(0, none));
            for layer in 0..shape.layers {
                let all = |of: fn(&StepStates) -> &Vec<f32>| {
                    steps.iter().flat_map(|s| of(&s[layer]).clone()).collect::<Vec<f32>>()
                };
                let (kept, merged) = (with.restored(layer).unwrap(), without.restored(layer).unwrap());
                let first = 5 * shape.kv_dim();
                for (kept, merged, exact) in
                    [(&kept.keys, &merged.keys, all(|s| &s.k)), (&kept.values, &merged.values, all(|s| &s.v))]
                {
                    assert_eq!(kept[..first], exact[..first], "{method} {granularity}");
                    assert_ne!(merged[..first], exact[..first], "{method} {granularity}");
                    assert_eq!(kept[first..], merged[first..], "{method} {granularity}");
                }
            }
            assert!(with.footprint().retained > without.footprint().retained);
        }
    }
}

const LATENTS: [&str; 8] = [
    "{ method = \"latent\", dtype = \"f32\", k = { rank = 1.0, bits = 16 }, v = { rank = 1.0, bits = 16 } }",
    "{ method = \"latent\", sinks = 0, k = { rank = 0.5, bits = 16 }, v = { rank = 7, bits = 16 } }",
    "{ method = \"latent\", k = { rank = 0.6, bits = 4 }, v = { rank = { energy = 0.7 }, bits = 3 }, residual = 20 }",
    "{ method = \"latent\", k = { axis = \"channel\", bits = 8 }, v = { axis = \"channel\", bits = 2 } }",
    "{ method = \"latent\", k = { rate = 2.0 }, v = { rate = 1.5 }, magnitudes = \"f32\" }",
    "{ method = \"latent\", k = { rate = 3.0 }, v = { rate = 3.0 }, residual = 33, sinks = 10 }",
    "{ method = \"latent\", k = { rate = 2.0, trellis = true }, v = { rate = 1.2, trellis = true }, residual = 5 }",
    "{ method = \"latent\", residual = 20, k = { rate = 3.0, residual_bits = 8 }, v = { rate = 2.0, residual_bits = 8 } }",
];

#[test]
fn latent_attention_is_attention_over_the_restored_cache() {
    for (kv_heads, group, dim, window) in [(1, 4, 8, None), (3, 3, 16, None), (2, 1, 32, Some(40))] {
        let shape = shape(kv_heads, group, dim, window);
        for text in LATENTS {
            for (key, value) in [
                ("group = 1, heads = \"all\"", "group = 2, heads = \"all\""),
                ("group = 4, heads = 2", "group = 3, heads = \"all\""),
                ("group = 2, heads = \"all\"", "group = 4, heads = 1"),
                ("group = 2, heads = 1", "group = 3, heads = 1"),
            ] {
                let text = text
                    .replace("k = {", &format!("k = {{ {key},"))
                    .replace("v = {", &format!("v = {{ {value},"));
                let resources = Resources { latent: Some(latent::plan(&text, &shape)), rotary: None };
                check_against_restored(&CacheSpec::parse(&text).unwrap(), &shape, &resources, 5);
            }
        }
    }
}

#[test]
fn latents_of_full_rank_restore_the_states_and_forks_part() {
    let shape = shape(2, 2, 16, None);
    let text = LATENTS[0].replace("k = {", "k = { group = 2,").replace("v = {", "v = { group = 4,");
    let resources = Resources { latent: Some(latent::plan(&text, &shape)), rotary: None };
    let mut rng = StdRng::seed_from_u64(8);
    let mut states = |tokens| (0..4).map(|_| random_states(&mut rng, &shape, tokens)).collect::<Vec<_>>();
    let (prefix, one, other) = (states(50), states(1), states(1));
    let mut left = build(&CacheSpec::parse(&text).unwrap(), &shape, &resources).unwrap();
    step(&mut *left, &prefix);
    for (l, s) in prefix.iter().enumerate() {
        let restored = left.restored(l).unwrap();
        close(&restored.keys, &s.k, 2e-5, "keys");
        close(&restored.values, &s.v, 2e-5, "values");
    }
    let mut right = left.fork();
    step(&mut *left, &one);
    step(&mut *right, &other);
    close(&left.restored(3).unwrap().keys[50 * 32..], &one[3].k, 2e-5, "left");
    close(&right.restored(3).unwrap().keys[50 * 32..], &other[3].k, 2e-5, "right");
}
