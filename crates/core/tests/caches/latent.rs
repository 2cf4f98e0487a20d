//! A random basis for latent caches, without a model.

use std::sync::Arc;

use minicache_core::latent::{Basis, Grouping, KeyBasis, LatentPlan, ValueBasis};
use minicache_core::settings::{Group, LatentSide};
use minicache_core::{CacheSpec, ModelShape, Rotary};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Plain RoPE.
pub(super) struct Rope(pub(super) usize);

impl Rope {
    fn turn(&self, angle: f32, x: &mut [f32]) {
        let half = self.0 / 2;
        for j in 0..half {
            let (s, c) = (angle * 10000f32.powf(-(j as f32) / half as f32)).sin_cos();
            (x[j], x[j + half]) = (x[j] * c - x[j + half] * s, x[j] * s + x[j + half] * c);
        }
    }
}

impl Rotary for Rope {
    fn angles_into(&self, position: usize, out: &mut [f32]) {
        out[..self.0 / 2].fill(1.0);
        out[self.0 / 2..].fill(0.0);
        self.turn(position as f32, out);
    }
    fn rotate(&self, position: usize, x: &mut [f32]) {
        self.turn(position as f32, x);
    }
    fn unrotate(&self, position: usize, x: &mut [f32]) {
        self.turn(-(position as f32), x);
    }
    fn rotary_dim(&self) -> usize {
        self.0
    }
}

/// Columns of a random unitary matrix `(n, n, 2)` by Gram-Schmidt; real if `real`.
fn unitary(rng: &mut StdRng, n: usize, real: bool) -> Vec<f32> {
    let mut columns: Vec<Vec<[f64; 2]>> = Vec::new();
    while columns.len() < n {
        let mut c: Vec<[f64; 2]> = (0..n)
            .map(|_| [rng.random_range(-1.0..1.0), if real { 0.0 } else { rng.random_range(-1.0..1.0) }])
            .collect();
        for other in &columns {
            let (mut re, mut im) = (0.0, 0.0);
            for (a, b) in other.iter().zip(&c) {
                re += a[0] * b[0] + a[1] * b[1];
                im += a[0] * b[1] - a[1] * b[0];
            }
            for (a, b) in other.iter().zip(&mut c) {
                *b = [b[0] - re * a[0] + im * a[1], b[1] - re * a[1] - im * a[0]];
            }
        }
        let norm = c.iter().map(|x| x[0] * x[0] + x[1] * x[1]).sum::<f64>().sqrt();
        c.iter_mut().for_each(|x| *x = [x[0] / norm, x[1] / norm]);
        columns.push(c);
    }
    (0..n * n * 2).map(|i| columns[i / 2 % n][i / 2 / n][i % 2] as f32).collect()
}

/// A basis with random directions, means, weights and falling variances, for the groupings `key` and `value`.
fn random_basis(rng: &mut StdRng, shape: &ModelShape, key: Grouping, value: Grouping) -> Basis {
    let half = shape.head_dim / 2;
    let spans = |grouping: Grouping| grouping.spans(shape.layers, shape.kv_heads);
    let keys = spans(key).map(|span| {
        let m = span.members();
        KeyBasis {
            span,
            mean: (0..m * shape.head_dim).map(|_| rng.random_range(-1.0..1.0)).collect(),
            weights: (0..m * half).map(|_| rng.random_range(0.5..2.0)).collect(),
            vectors: (0..half).flat_map(|_| unitary(rng, m, false)).collect(),
            variances: (0..half * m).map(|i| 2.0 / (1.0 + (i % m) as f32)).collect(),
        }
    });
    let keys = vec![(key, keys.collect())];
    let values = spans(value).map(|span| {
        let n = span.members() * shape.head_dim;
        // Symmetric and well-conditioned: I + 0.5 u u^T has the inverse I - 0.5 / (1 + 0.5) u u^T for a unit u.
        let dim = shape.head_dim;
        let units: Vec<Vec<f32>> = (0..span.members())
            .map(|_| {
                let u: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
                let norm = u.iter().map(|x| x * x).sum::<f32>().sqrt();
                u.iter().map(|x| x / norm).collect()
            })
            .collect();
        let matrices = |factor: f32| -> Vec<f32> {
            let entry = |u: &[f32], i: usize| {
                f32::from(u8::from(i / dim == i % dim)) + factor * u[i / dim] * u[i % dim]
            };
            units.iter().flat_map(|u| (0..dim * dim).map(move |i| entry(u, i))).collect()
        };
        ValueBasis {
            span,
            mean: (0..n).map(|_| rng.random_range(-1.0..1.0)).collect(),
            weights: matrices(0.5),
            inverse: matrices(-0.5 / 1.5),
            vectors: unitary(rng, n, true).chunks_exact(2).map(|c| c[0]).collect(),
            variances: (0..n).map(|i| 1.0 / (1.0 + i as f32 * 0.1)).collect(),
        }
    });
    Basis { keys, values: vec![(value, values.collect())] }
}

pub(super) fn plan(text: &str, shape: &ModelShape) -> Arc<LatentPlan> {
    let mut rng = StdRng::seed_from_u64(7);
    let CacheSpec::Latent(spec) = CacheSpec::parse(text).unwrap() else { panic!("{text}") };
    let grouping = |side: &LatentSide| {
        let Group::Layers(layers) = side.group else { panic!("{text}: no number of layers") };
        Grouping { layers, heads: side.heads.of(shape.kv_heads) }
    };
    let basis = random_basis(&mut rng, shape, grouping(&spec.k), grouping(&spec.v));
    Arc::new(LatentPlan::new(&spec, shape, &basis, Arc::new(Rope(shape.head_dim))).unwrap())
}
