//! A basis of latents that nobody calibrated: maps of the right sizes, orthonormal as calibrated ones are.

use std::sync::Arc;

use minicache_core::latent::{Basis, Grouping, KeyBasis, LatentPlan, Span, ValueBasis};
use minicache_core::settings::{Group, LatentSide};
use minicache_core::{CacheSpec, ModelShape, Resources, Rotary};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Result;

/// Rotary embedding over the whole head, base 10,000.
struct Rope(usize);

impl Rope {
    fn turn(&self, position: usize, x: &mut [f32], back: f32) {
        let half = self.0 / 2;
        for j in 0..half {
            let angle = position as f32 * 10_000f32.powf(-(j as f32) / half as f32);
            let (sine, cosine) = (back * angle.sin(), angle.cos());
            (x[j], x[j + half]) = (x[j] * cosine - x[j + half] * sine, x[j] * sine + x[j + half] * cosine);
        }
    }
}

impl Rotary for Rope {
    fn angles_into(&self, position: usize, out: &mut [f32]) {
        let half = self.0 / 2;
        out[..half].fill(1.0);
        out[half..].fill(0.0);
        self.turn(position, out, 1.0);
    }
    fn rotate(&self, position: usize, x: &mut [f32]) {
        self.turn(position, x, 1.0);
    }
    fn unrotate(&self, position: usize, x: &mut [f32]) {
        self.turn(position, x, -1.0);
    }
    fn rotary_dim(&self) -> usize {
        self.0
    }
}

/// The reflection of complex vectors at a random one, `(m, m, 2)`; of real ones without the last axis.
fn reflection(rng: &mut ChaCha8Rng, m: usize, complex: bool) -> Vec<f32> {
    let part = |rng: &mut ChaCha8Rng, some: bool| if some { rng.random_range(-1.0f32..1.0) } else { 0.0 };
    let v: Vec<(f32, f32)> = (0..m).map(|_| (part(rng, true), part(rng, complex))).collect();
    let square: f32 = v.iter().map(|(re, im)| re * re + im * im).sum();
    let mut out = Vec::new();
    for (i, a) in v.iter().enumerate() {
        for (j, b) in v.iter().enumerate() {
            let unit = if i == j { 1.0 } else { 0.0 };
            out.push(unit - 2.0 * (a.0 * b.0 + a.1 * b.1) / square);
            if complex {
                out.push(-2.0 * (a.1 * b.0 - a.0 * b.1) / square);
            }
        }
    }
    out
}

fn keys(rng: &mut ChaCha8Rng, span: Span, dim: usize) -> KeyBasis {
    let (m, half) = (span.members(), dim / 2);
    KeyBasis {
        span,
        mean: (0..m * dim).map(|_| rng.random_range(-0.5..0.5)).collect(),
        weights: (0..m * half).map(|_| rng.random_range(0.5..2.0)).collect(),
        vectors: (0..half).flat_map(|_| reflection(rng, m, true)).collect(),
        variances: (0..half).flat_map(|j| (0..m).map(move |i| 2.0 / (1 + i * half + j) as f32)).collect(),
    }
}

fn values(rng: &mut ChaCha8Rng, span: Span, dim: usize) -> ValueBasis {
    let n = span.members() * dim;
    let (mut weights, mut inverse) = (vec![0.0; n * dim], vec![0.0; n * dim]);
    for i in 0..n {
        let weight: f32 = rng.random_range(0.5..2.0);
        (weights[i * dim + i % dim], inverse[i * dim + i % dim]) = (weight, 1.0 / weight);
    }
    ValueBasis {
        span,
        mean: (0..n).map(|_| rng.random_range(-0.5..0.5)).collect(),
        weights,
        inverse,
        vectors: reflection(rng, n, false),
        variances: (0..n).map(|i| 1.0 / (1 + i) as f32).collect(),
    }
}

/// What a cache of `spec` needs beside the shape: of latents a plan with made-up maps. `rotary`: the model's, over whole
/// heads; one of base 10,000 where there is none.
///
/// # Errors
/// Settings that only a calibrated basis decides.
pub fn resources(spec: &CacheSpec, shape: &ModelShape, rotary: Option<Arc<dyn Rotary>>) -> Result<Resources> {
    let CacheSpec::Latent(latent) = spec else { return Ok(Resources::default()) };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let grouping = |side: &LatentSide| {
        let Group::Layers(layers) = side.group else { return Grouping { layers: 1, heads: 1 } };
        Grouping { layers, heads: side.heads.of(shape.kv_heads) }
    };
    let (k, v) = (grouping(&latent.k), grouping(&latent.v));
    let key_spans = k.spans(shape.layers, shape.kv_heads).map(|span| keys(&mut rng, span, shape.head_dim));
    let key_spans = key_spans.collect();
    let value_spans =
        v.spans(shape.layers, shape.kv_heads).map(|span| values(&mut rng, span, shape.head_dim));
    let basis = Basis { keys: vec![(k, key_spans)], values: vec![(v, value_spans.collect())] };
    let rotary = rotary.unwrap_or_else(|| Arc::new(Rope(shape.head_dim)));
    let plan = LatentPlan::new(latent, shape, &basis, rotary.clone())?;
    Ok(Resources { rotary: Some(rotary), latent: Some(Arc::new(plan)) })
}
