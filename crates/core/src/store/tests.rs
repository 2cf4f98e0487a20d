#![allow(clippy::unwrap_used)]

use crate::settings::Axis;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::kernels::{Isa, with_isa};

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let axis = prop_oneof![Just(Axis::Channel), Just(Axis::Token)];
    let bits = prop_oneof![Just(2_u8), Just(3), Just(4), Just(8)].boxed();
    let group = prop_oneof![Just(16_usize), Just(32), Just(64), Just(128)];
    prop_oneof![
        1 => Just(Scheme::F32),
        1 => Just(Scheme::F16),
        1 => Just(Scheme::F8),
        2 => Just(Scheme::Sections),
        6 => (bits, group, axis, 0_usize..70)
            .prop_map(|(bits, group, axis, residual)| Scheme::Quant { bits, group, axis, residual }),
    ]
}

/// Sections of some of `bits` that make up `dim`, in an order and of sizes that depend on `seed`.
fn sections(dim: usize, seed: u64, bits: &[u8]) -> Vec<(u8, usize)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut out = Vec::new();
    let mut left = dim;
    while left > 0 {
        let multiples = rng.random_bool(0.7);
        let count = if multiples { 16 * rng.random_range(1..4) } else { rng.random_range(1..50) }.min(left);
        out.push((bits[rng.random_range(0..bits.len())], count));
        left -= count;
    }
    out
}

/// A weighted sum in f64, and the root of the sum of its squared terms: what rounding errors are relative to.
fn weighted<'a>(w: impl Iterator<Item = &'a f32>, x: impl Iterator<Item = &'a f32>) -> (f64, f64) {
    let terms = w.zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
    let (sum, squares) = terms.fold((0.0, 0.0), |(sum, squares), term| (sum + term, squares + term * term));
    (sum, squares.sqrt())
}

/// Largest error of `got`, less `start`, relative to the largest scale of `expected`.
fn error(got: &[f32], start: f32, expected: &[(f64, f64)]) -> f64 {
    let scale = expected.iter().map(|e| e.1).fold(1e-3, f64::max);
    let errors = got.iter().zip(expected).map(|(&got, e)| (f64::from(got - start) - e.0).abs());
    errors.fold(0.0, |most, error| if error <= most { most } else { error }) / scale
}

/// Scores and sums on every instruction set against the vectors that `read` gives.
fn check(store: &Store, range: Range<usize>, rows: usize, seed: u64) {
    // Sums of centred codes are differences of two sums, each of terms up to twice as large, of n terms in f32: each
    // rounds by n units of 2^-24 at most.
    let terms = range.len().max(store.dim()) as f64;
    let exact =
        if store.scheme() == Scheme::Sections { 1e-5 + 4.0 * terms / f64::from(1 << 24) } else { 1e-5 };
    check_to(&store.clone().with_precision(Precision::Exact), range.clone(), rows, seed, exact);
    check_to(&store.clone().with_precision(Precision::Fast), range.clone(), rows, seed, 5e-4);
    check_to(&store.clone().with_precision(Precision::Coarse), range, rows, seed, 0.1);
}

fn check_to(store: &Store, range: Range<usize>, rows: usize, seed: u64, tolerance: f64) {
    let (dim, n) = (store.dim(), range.len());
    let q = random(rows * dim, seed);
    let p: Vec<f32> = random(rows * n, seed + 1).iter().map(|x| x.abs()).collect();
    let head = seed as usize % store.heads();
    let mut x = vec![0.0; n * dim];
    for (i, x) in range.clone().zip(x.chunks_exact_mut(dim)) {
        store.read(head, i, x);
    }
    let mut scores = Vec::new();
    let mut sums = Vec::new();
    for row in 0..rows {
        let (q, p) = (&q[row * dim..(row + 1) * dim], &p[row * n..(row + 1) * n]);
        scores.extend((0..n).map(|i| weighted(q.iter(), x[i * dim..].iter())));
        sums.extend((0..dim).map(|c| weighted(p.iter(), x.iter().skip(c).step_by(dim))));
    }
    for isa in Isa::available() {
        let mut got = vec![f32::NAN; rows * n];
        with_isa(isa, || store.scores(head, range.clone(), &q, rows, &mut got));
        assert!(error(&got, 0.0, &scores) < tolerance, "scores, {isa:?}: {}", error(&got, 0.0, &scores));
        let mut got = vec![1.0; rows * dim];
        with_isa(isa, || store.accumulate(head, range.clone(), &p, rows, &mut got));
        assert!(error(&got, 1.0, &sums) < tolerance, "sums, {isa:?}: {}", error(&got, 1.0, &sums));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn scores_and_sums_equal_those_of_the_restored_vectors(
        scheme in schemes(),
        keys in any::<bool>(),
        heads in 1_usize..4,
        dim in prop_oneof![Just(8_usize), Just(20), Just(64), Just(80), Just(96), Just(128), 1_usize..140],
        tokens in 1_usize..300,
        cut in (0.0..1.0_f64, 0.0..1.0_f64),
        rows in 1_usize..10,
        seed in 0_u64..1000,
    ) {
        let side = if keys { Side::Keys } else { Side::Values };
        let empty = match scheme {
            Scheme::Sections if seed % 3 == 0 => {
                let tables = (1..=4).map(|bits| lloyd::levels(bits, 64)).collect();
                Store::levels(heads, &sections(dim, seed, &[1, 2, 3, 4]), side, tables)
            }
            Scheme::Sections if seed % 3 == 1 => Store::trellis(&sections(dim, seed, &[1, 2, 3, 4, 8]), side),
            Scheme::Sections => Store::sections(&sections(dim, seed, &[2, 3, 4, 8]), side),
            _ => Store::new(heads, dim, scheme, side),
        };
        let heads = empty.heads();
        let mut store = empty.clone();
        let x = random(tokens * heads * dim, seed);
        // Pushed in unequal chunks: the result must not depend on how.
        let at = (tokens as f64 * cut.0) as usize * heads * dim;
        store.push(&x[..at]);
        store.push(&x[at..]);
        let mut whole = empty;
        whole.push(&x);
        let (mut a, mut b) = (vec![0.0; dim], vec![0.0; dim]);
        for i in 0..tokens {
            store.read(heads - 1, i, &mut a);
            whole.read(heads - 1, i, &mut b);
            prop_assert_eq!(&a, &b);
        }
        prop_assert_eq!(store.bytes(), whole.bytes());
        let (low, high) = (cut.0.min(cut.1), cut.0.max(cut.1));
        let range = (low * tokens as f64) as usize..(high * tokens as f64).ceil() as usize;
        check(&store, range, rows, seed);
        check(&store, 0..tokens, rows, seed);
    }

    #[test]
    fn normal_numbers_lose_what_a_quantiser_of_normal_numbers_loses(seed in 0_u64..1000, keys in any::<bool>()) {
        let side = if keys { Side::Keys } else { Side::Values };
        let trellis = seed % 2 == 0;
        let sections = sections(400, seed, if trellis { &[1, 2, 3, 4, 8] } else { &[2, 3, 4, 8] });
        let mut store =
            if trellis { Store::trellis(&sections, side) } else { Store::sections(&sections, side) };
        let mut rng = StdRng::seed_from_u64(seed);
        // A sum of twelve uniform numbers is near normal.
        let scale = 10_f32.powf(rng.random_range(-3.0..3.0));
        let normal = |rng: &mut StdRng| scale * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0);
        let x: Vec<f32> = (0..20 * 400).map(|_| normal(&mut rng)).collect();
        store.push(&x);
        let mut at = 0;
        for (bits, count) in sections {
            let table = trellis::levels(bits).filter(|_| trellis);
            let expected =
                table.map_or_else(|| normal::UNIFORM.iter().find(|u| u.0 == bits).unwrap().2, |t| t.error);
            let (mut error, mut square) = (0.0, 0.0);
            let mut out = vec![0.0; 400];
            for (token, x) in x.chunks_exact(400).enumerate() {
                store.read(0, token, &mut out);
                for i in at..at + count {
                    error += (out[i] - x[i]).powi(2);
                    square += x[i].powi(2);
                }
            }
            at += count;
            // Few numbers scatter, and the root mean square of few is their own.
            if count >= 16 {
                prop_assert!(error / square < 2.5 * expected, "{bits} bits: {}", error / square);
            }
        }
    }

    #[test]
    fn quantised_vectors_are_within_half_a_step(
        bits in prop_oneof![Just(2_u8), Just(3), Just(4), Just(8)],
        channel in any::<bool>(),
        residual in 0_usize..40,
        dim in prop_oneof![Just(8_usize), Just(64), Just(80)],
        tokens in 1_usize..150,
        seed in 0_u64..1000,
    ) {
        let axis = if channel { Axis::Channel } else { Axis::Token };
        let group = 32;
        let mut store = Store::new(2, dim, Scheme::Quant { bits, group, axis, residual }, Side::Keys);
        let x = random(tokens * 2 * dim, seed);
        store.push(&x);
        let waiting = tokens - store.packed;
        match axis {
            Axis::Channel => prop_assert!(waiting < residual + group && (store.packed == 0 || waiting >= residual)),
            Axis::Token => prop_assert_eq!(waiting, tokens.min(residual)),
        }
        let at = |head: usize, i: usize, c: usize| x[(i * 2 + head) * dim + c];
        let mut got = vec![0.0; dim];
        for head in 0..2 {
            for i in 0..tokens {
                store.read(head, i, &mut got);
                for (c, &got) in got.iter().enumerate() {
                    let group: Vec<f32> = match axis {
                        Axis::Channel => (i / group * group..tokens.min((i / group + 1) * group))
                            .map(|i| at(head, i, c)).collect(),
                        Axis::Token => (c / group * group..dim.min((c / group + 1) * group))
                            .map(|c| at(head, i, c)).collect(),
                    };
                    let low = group.iter().copied().fold(f32::INFINITY, f32::min);
                    let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let step = (high - low) / ((1 << bits) - 1) as f32;
                    // f16 rounding of the state, the zero and (times the largest code) the scale.
                    let slack = 3e-3 + (high - low) * 6e-4;
                    let allowed = if i < store.packed { step / 2.0 + slack } else { 1e-3 };
                    prop_assert!((got - at(head, i, c)).abs() <= allowed, "{} {}", got, at(head, i, c));
                }
            }
        }
    }
}

#[test]
fn a_fork_is_independent() {
    for scheme in [
        Scheme::F16,
        Scheme::F8,
        Scheme::Quant { bits: 3, group: 32, axis: Axis::Channel, residual: 5 },
        Scheme::Quant { bits: 2, group: 32, axis: Axis::Token, residual: 5 },
    ] {
        let mut a = Store::new(2, 24, scheme, Side::Values);
        a.push(&random(45 * 48, 1));
        let mut b = a.clone();
        let (more_a, more_b) = (random(60 * 48, 2), random(60 * 48, 3));
        a.push(&more_a);
        b.push(&more_b);
        for (store, more) in [(&a, &more_a), (&b, &more_b)] {
            let mut whole = Store::new(2, 24, scheme, Side::Values);
            whole.push(&random(45 * 48, 1));
            whole.push(more);
            let (mut x, mut y) = (vec![0.0; 24], vec![0.0; 24]);
            for i in 0..105 {
                store.read(1, i, &mut x);
                whole.read(1, i, &mut y);
                assert_eq!(x, y, "{scheme:?} {i}");
            }
        }
    }
}

#[test]
fn what_a_window_leaves_behind_is_freed_and_the_rest_stays() {
    for scheme in [Scheme::F16, Scheme::Quant { bits: 4, group: 32, axis: Axis::Token, residual: 16 }] {
        let (heads, dim) = (2, 64);
        let mut store = Store::new(heads, dim, scheme, Side::Keys);
        let x = random(1500 * heads * dim, 7);
        let mut most = 0;
        for (i, row) in x.chunks_exact(heads * dim).enumerate() {
            store.push(row);
            store.drop_before((i + 1).saturating_sub(300));
            assert!(store.start() <= (i + 1).saturating_sub(300));
            most = most.max(store.len() - store.start());
        }
        assert!(most <= 300 + 256, "{most}");
        assert_eq!(store.len(), 1500);
        check(&store, 1200..1500, 3, 1);
    }
}

#[test]
fn odd_numbers_do_no_harm() {
    let scheme = Scheme::Quant { bits: 4, group: 32, axis: Axis::Token, residual: 0 };
    let mut store = Store::new(1, 32, scheme, Side::Values);
    store.push(&[0.0; 32]);
    store.push(&[1e9; 32]);
    store.push(&[1e-12; 32]);
    store.push(&(0..32).map(|i| if i == 3 { -1e9 } else { 1e9 }).collect::<Vec<_>>());
    let mut x = [0.0; 32];
    let mut last = |i| {
        store.read(0, i, &mut x);
        x
    };
    assert_eq!(last(0), [0.0; 32]);
    assert_eq!(last(1), [65504.0; 32]);
    assert!(last(3).iter().all(|x| x.is_finite()));
    let mut out = [0.0; 32];
    for isa in Isa::available() {
        with_isa(isa, || store.accumulate(0, 0..3, &[0.0, 0.0, 0.0], 1, &mut out));
        assert_eq!(out, [0.0; 32]);
        with_isa(isa, || store.accumulate(0, 0..3, &[1e-38, 0.0, 1e-38], 1, &mut out));
        assert!(out.iter().all(|x| x.abs() < 1e-30));
    }
}
