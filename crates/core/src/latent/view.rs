//! Latents as attention reads them: scores and sums on the coefficients.

use std::ops::Range;

use super::plan::{Plan, Set};
use super::transform::{KeyTransform, ValueTransform};
use crate::kernels::{Sums, Weights, total};
use crate::scratch::with_buffer;
use crate::store::Store;

/// One layer's keys in the latents of its group.
#[derive(Clone, Copy)]
pub(crate) struct LatentKeys<'a> {
    pub(super) plan: &'a Plan<KeyTransform>,
    /// Of the group.
    pub(super) layer: usize,
    /// Of each set of heads.
    pub(super) stores: &'a [Store],
}

/// One layer's values in the latents of its group.
#[derive(Clone, Copy)]
pub(crate) struct LatentValues<'a> {
    pub(super) plan: &'a Plan<ValueTransform>,
    /// Of the group.
    pub(super) layer: usize,
    /// Of each set of heads.
    pub(super) stores: &'a [Store],
}

/// KV heads that one call had better serve: those that share latents.
fn together<T>(plan: &Plan<T>) -> usize {
    if plan.sets.iter().all(|s| s.heads.len() == 1) {
        return 1;
    }
    plan.sets.iter().map(|s| s.heads.len()).sum()
}

/// Numbers of the longest latent.
fn rank<T>(plan: &Plan<T>) -> usize {
    plan.sets.iter().map(|s| s.coding.rank()).max().unwrap_or(0)
}

/// The stores that `rows` rows, spread evenly over `heads`, have to do with, each with its rows.
fn parts<'a, T>(
    sets: &'a [Set<T>],
    stores: &'a [Store],
    heads: Range<usize>,
    rows: usize,
) -> impl Iterator<Item = (&'a Store, Range<usize>)> {
    let per_head = rows / heads.len();
    sets.iter().zip(stores).filter_map(move |(set, store)| {
        let met = set.heads.start.max(heads.start)..set.heads.end.min(heads.end);
        let row = |head: usize| head.saturating_sub(heads.start) * per_head;
        (!met.is_empty()).then(|| (store, row(met.start)..row(met.end)))
    })
}

impl LatentKeys<'_> {
    pub(crate) fn together(&self) -> usize {
        together(self.plan)
    }

    /// A mapped query is the query itself (for exact tokens), its part for the mean, and its part for the latents.
    pub(crate) fn query_dim(&self, head_dim: usize) -> usize {
        2 * head_dim + rank(self.plan)
    }

    pub(crate) fn map_queries(&self, heads: Range<usize>, dim: usize, q: &[f32], out: &mut [f32]) {
        let per_head = q.len() / dim / heads.len();
        let width = self.query_dim(dim);
        let groups = q.chunks_exact(per_head * dim).zip(out.chunks_exact_mut(per_head * width));
        for (head, (q, out)) in heads.zip(groups) {
            let transform = &self.plan.sets[self.plan.set_of(head)].transform;
            for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(width)) {
                let (exact, rest) = out.split_at_mut(dim);
                exact.copy_from_slice(q);
                transform.map_mean(self.layer, head, q, &mut rest[..dim]);
                rest[dim..].fill(0.0);
            }
            transform.map_queries(self.layer, head, q, &mut out[2 * dim..], width);
        }
    }

    /// Adds the scores of mapped queries against the latents `range` and their means.
    pub(crate) fn scores(&self, heads: Range<usize>, dim: usize, range: Range<usize>, q: Weights, out: Sums) {
        let Sums { y, stride } = out;
        let mut add = |store: &Store, rows: &Range<usize>, from: usize| {
            let w = Weights { w: &q.w[rows.start * q.stride + from..], rows: rows.len(), ..q };
            store.add_scores(0, range.clone(), w, Sums { y: &mut y[rows.start * stride..], stride });
        };
        for (store, rows) in parts(&self.plan.sets, self.stores, heads, q.rows) {
            self.plan.sets[0].transform.phases.read(|table| add(table, &rows, dim));
            add(store, &rows, 2 * dim);
        }
    }

    pub(crate) fn read(&self, head: usize, position: usize, index: usize, out: &mut [f32]) {
        let set = self.plan.set_of(head);
        with_buffer(self.stores[set].dim(), |z| {
            self.stores[set].read(0, index, z);
            self.plan.sets[set].transform.decode(self.layer, head, position, z, out);
        });
    }
}

impl LatentValues<'_> {
    pub(crate) fn together(&self) -> usize {
        together(self.plan)
    }

    /// A sum is that of exact values, then the weight that the latents have together, then that of the latents.
    pub(crate) fn sum_dim(&self, head_dim: usize) -> usize {
        head_dim + 1 + rank(self.plan)
    }

    /// Adds the latents `range`, weighed by `p`, and the weight that they have together.
    pub(crate) fn accumulate(
        &self,
        heads: Range<usize>,
        dim: usize,
        range: Range<usize>,
        p: Weights,
        out: Sums,
    ) {
        let Sums { y, stride } = out;
        for (store, rows) in parts(&self.plan.sets, self.stores, heads, p.rows) {
            let w = Weights { w: &p.w[rows.start * p.stride..], rows: rows.len(), ..p };
            let to = Sums { y: &mut y[rows.start * stride + dim + 1..], stride };
            store.add_sums(0, range.clone(), w, to);
            for row in rows {
                y[row * stride + dim] += total(&p.w[row * p.stride..][..range.len()]);
            }
        }
    }

    pub(crate) fn map_sums(&self, head: usize, dim: usize, sums: &[f32], rows: usize, out: &mut [f32]) {
        let stride = self.sum_dim(dim);
        for (sum, out) in sums.chunks_exact(stride).zip(out.chunks_exact_mut(dim)) {
            out.copy_from_slice(&sum[..dim]);
        }
        let transform = &self.plan.sets[self.plan.set_of(head)].transform;
        transform.decode(self.layer, head, &sums[dim..], stride, rows, out);
    }

    pub(crate) fn read(&self, head: usize, index: usize, out: &mut [f32]) {
        let set = self.plan.set_of(head);
        let stride = 1 + self.stores[set].dim();
        out.fill(0.0);
        with_buffer(stride, |sum| {
            sum[0] = 1.0;
            self.stores[set].read(0, index, &mut sum[1..]);
            self.plan.sets[set].transform.decode(self.layer, head, sum, stride, 1, out);
        });
    }
}
