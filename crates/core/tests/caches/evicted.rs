//! Which tokens of a prompt are kept, against the definitions in f64 written out as the papers' code has them.

use std::sync::Arc;

use minicache_core::{CacheSpec, ModelShape, Resources, Restored, build};
use rand::{SeedableRng, rngs::StdRng};

use crate::latent::Rope;
use crate::{StepStates, random_states, shape, step};

const PROMPT: usize = 90;

/// The places in `all (tokens, kv_heads, dim)` of the vectors that a KV head holds.
fn held(shape: &ModelShape, restored: &Restored, all: &[f32], head: usize) -> Vec<usize> {
    let (dim, kv) = (shape.head_dim, shape.kv_dim());
    let of = |x: &[f32], i: usize| x[i * kv + head * dim..][..dim].to_vec();
    let find = |i: usize| {
        let vector = of(&restored.keys, i);
        (0..all.len() / kv).find(|&t| of(all, t) == vector).expect("a vector that was given")
    };
    (0..restored.positions.len()).map(find).collect()
}

/// The `most` places with the highest scores, in order.
fn top(scores: &[f64], most: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]));
    order.truncate(most);
    order.sort_unstable();
    order
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// The vector of a token and a head among `heads`.
fn vector(x: &[f32], heads: usize, dim: usize, token: usize, head: usize) -> Vec<f64> {
    x[(token * heads + head) * dim..][..dim].iter().map(|x| f64::from(*x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Fills a cache with a prompt and some tokens, and compares what heads hold with `want(states, head)` and all tokens
/// after the prompt.
fn check(spec: &str, resources: &Resources, want: &dyn Fn(&ModelShape, &StepStates, usize) -> Vec<usize>) {
    for (kv_heads, group) in [(2, 3), (1, 1), (3, 2)] {
        let shape = shape(kv_heads, group, 16, None);
        let spec = CacheSpec::parse(spec).unwrap().with_f32();
        let mut cache = build(&spec, &shape, resources).unwrap();
        let mut rng = StdRng::seed_from_u64(31);
        let mut layers: Vec<StepStates> =
            (0..shape.layers).map(|_| random_states(&mut rng, &shape, PROMPT)).collect();
        // Attention that looks somewhere.
        layers.iter_mut().for_each(|s| s.q.iter_mut().for_each(|q| *q *= 6.0));
        step(&mut *cache, &layers);
        let more: Vec<Vec<StepStates>> =
            [1, 3, 1].map(|n| (0..shape.layers).map(|_| random_states(&mut rng, &shape, n)).collect()).into();
        more.iter().for_each(|s| drop(step(&mut *cache, s)));
        for (layer, s) in layers.iter().enumerate() {
            let restored = cache.restored(layer).unwrap();
            let keys: Vec<f32> =
                std::iter::once(&s.k).chain(more.iter().map(|m| &m[layer].k)).flatten().copied().collect();
            for head in 0..kv_heads {
                let mut all = want(&shape, s, head);
                all.extend(PROMPT..PROMPT + 5);
                assert_eq!(held(&shape, &restored, &keys, head), all, "layer {layer}, head {head}");
            }
        }
    }
}

#[test]
fn snapkv_keeps_what_the_last_queries_attend_to() {
    let want = |shape: &ModelShape, s: &StepStates, head: usize| {
        let (dim, group, window, kernel, kept) = (shape.head_dim, shape.group(), 12, 5, 30);
        let older = PROMPT - window;
        let mut attention = vec![0.0; older];
        for t in older..PROMPT {
            for h in head * group..(head + 1) * group {
                let q = vector(&s.q, shape.heads, dim, t, h);
                let score = |i| dot(&q, &vector(&s.k, shape.kv_heads, dim, i, head)) * f64::from(shape.scale);
                let weights = softmax(&(0..=t).map(score).collect::<Vec<f64>>());
                attention.iter_mut().zip(weights).for_each(|(a, w)| *a += w);
            }
        }
        // avg_pool1d with zeros at the ends.
        let at = |i: isize| usize::try_from(i).ok().and_then(|i| attention.get(i)).copied().unwrap_or(0.0);
        let reach = kernel / 2;
        let pooled: Vec<f64> = (0..older as isize)
            .map(|i| (i - reach..=i + reach).map(at).sum::<f64>() / kernel as f64)
            .collect();
        let mut kept = top(&pooled, kept - window);
        kept.extend(older..PROMPT);
        kept
    };
    check("{ method = \"snapkv\", kept = 30, window = 12, kernel = 5 }", &Resources::default(), &want);
}

#[test]
fn expected_attention_keeps_what_later_queries_are_expected_to_attend_to() {
    for rotated in [true, false] {
        let want = move |shape: &ModelShape, s: &StepStates, head: usize| {
            let (dim, group, sinks, future, kept) = (shape.head_dim, shape.group(), 3, 40, 25);
            let scale = f64::from(shape.scale);
            // The rotation to a position, by its definition, as a matrix of rows.
            let rotation = |position: f64| -> Vec<Vec<f64>> {
                let mut r = vec![vec![0.0; dim]; dim];
                for j in 0..dim / 2 {
                    let angle = position * 10000f64.powf(-(j as f64) / (dim / 2) as f64);
                    let (sin, cos) = if rotated { angle.sin_cos() } else { (0.0, 1.0) };
                    (r[j][j], r[j][j + dim / 2]) = (cos, -sin);
                    (r[j + dim / 2][j], r[j + dim / 2][j + dim / 2]) = (sin, cos);
                }
                r
            };
            let apply = |r: &[Vec<f64>], x: &[f64]| r.iter().map(|row| dot(row, x)).collect::<Vec<f64>>();
            let mut average = vec![vec![0.0; dim]; dim];
            for p in PROMPT..PROMPT + future {
                for (sum, row) in average.iter_mut().zip(rotation(p as f64)) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x / future as f64);
                }
            }
            let n = (PROMPT - sinks) as f64;
            let mut total = vec![0.0; PROMPT - sinks];
            for h in head * group..(head + 1) * group {
                let queries: Vec<Vec<f64>> = (sinks..PROMPT)
                    .map(|t| apply(&rotation(-(t as f64)), &vector(&s.q, shape.heads, dim, t, h)))
                    .collect();
                let mean: Vec<f64> =
                    (0..dim).map(|c| queries.iter().map(|q| q[c]).sum::<f64>() / n).collect();
                let entry = |i: usize, j: usize| {
                    queries.iter().map(|q| (q[i] - mean[i]) * (q[j] - mean[j])).sum::<f64>() / n
                };
                let covariance: Vec<Vec<f64>> =
                    (0..dim).map(|i| (0..dim).map(|j| entry(i, j)).collect()).collect();
                let mean = apply(&average, &mean);
                // R C R^T.
                let half: Vec<Vec<f64>> = covariance.iter().map(|row| apply(&average, row)).collect();
                let column = |c: usize| half.iter().map(|row| row[c]).collect::<Vec<f64>>();
                let columns: Vec<Vec<f64>> = (0..dim).map(|c| apply(&average, &column(c))).collect();
                let score = |t: usize| {
                    let k = vector(&s.k, shape.kv_heads, dim, t, head);
                    let spread = columns.iter().zip(&k).map(|(column, x)| x * dot(column, &k)).sum::<f64>();
                    scale * dot(&mean, &k) + scale * scale * spread / 2.0
                };
                let weights = softmax(&(sinks..PROMPT).map(score).collect::<Vec<f64>>());
                total.iter_mut().zip(weights).for_each(|(total, w)| *total += w / group as f64);
            }
            for (t, total) in total.iter_mut().enumerate() {
                let v = vector(&s.v, shape.kv_heads, dim, sinks + t, head);
                *total *= dot(&v, &v).sqrt();
            }
            let mut kept_tokens: Vec<usize> = (0..sinks).collect();
            kept_tokens.extend(top(&total, kept - sinks).iter().map(|t| t + sinks));
            kept_tokens
        };
        let rotary = rotated.then(|| Arc::new(Rope(16)) as Arc<dyn minicache_core::Rotary>);
        let resources = Resources { rotary, latent: None };
        check("{ method = \"expected_attention\", kept = 25, sinks = 3, future = 40 }", &resources, &want);
    }
}

#[test]
fn prompts_that_fit_are_kept_and_settings_that_cannot_be_are_refused() {
    let shape = shape(2, 2, 16, None);
    let mut rng = StdRng::seed_from_u64(5);
    let layers: Vec<StepStates> = (0..shape.layers).map(|_| random_states(&mut rng, &shape, 20)).collect();
    for spec in [
        "{ method = \"snapkv\", kept = 20 }",
        "{ method = \"snapkv\", kept = 1, window = 30 }",
        "{ method = \"expected_attention\", kept = 0.2, sinks = 20 }",
    ] {
        let mut cache = build(&CacheSpec::parse(spec).unwrap(), &shape, &Resources::default()).unwrap();
        step(&mut *cache, &layers);
        assert_eq!(cache.restored(2).unwrap().positions, (0..20).collect::<Vec<_>>(), "{spec}");
    }
    for (spec, key) in [
        ("{ method = \"snapkv\", kernel = 4 }", "kernel"),
        ("{ method = \"snapkv\", window = 0 }", "window"),
        ("{ method = \"snapkv\", kept = 1.5 }", "kept"),
        ("{ method = \"expected_attention\", future = 0 }", "future"),
    ] {
        let e = CacheSpec::parse(spec).unwrap_err().to_string();
        assert!(e.contains(key), "{e}");
    }
}
