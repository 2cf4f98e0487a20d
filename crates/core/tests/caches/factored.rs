//! Prompts in factors, against the singular value decomposition in f64 of the same states.

use std::sync::Arc;

use minicache_core::{CacheSpec, Error, KvCache, ModelShape, Resources, Rotary, build};
use rand::{SeedableRng, rngs::StdRng};

use crate::latent::Rope;
use crate::{StepStates, check_against_restored, close, random_states, reference, shape, step};

const PROMPT: usize = 90;

fn layers(rng: &mut StdRng, shape: &ModelShape, tokens: usize) -> Vec<StepStates> {
    (0..shape.layers).map(|_| random_states(rng, shape, tokens)).collect()
}

fn resources(rotated: bool) -> Resources {
    let rotary = rotated.then(|| Arc::new(Rope(16)) as Arc<dyn Rotary>);
    Resources { rotary, latent: None }
}

fn empty(text: &str, shape: &ModelShape, rotated: bool) -> Box<dyn KvCache> {
    build(&CacheSpec::parse(text).unwrap(), shape, &resources(rotated)).unwrap()
}

/// The best approximation of rank `rank` of the matrix of these rows: rotations of pairs of columns until all are
/// orthogonal (Hestenes 1958) give X V = U S; X V V^T with the columns of the largest.
fn low_rank(rows: &[Vec<f64>], rank: usize) -> Vec<Vec<f64>> {
    let n = rows[0].len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Each column of X, with the same column of V below it.
    let mut columns: Vec<Vec<f64>> = (0..n)
        .map(|c| rows.iter().map(|row| row[c]).chain((0..n).map(|i| f64::from(u8::from(i == c)))).collect())
        .collect();
    for _ in 0..12 {
        for p in 0..n {
            for q in p + 1..n {
                let (left, right) = columns.split_at_mut(q);
                let (a, b) = (&mut left[p], &mut right[0]);
                let (x, y) = (&a[..rows.len()], &b[..rows.len()]);
                let (sin, cos) = (0.5 * (2.0 * dot(x, y)).atan2(dot(x, x) - dot(y, y))).sin_cos();
                a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (cos * *a + sin * *b, cos * *b - sin * *a));
            }
        }
    }
    let square = |column: &Vec<f64>| dot(&column[..rows.len()], &column[..rows.len()]);
    columns.sort_by(|a, b| square(b).total_cmp(&square(a)));
    let entry = |t: usize, c: usize| columns[..rank].iter().map(|x| x[t] * x[rows.len() + c]).sum();
    (0..rows.len()).map(|t| (0..n).map(|c| entry(t, c)).collect()).collect()
}

/// Plain RoPE by its definition, forth or back.
fn rotated(state: &[f64], dim: usize, position: f64) -> Vec<f64> {
    let mut out = state.to_vec();
    for head in out.chunks_exact_mut(dim) {
        for j in 0..dim / 2 {
            let (sin, cos) = (position * 10000f64.powf(-(j as f64) / (dim / 2) as f64)).sin_cos();
            let (re, im) = (head[j], head[j + dim / 2]);
            (head[j], head[j + dim / 2]) = (re * cos - im * sin, re * sin + im * cos);
        }
    }
    out
}

#[test]
fn a_prompt_is_the_truncated_svd_of_its_groups_and_what_follows_is_exact() {
    for (kv_heads, heads_per_kv, with_rotary) in [(2, 3, true), (1, 1, true), (3, 2, false)] {
        let shape = shape(kv_heads, heads_per_kv, 16, None);
        let (dim, kv) = (shape.head_dim, shape.kv_dim());
        // Three layers, and the fourth by itself.
        let text = "{ method = \"xkv\", group = 3, rank_k = 7, rank_v = 0.25, dtype = \"f32\" }";
        let mut cache = empty(text, &shape, with_rotary);
        let mut rng = StdRng::seed_from_u64(41);
        let prompt = layers(&mut rng, &shape, PROMPT);
        step(&mut *cache, &prompt);
        let more = [1, 4, 1].map(|tokens| layers(&mut rng, &shape, tokens));
        more.iter().for_each(|s| drop(step(&mut *cache, s)));
        for group in [0..3, 3..4] {
            let width = group.len() * kv;
            for keys in [true, false] {
                let turns = with_rotary && keys;
                let side = |s: &StepStates| if keys { s.k.clone() } else { s.v.clone() };
                let token = |layer: usize, t: usize| -> Vec<f64> {
                    let state: Vec<f64> =
                        side(&prompt[layer])[t * kv..(t + 1) * kv].iter().map(|x| f64::from(*x)).collect();
                    if turns { rotated(&state, dim, -(t as f64)) } else { state }
                };
                let rows: Vec<Vec<f64>> =
                    (0..PROMPT).map(|t| group.clone().flat_map(|layer| token(layer, t)).collect()).collect();
                let best = low_rank(&rows, if keys { 7 } else { width / 4 });
                for (i, layer) in group.clone().enumerate() {
                    let restored = cache.restored(layer).unwrap();
                    assert_eq!(restored.positions.len(), PROMPT + 6);
                    let restored = if keys { restored.keys } else { restored.values };
                    let mut want = Vec::new();
                    for (t, row) in best.iter().enumerate() {
                        let state = &row[i * kv..(i + 1) * kv];
                        let state = if turns { rotated(state, dim, t as f64) } else { state.to_vec() };
                        want.extend(state.iter().map(|x| *x as f32));
                    }
                    more.iter().for_each(|s| want.extend(side(&s[layer])));
                    close(&restored, &want, 2e-5, &format!("layer {layer}, keys: {keys}"));
                    assert_eq!(restored[PROMPT * kv..], want[PROMPT * kv..]);
                }
            }
        }
    }
}

#[test]
fn attention_over_rotated_keys_is_that_over_the_restored() {
    for window in [None, Some(50)] {
        let shape = shape(2, 3, 16, window);
        for text in [
            "{ method = \"xkv\", rank_k = 9, rank_v = 13 }",
            "{ method = \"xkv\", group = 1 }",
            "{ method = \"xkv\", rank_k = 1.0, rank_v = 6 }",
        ] {
            check_against_restored(&CacheSpec::parse(text).unwrap(), &shape, &resources(true), 3);
        }
    }
}

#[test]
fn long_prompts_are_attended_to_block_by_block() {
    let shape = shape(2, 3, 16, None);
    let mut rng = StdRng::seed_from_u64(44);
    for text in
        ["{ method = \"xkv\", rank_k = 9, rank_v = 25 }", "{ method = \"xkv\", rank_k = 1.0, rank_v = 3 }"]
    {
        let mut cache = empty(text, &shape, true);
        for tokens in [1300, 1, 70, 1] {
            let states = layers(&mut rng, &shape, tokens);
            let len = cache.len();
            let past = |l| reference(&shape, l, &cache.restored(l).unwrap(), len, &states[l], &[]);
            let want: Vec<Vec<f32>> = if len > 0 { (0..4).map(past).collect() } else { Vec::new() };
            let got = step(&mut *cache, &states);
            want.iter().zip(&got).for_each(|(want, got)| close(got, want, 1e-4, &format!("{text} at {len}")));
        }
    }
}

#[test]
fn the_factors_are_what_is_held() {
    let shape = shape(2, 2, 64, None);
    let mut cache = empty("{ method = \"xkv\", rank_k = 32, rank_v = 48 }", &shape, false);
    let mut rng = StdRng::seed_from_u64(42);
    step(&mut *cache, &layers(&mut rng, &shape, 640));
    let held = cache.footprint();
    // Z in f16, V^T in f16, and what pages cost beside them.
    let (z, v) = (640 * (32 + 48) * 2, 4 * shape.kv_dim() * (32 + 48) * 2);
    assert!(held.latents >= z && held.latents < z + z / 50, "{} of {z}", held.latents);
    assert!(held.state >= v && held.state < v + v / 20, "{} of {v}", held.state);
    assert_eq!(held.states + held.residual, 0);
    // A fork shares them, and each goes on by itself.
    let mut fork = cache.fork();
    let (one, other) = (layers(&mut rng, &shape, 1), layers(&mut rng, &shape, 1));
    step(&mut *cache, &one);
    step(&mut *fork, &other);
    assert_eq!(cache.restored(2).unwrap().keys[..640 * 128], fork.restored(2).unwrap().keys[..640 * 128]);
    assert_ne!(cache.restored(2).unwrap(), fork.restored(2).unwrap());
}

#[test]
fn a_prompt_that_factors_would_not_make_smaller_stays_exact() {
    let shape = shape(2, 2, 16, None);
    let mut rng = StdRng::seed_from_u64(43);
    // 12 (20 + 128) numbers are less than 20 x 128, 20 (20 + 128) are not.
    let mut cache = empty("{ method = \"xkv\", rank_k = 20, rank_v = 12, dtype = \"f32\" }", &shape, true);
    let prompt = layers(&mut rng, &shape, 20);
    step(&mut *cache, &prompt);
    let restored = cache.restored(1).unwrap();
    assert_eq!(restored.keys, prompt[1].k);
    assert_ne!(restored.values, prompt[1].v);
    let e = cache.truncate(10).unwrap_err();
    assert!(matches!(e, Error::Truncate { len: 10, .. }) && e.to_string().contains("factored"), "{e}");
    // Emptied, it takes the next step as its prompt.
    cache.truncate(0).unwrap();
    let long = layers(&mut rng, &shape, 80);
    step(&mut *cache, &long);
    assert_ne!(cache.restored(1).unwrap().keys, long[1].k);
}
