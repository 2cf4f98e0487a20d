//! The latent cache: see the module's page for the mathematics.

use std::ops::Range;
use std::sync::Arc;

use crate::settings::ModelShape;

use super::coded::Coded;
use super::plan::{LatentPlan, Plan, group_of};
use super::transform::{KeyTransform, ValueTransform};
use crate::attend::{Past, Step, attend};
use crate::cache::{KvCache, Restored, check_truncate};
use crate::kernels::{Sums, Weights, total};
use crate::lane::{Keys, Values};
use crate::layered::{GONE, check_layer, check_states, check_step, first_visible};
use crate::scratch::with_buffer;
use crate::store::{Side, Store};
use crate::{Footprint, Result};

/// See the module.
pub(crate) struct LatentCache {
    plan: Arc<LatentPlan>,
    keys: Vec<Coded>,
    values: Vec<Coded>,
    len: usize,
    step: usize,
}

impl LatentCache {
    pub(crate) fn new(plan: Arc<LatentPlan>) -> Self {
        let (spec, shape) = (&plan.spec, &plan.shape);
        let keys = plan.keys.iter().map(|p| Coded::new(p, Side::Keys, spec, shape)).collect();
        let values = plan.values.iter().map(|p| Coded::new(p, Side::Values, spec, shape)).collect();
        Self { keys, values, plan, len: 0, step: 0 }
    }

    fn view(&self, layer: usize) -> (View<'_, KeyTransform>, View<'_, ValueTransform>) {
        let shape = &self.plan.shape;
        (
            View::new(shape, &self.plan.keys, &self.keys, layer),
            View::new(shape, &self.plan.values, &self.values, layer),
        )
    }

    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) {
        let exact = (self.plan.spec.sinks, self.plan.spec.residual);
        let kv_dim = self.plan.shape.kv_dim();
        let g = group_of(&self.plan.keys, layer);
        let plan = &self.plan.keys[g];
        self.keys[g].push(layer - plan.first, k, exact, |set, rows, first, z| {
            plan.sets[set].transform.encode(rows, kv_dim, first, z);
        });
        let g = group_of(&self.plan.values, layer);
        let plan = &self.plan.values[g];
        self.values[g].push(layer - plan.first, v, exact, |set, rows, _, z| {
            plan.sets[set].transform.encode(rows, kv_dim, z);
        });
    }

    fn first_visible(&self) -> usize {
        first_visible(&self.plan.shape, self.len)
    }
}

/// One layer's side, as attention reads it.
struct View<'a, T> {
    shape: &'a ModelShape,
    layer: usize,
    plan: &'a Plan<T>,
    states: &'a Coded,
}

/// Some rows of a call and where they find their states.
struct Part<'a> {
    store: &'a Store,
    /// The KV head in the store.
    head: usize,
    rows: Range<usize>,
    /// Indices in the store, and the column of the first in the range asked for.
    range: Range<usize>,
    column: usize,
}

impl<'a, T> View<'a, T> {
    fn new(shape: &'a ModelShape, plans: &'a [Plan<T>], states: &'a [Coded], layer: usize) -> Self {
        let group = group_of(plans, layer);
        let plan = &plans[group];
        Self { shape, layer: layer - plan.first, plan, states: &states[group] }
    }

    /// The exact states of `range`, for rows spread evenly over `heads`.
    fn exact(
        &self,
        heads: &Range<usize>,
        range: &Range<usize>,
        rows: usize,
    ) -> impl Iterator<Item = Part<'a>> {
        let [sinks, _, recent] = self.states.cut(range);
        let (layer, heads, per_head) = (self.layer, heads.clone(), rows / heads.len());
        [(sinks, &self.states.sinks), (recent, &self.states.recent)]
            .into_iter()
            .filter(|((range, _), _)| !range.is_empty())
            .flat_map(move |((range, column), stores)| {
                heads.clone().enumerate().map(move |(i, head)| {
                    let rows = i * per_head..(i + 1) * per_head;
                    Part { store: &stores[layer], head, rows, range: range.clone(), column }
                })
            })
    }

    /// The latents of `range`, for rows spread evenly over `heads`.
    fn latents(
        &self,
        heads: &Range<usize>,
        range: &Range<usize>,
        rows: usize,
    ) -> impl Iterator<Item = Part<'a>> {
        let [_, (range, column), _] = self.states.cut(range);
        let (heads, per_head) = (heads.clone(), rows / heads.len());
        let sets = self.plan.sets.iter().zip(&self.states.latents);
        sets.filter_map(move |(set, store)| {
            let met = set.heads.start.max(heads.start)..set.heads.end.min(heads.end);
            let rows = met.start.saturating_sub(heads.start) * per_head
                ..met.end.saturating_sub(heads.start) * per_head;
            let part = Part { store, head: 0, rows, range: range.clone(), column };
            (!met.is_empty() && !range.is_empty()).then_some(part)
        })
    }

    /// KV heads that one call had better serve: those that share latents.
    fn together(&self) -> usize {
        if self.plan.sets.iter().all(|s| s.heads.len() == 1) { 1 } else { self.shape.kv_heads }
    }

    fn rank(&self) -> usize {
        self.plan.sets.iter().map(|s| s.coding.rank()).max().unwrap_or(0)
    }

    /// Reads a vector that is held exactly, or decodes its latent: `latent(transform, z, out)`.
    fn read(
        &self,
        head: usize,
        position: usize,
        out: &mut [f32],
        latent: impl Fn(&T, &mut [f32], &mut [f32]),
    ) {
        let range = position..position + 1;
        if let Some(part) = self.exact(&(head..head + 1), &range, 1).next() {
            return part.store.read(head, part.range.start, out);
        }
        for part in self.latents(&(head..head + 1), &range, 1) {
            with_buffer(part.store.dim(), |z| {
                part.store.read(0, part.range.start, z);
                latent(&self.plan.sets[self.plan.set_of(head)].transform, z, out);
            });
        }
    }
}

impl Keys for View<'_, KeyTransform> {
    /// A mapped query is the query itself (for exact tokens), its part for the mean, and its part for the latents.
    fn query_dim(&self, head_dim: usize) -> usize {
        2 * head_dim + self.rank()
    }

    fn together(&self) -> usize {
        View::together(self)
    }

    fn aligned_from(&self) -> usize {
        self.states.first_latent()
    }

    fn map_queries(&self, heads: Range<usize>, q: &[f32], out: &mut [f32]) {
        let dim = self.shape.head_dim;
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

    fn scores(&self, heads: Range<usize>, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]) {
        let (dim, width) = (self.shape.head_dim, range.len());
        let stride = self.query_dim(dim);
        out.fill(0.0);
        let mut add = |store: &Store, part: &Part, range: Range<usize>, from: usize| {
            let w = Weights { w: &q[part.rows.start * stride + from..], stride, rows: part.rows.len() };
            let y = Sums { y: &mut out[part.rows.start * width + part.column..], stride: width };
            store.add_scores(part.head, range, w, y);
        };
        for part in self.exact(&heads, &range, rows) {
            add(part.store, &part, part.range.clone(), 0);
        }
        for part in self.latents(&heads, &range, rows) {
            let phases = &self.plan.sets[0].transform.phases;
            phases.read(|table| add(table, &part, part.range.clone(), dim));
            add(part.store, &part, part.range.clone(), 2 * dim);
        }
    }
}

impl Values for View<'_, ValueTransform> {
    /// A sum is that of exact values, then the weight that the latents have together, then that of the latents.
    fn sum_dim(&self, head_dim: usize) -> usize {
        head_dim + 1 + self.rank()
    }

    fn together(&self) -> usize {
        View::together(self)
    }

    fn accumulate(&self, heads: Range<usize>, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]) {
        let (dim, width) = (self.shape.head_dim, range.len());
        let stride = self.sum_dim(dim);
        let mut add = |part: &Part, from: usize| {
            let w = Weights {
                w: &p[part.rows.start * width + part.column..],
                stride: width,
                rows: part.rows.len(),
            };
            let y = Sums { y: &mut out[part.rows.start * stride + from..], stride };
            part.store.add_sums(part.head, part.range.clone(), w, y);
        };
        self.exact(&heads, &range, rows).for_each(|part| add(&part, 0));
        self.latents(&heads, &range, rows).for_each(|part| add(&part, dim + 1));
        for part in self.latents(&heads, &range, rows) {
            for row in part.rows {
                out[row * stride + dim] += total(&p[row * width + part.column..][..part.range.len()]);
            }
        }
    }

    fn map_sums(&self, head: usize, sums: &[f32], rows: usize, out: &mut [f32]) {
        let dim = self.shape.head_dim;
        let stride = self.sum_dim(dim);
        for (sum, out) in sums.chunks_exact(stride).zip(out.chunks_exact_mut(dim)) {
            out.copy_from_slice(&sum[..dim]);
        }
        let transform = &self.plan.sets[self.plan.set_of(head)].transform;
        transform.decode(self.layer, head, &sums[dim..], stride, rows, out);
    }
}

impl KvCache for LatentCache {
    fn shape(&self) -> &ModelShape {
        &self.plan.shape
    }

    fn attend_into(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        let tokens = check_step(&self.plan.shape, layer, self.len, q, k, v, out)?;
        {
            let (keys, values) = self.view(layer);
            let start = keys.states.start().max(values.states.start());
            let past = Past { keys: &keys, values: &values, start, end: self.len };
            attend(&self.plan.shape, past, Step { q, k, v, tokens }, out);
        }
        self.store(layer, k, v);
        self.step = tokens;
        Ok(())
    }

    fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.step = check_states(&self.plan.shape, layer, self.len, k, v)?;
        self.store(layer, k, v);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.len += std::mem::take(&mut self.step);
        self.plan.phases.extend(self.len);
        let first = self.first_visible();
        if first > 0 {
            self.keys.iter_mut().chain(&mut self.values).for_each(|g| g.drop_before(first));
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let exact = (self.plan.spec.sinks, self.plan.spec.residual);
        let sides = || self.keys.iter().chain(&self.values);
        check_truncate(self.len, len, || {
            if len > 0 && sides().map(Coded::start).max() > Some(first_visible(&self.plan.shape, len)) {
                return Err(GONE);
            }
            sides().try_for_each(|side| side.can_truncate(len, exact))
        })?;
        self.keys.iter_mut().chain(&mut self.values).for_each(|side| side.truncate(len));
        self.len = len;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        self.keys.iter().chain(&self.values).for_each(|g| total += g.footprint());
        total
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.plan.shape, layer)?;
        let (keys, values) = self.view(layer);
        let positions: Vec<usize> = (self.first_visible()..self.len).collect();
        let (heads, dim) = (self.plan.shape.kv_heads, self.plan.shape.head_dim);
        let mut out = Restored::default();
        let mut row = vec![0.0; dim];
        for &position in &positions {
            for head in 0..heads {
                keys.read(head, position, &mut row, |transform, z, out| {
                    transform.decode(keys.layer, head, position, z, out);
                });
                out.keys.extend_from_slice(&row);
                values.read(head, position, &mut row, |transform, z, out| {
                    out.fill(0.0);
                    let stride = 1 + z.len();
                    with_buffer(stride, |sum| {
                        sum[0] = 1.0;
                        sum[1..].copy_from_slice(z);
                        transform.decode(values.layer, head, sum, stride, 1, out);
                    });
                });
                out.values.extend_from_slice(&row);
            }
        }
        Ok(Restored { positions, ..out })
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self {
            plan: self.plan.clone(),
            keys: self.keys.clone(),
            values: self.values.clone(),
            ..*self
        })
    }
}
