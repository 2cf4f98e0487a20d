//! Expected attention (Devoto et al. 2025, arXiv 2510.00636; kvpress' ExpectedAttentionPress): of the prompt, each KV
//! head keeps the tokens that queries to come are expected to give most weight to; all tokens after the prompt are kept.
//!
//! Queries before RoPE are taken as normal with the mean m and the covariance C of the prompt's own. Those of the next
//! `future` positions are then normal with the mean R m and the covariance R C R^T, R being the rotation averaged over
//! these positions, and the weight of a key k is expected to be exp(s <R m, k> + s^2/2 k^T R C R^T k), with s the scale of
//! scores. These are divided by their sum over the prompt, averaged over the query heads of the KV head, and multiplied
//! by the norm of the value. The first tokens, outliers in most models, are always kept and are left out of all of it.
//!
//! As in kvpress, but for the models: it leaves those out that normalise queries, because it makes queries from weights,
//! where this takes the queries themselves and rotates them back. Capped scores are taken as if they were not. A prompt
//! is the first step, so it has to come in one.

use std::sync::Arc;

use super::{Method, evicting_method};
use crate::account::{Nominal, nominal_kept};
use crate::cache::KvCache;
use crate::dense::{View, add_product, mul_transposed};
use crate::evicting::{Evict, Held, drop_least, evicting};
use crate::kernels::loops::{exp_sum, largest};
use crate::settings::bounds::{MOST_TOKENS, check_number};
use crate::settings::{Budget, Checked, ModelShape, StoreType};
use crate::{Resources, Result, Rotary};

/// Prompt tokens that queries to come are expected to look at.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ExpectedAttention {
    /// The storage type.
    pub dtype: StoreType,
    /// Tokens of the prompt kept, the first ones among them.
    pub kept: Budget,
    /// First tokens always kept.
    pub sinks: usize,
    /// Positions after the prompt whose queries are expected.
    pub future: usize,
}

impl Default for ExpectedAttention {
    /// What kvpress has, but for the share kept.
    fn default() -> Self {
        Self { dtype: StoreType::F16, kept: Budget::Fraction(0.2), sinks: 4, future: 512 }
    }
}

impl ExpectedAttention {
    pub(super) const ABOUT: &'static str =
        "prompt tokens that later queries are expected to attend to; later tokens are kept (kvpress)";
}

impl Method for ExpectedAttention {
    evicting_method!("expected_attention", by_attention);

    fn validate(&self) -> Checked {
        self.kept.validate("kept")?;
        check_number("sinks", self.sinks, 0..=MOST_TOKENS)?;
        check_number("future", self.future, 1..=MOST_TOKENS)
    }

    /// Without a rotary embedding among the resources, queries are taken as those of a model that rotates none.
    fn build(&self, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
        let expecting = Expecting { settings: self.clone(), rotary: resources.rotary.clone() };
        Ok(evicting(shape, self.dtype, expecting))
    }

    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let sinks = self.sinks.min(context);
        let others = self.kept.resolve(context).saturating_sub(sinks);
        Some(nominal_kept(self.dtype, [(sinks, "first tokens"), (others, "others")], shape, context))
    }
}

#[derive(Clone)]
struct Expecting {
    settings: ExpectedAttention,
    rotary: Option<Arc<dyn Rotary>>,
}

impl Evict for Expecting {
    fn keep(&self, held: &Held<'_>, keep: &mut [bool]) {
        let (sinks, kept) = (self.settings.sinks, self.settings.kept.resolve(held.seen()));
        if held.len > 0 || held.seen() <= kept.max(sinks) {
            return;
        }
        let scores = self.scores(held);
        let others = (sinks..held.seen()).collect();
        drop_least(others, kept.saturating_sub(sinks), held, |i| scores[i - sinks], keep);
    }
}

impl Expecting {
    /// The score of each token of the prompt after the first ones.
    fn scores(&self, held: &Held<'_>) -> Vec<f32> {
        let (shape, head, sinks) = (held.shape, held.head, self.settings.sinks);
        let (dim, group, tokens) = (shape.head_dim, shape.group(), held.seen() - sinks);
        let of = |x: &'_ [f32], heads: usize, head: usize| -> Vec<f32> {
            let rows = x.chunks_exact(heads * dim).skip(sinks);
            rows.flat_map(|row| row[head * dim..(head + 1) * dim].iter().copied()).collect()
        };
        let keys = of(held.states.k, shape.kv_heads, head);
        let mut total = vec![0.0; tokens];
        let average = self.average_rotation(held.seen());
        for query_head in head * group..(head + 1) * group {
            // Of states that came without queries nothing is expected.
            let mut queries = of(held.states.q, shape.heads, query_head);
            if let Some(rotary) = &self.rotary {
                let rows = queries.chunks_exact_mut(dim).enumerate();
                rows.for_each(|(i, q)| rotary.unrotate(sinks + i, q));
            }
            let mut scores = expected_scores(&queries, &keys, &average, dim, shape.scale);
            let top = largest(&scores);
            let sum = exp_sum(&mut scores, top) * group as f32;
            total.iter_mut().zip(&scores).for_each(|(total, s)| *total += s / sum);
        }
        for (score, value) in total.iter_mut().zip(of(held.states.v, shape.kv_heads, head).chunks_exact(dim)) {
            *score *= value.iter().map(|x| x * x).sum::<f32>().sqrt();
        }
        total
    }

    /// Cosines and sines of the rotations of the positions from `first` on, averaged; nothing where there are none.
    fn average_rotation(&self, first: usize) -> Vec<f32> {
        let positions = first..first + self.settings.future;
        self.rotary.as_ref().map_or_else(Vec::new, |rotary| rotary.mean_angles(positions))
    }
}

/// The logarithm of what each of `keys (tokens, dim)` is expected to weigh, for queries like `queries (n, dim)`, not
/// rotated, after the rotation `average` (cosines, then sines).
fn expected_scores(queries: &[f32], keys: &[f32], average: &[f32], dim: usize, scale: f32) -> Vec<f32> {
    let (count, tokens) = (queries.len() / dim, keys.len() / dim);
    let mut mean = vec![0.0; dim];
    for q in queries.chunks_exact(dim) {
        mean.iter_mut().zip(q).for_each(|(m, q)| *m += q / count as f32);
    }
    // <R m, k> = <m, R^T k>, and k^T R C R^T k likewise: keys are rotated instead.
    let half = average.len() / 2;
    let mut turned = keys.to_vec();
    for key in turned.chunks_exact_mut(dim) {
        for j in 0..half {
            let (cos, sin) = (average[j], average[j + half]);
            (key[j], key[j + half]) = (cos * key[j] + sin * key[j + half], cos * key[j + half] - sin * key[j]);
        }
    }
    let mut centred = queries.to_vec();
    centred.chunks_exact_mut(dim).for_each(|q| q.iter_mut().zip(&mean).for_each(|(q, m)| *q -= m));
    // C = Q^T Q / n, by Q^T as rows.
    let columns: Vec<f32> = (0..dim * count).map(|i| centred[i % count.max(1) * dim + i / count.max(1)]).collect();
    let mut covariance = vec![0.0; dim * dim];
    add_product(&columns, dim, View::new(&centred, count, dim, dim), &mut covariance, dim);
    let mut mapped = vec![0.0; tokens * dim];
    let rows = |x| View::new(x, dim, dim, dim);
    mul_transposed(View::new(&turned, tokens, dim, dim), rows(&covariance), &mut mapped);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let spread = 0.5 * scale * scale / count.max(1) as f32;
    let rows = turned.chunks_exact(dim).zip(mapped.chunks_exact(dim));
    rows.map(|(key, mapped)| scale * dot(&mean, key) + spread * dot(key, mapped)).collect()
}
