//! The latent cache: see the module's page for the mathematics.

use std::ops::Range;
use std::sync::Arc;

use minicache_config::{Axis, CacheSpec, Group, LatentSide, ModelShape, Rank};

use super::basis::{Basis, KeyBasis, Phases, ValueBasis};
use super::coder::{Allocation, Coding, Latents, allocate};
use super::transform::{KeyTransform, ValueTransform};
use crate::attend::{Past, Step, attend};
use crate::cache::{KvCache, Restored};
use crate::kernels::LANES;
use crate::lane::{Keys, Values};
use crate::layered::{check_layer, check_states, check_step};
use crate::store::{Scheme, Side, Store};
use crate::{Error, Footprint, Result, Rotary};

/// Components that get the same bits: the width of the store's lanes.
const UNIT: usize = 16;

/// Deviation that a component is taken to have at least, as a share of the largest one's.
const LEAST_DEVIATION: f32 = 1e-3;

/// The transforms and codings of a latent cache on a model: made once, shared by all its caches.
pub struct LatentPlan {
    shape: ModelShape,
    spec: CacheSpec,
    keys: Vec<Plan<KeyTransform>>,
    values: Vec<Plan<ValueTransform>>,
    phases: Arc<Phases>,
}

/// One group of layers.
pub(super) struct Plan<T> {
    pub(super) first: usize,
    pub(super) layers: usize,
    pub(super) transform: T,
    pub(super) coding: Coding,
}

/// The stored states of one side of one group.
#[derive(Clone)]
pub(super) struct Coded {
    latents: Latents,
    /// Exact states per layer: the first tokens, and those newer than the latents.
    sinks: Vec<Store>,
    recent: Vec<Store>,
    /// This step's states of the layers that are done.
    waiting: Vec<Vec<f32>>,
}

impl Coded {
    pub(super) fn new<T>(
        plan: &Plan<T>,
        rank: usize,
        side: Side,
        spec: &CacheSpec,
        shape: &ModelShape,
    ) -> Self {
        let exact = crate::methods::exact(spec.dtype);
        let store = |side| Store::new(shape.kv_heads, shape.head_dim, exact, side);
        // A handful of tokens: laid out token by token, because a block of keys takes 16.
        let sinks = store(Side::Values).with_blocks(spec.sinks.max(1));
        let recent = store(side).with_blocks(LANES);
        Self {
            latents: Latents::new(rank, &plan.coding, side, spec.magnitudes),
            sinks: vec![sinks; plan.layers],
            recent: vec![recent; plan.layers],
            waiting: vec![Vec::new(); plan.layers],
        }
    }

    /// Positions held exactly at the front.
    fn first_latent(&self) -> usize {
        self.sinks[0].len()
    }

    /// First position held exactly at the end.
    fn first_recent(&self) -> usize {
        self.first_latent() + self.latents.len()
    }

    /// Stores the states of one layer; with the last layer of the group, turns what is older than `residual` tokens
    /// into latents by `encode(states per layer, first position)`.
    pub(super) fn push(
        &mut self,
        layer: usize,
        rows: &[f32],
        (sinks, residual): (usize, usize),
        encode: impl Fn(&[&[f32]], usize) -> Vec<f32>,
    ) {
        self.waiting[layer].clear();
        self.waiting[layer].extend_from_slice(rows);
        if layer + 1 < self.waiting.len() {
            return;
        }
        let width = self.recent[0].heads() * self.recent[0].dim();
        let tokens = rows.len() / width;
        let to_sinks = sinks.saturating_sub(self.first_latent()).min(tokens);
        for (l, waiting) in self.waiting.iter().enumerate() {
            self.sinks[l].push(&waiting[..to_sinks * width]);
        }
        if residual == 0 {
            let states: Vec<&[f32]> = self.waiting.iter().map(|w| &w[to_sinks * width..]).collect();
            if tokens > to_sinks {
                self.latents.push(&encode(&states, self.first_recent()));
            }
        } else {
            for (l, waiting) in self.waiting.iter().enumerate() {
                self.recent[l].push(&waiting[to_sinks * width..]);
            }
            self.encode_older(residual, encode);
        }
        for waiting in &mut self.waiting {
            waiting.clear();
            waiting.shrink_to(width);
        }
    }

    fn encode_older(&mut self, residual: usize, encode: impl Fn(&[&[f32]], usize) -> Vec<f32>) {
        let (heads, dim) = (self.recent[0].heads(), self.recent[0].dim());
        // Indices of `recent` count from the first latent.
        let range = self.latents.len()..self.recent[0].len().saturating_sub(residual).max(self.latents.len());
        if range.is_empty() {
            return;
        }
        let states: Vec<Vec<f32>> = self
            .recent
            .iter()
            .map(|store| {
                let mut rows = vec![0.0; range.len() * heads * dim];
                for (i, row) in rows.chunks_exact_mut(dim).enumerate() {
                    store.read(i % heads, range.start + i / heads, row);
                }
                rows
            })
            .collect();
        let states: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
        self.latents.push(&encode(&states, self.first_recent()));
        self.recent.iter_mut().for_each(|s| s.drop_before(range.end));
    }

    fn start(&self) -> usize {
        let sinks = self.sinks[0].start();
        if sinks < self.first_latent() { sinks } else { self.first_latent() + self.latents.start() }
    }

    pub(super) fn drop_before(&mut self, position: usize) {
        let first = self.first_latent();
        self.sinks.iter_mut().for_each(|s| s.drop_before(position.min(first)));
        self.latents.drop_before(position.saturating_sub(first).min(self.latents.len()));
    }

    pub(super) fn footprint(&self) -> Footprint {
        let mut out = self.latents.footprint();
        out.retained += self.sinks.iter().map(|s| s.bytes().total()).sum::<usize>();
        out.residual += self.recent.iter().map(|s| s.bytes().total()).sum::<usize>();
        out.residual += self.waiting.iter().map(|w| w.capacity() * size_of::<f32>()).sum::<usize>();
        out
    }

    /// Reads the vector at `position` where it is held exactly; the index of its latent elsewhere.
    fn read_exact(
        &self,
        layer: usize,
        head: usize,
        position: usize,
        out: &mut [f32],
    ) -> std::result::Result<(), usize> {
        let [sink, latent, recent] = self.cut(&(position..position + 1));
        for (part, stores) in [(sink.0, &self.sinks), (recent.0, &self.recent)] {
            if !part.is_empty() {
                stores[layer].read(head, part.start, out);
                return Ok(());
            }
        }
        Err(latent.0.start)
    }

    /// Cuts a range of positions into sinks, latents and recent ones, each with its offset in the range.
    fn cut(&self, range: &Range<usize>) -> [(Range<usize>, usize); 3] {
        let (a, b) = (self.first_latent(), self.first_recent());
        let part = |from: usize, to: usize, base: usize| {
            let (from, to) = (range.start.max(from), range.end.min(to));
            if from < to { (from - base..to - base, from - range.start) } else { (0..0, 0) }
        };
        [part(0, a, 0), part(a, b, a), part(b, usize::MAX, a)]
    }
}

/// See the module.
pub(crate) struct LatentCache {
    plan: Arc<LatentPlan>,
    keys: Vec<Coded>,
    values: Vec<Coded>,
    len: usize,
    step: usize,
}

impl LatentPlan {
    /// Takes from `basis` what `spec` keeps.
    ///
    /// # Errors
    /// Group sizes that were not calibrated; a rotary embedding over part of the head only.
    pub fn new(spec: &CacheSpec, shape: &ModelShape, basis: &Basis, rotary: Arc<dyn Rotary>) -> Result<Self> {
        let missing = |what: &str| Error::Missing(format!("method = \"latent\" needs {what}"));
        if rotary.rotary_dim() != shape.head_dim {
            return Err(missing("a rotary embedding over the whole head"));
        }
        let phases = Arc::new(Phases::new(rotary, shape.head_dim));
        let none = |side: &str, g: usize| {
            missing(&format!("a basis for {side} in groups of {g} layers; calibrate one"))
        };
        let (key_size, value_size) = (size(&spec.k)?, size(&spec.v)?);
        let keys = basis.key_groups(key_size).ok_or_else(|| none("keys", key_size))?;
        let values = basis.value_groups(value_size).ok_or_else(|| none("values", value_size))?;
        Ok(Self {
            shape: *shape,
            spec: spec.clone(),
            keys: key_plans(keys, spec, shape, &phases),
            values: value_plans(values, spec, shape),
            phases,
        })
    }

    /// Bytes held for the model, whatever the number of sequences: the kept bases and the table of phases.
    pub fn bytes(&self) -> usize {
        let keys = self.keys.iter().map(|p| p.transform.bytes()).sum::<usize>();
        let values = self.values.iter().map(|p| p.transform.bytes()).sum::<usize>();
        keys + values + self.phases.read(|t| t.bytes().total())
    }
}

impl LatentCache {
    pub(crate) fn new(plan: Arc<LatentPlan>) -> Self {
        let (spec, shape) = (&plan.spec, &plan.shape);
        let keys =
            plan.keys.iter().map(|p| Coded::new(p, p.transform.rank(), Side::Keys, spec, shape)).collect();
        let values =
            plan.values.iter().map(|p| Coded::new(p, p.transform.rank, Side::Values, spec, shape)).collect();
        Self { keys, values, plan, len: 0, step: 0 }
    }

    fn view(&self, layer: usize) -> (KeyView<'_>, ValueView<'_>) {
        let (k, v) = (group_of(&self.plan.keys, layer), group_of(&self.plan.values, layer));
        let shape = &self.plan.shape;
        let (key, value) = (&self.plan.keys[k], &self.plan.values[v]);
        (
            KeyView { shape, layer: layer - key.first, transform: &key.transform, states: &self.keys[k] },
            ValueView {
                shape,
                layer: layer - value.first,
                transform: &value.transform,
                states: &self.values[v],
            },
        )
    }

    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) {
        let exact = (self.plan.spec.sinks, self.plan.spec.residual);
        let g = group_of(&self.plan.keys, layer);
        let plan = &self.plan.keys[g];
        self.keys[g].push(layer - plan.first, k, exact, |rows, first| plan.transform.encode(rows, first));
        let g = group_of(&self.plan.values, layer);
        let plan = &self.plan.values[g];
        self.values[g].push(layer - plan.first, v, exact, |rows, _| plan.transform.encode(rows));
    }

    fn first_visible(&self) -> usize {
        self.plan.shape.window.map_or(0, |w| (self.len + 1).saturating_sub(w))
    }
}

fn group_of<T>(plans: &[Plan<T>], layer: usize) -> usize {
    plans.partition_point(|p| p.first + p.layers <= layer)
}

pub(super) fn size(side: &LatentSide) -> Result<usize> {
    match side.group {
        Group::Layers(n) => Ok(n),
        Group::Auto => {
            Err(Error::Missing("group = \"auto\" has to be resolved on calibration text first".to_string()))
        }
    }
}

/// Components kept of `variances` (descending).
fn rank_of(side: &LatentSide, variances: &[f32]) -> usize {
    let n = variances.len();
    let rank = match side.rank {
        Rank::Number(r) => r,
        Rank::Fraction(f) => (f * n as f64).round() as usize,
        Rank::Energy { energy } => {
            let total: f64 = variances.iter().map(|&v| f64::from(v)).sum();
            let mut sum = 0.0;
            variances
                .iter()
                .take_while(|&&v| {
                    let more = sum < energy * total;
                    sum += f64::from(v);
                    more
                })
                .count()
        }
    };
    rank.clamp(1, n)
}

/// The coding of each group of a side, and how many of its components are kept, from the groups' `variances`
/// (descending). `copies` numbers of the latent belong to each variance. A rate counts the bits of all groups together.
pub(super) fn codings(
    side: &LatentSide,
    spec: &CacheSpec,
    variances: &[Vec<f32>],
    copies: usize,
) -> Vec<(Coding, usize)> {
    let Some(rate) = side.rate else {
        let scheme = match side.bits {
            16 => crate::methods::exact(spec.dtype),
            bits => {
                let residual = if side.axis == Axis::Channel { side.quant_group } else { 0 };
                Scheme::Quant { bits, group: side.quant_group, axis: side.axis, residual }
            }
        };
        return variances.iter().map(|v| (Coding::Plain(scheme), rank_of(side, v) * copies)).collect();
    };
    let each: Vec<Vec<f32>> = variances
        .iter()
        .map(|group| group.iter().flat_map(|v| vec![v / copies as f32; copies]).collect())
        .collect();
    let total: usize = each.iter().map(Vec::len).sum();
    let unit = each.iter().map(Vec::len).min().unwrap_or(1).min(UNIT);
    let allocations = allocate(&each, (rate * total as f64).round() as usize, unit);
    let coded = each.iter().zip(allocations).map(|(each, Allocation { sections })| {
        // Tiny budgets may buy nothing; one component at the least keeps the store well-formed.
        let sections = if sections.is_empty() { vec![(2, copies)] } else { sections };
        let rank: usize = sections.iter().map(|s| s.1).sum();
        // A component that calibration saw nothing of must not make a token that has it look like an outlier of all.
        let least = LEAST_DEVIATION * each[0].sqrt().max(f32::MIN_POSITIVE);
        let deviations = each[..rank].iter().map(|v| v.sqrt().max(least)).collect();
        (Coding::Allocated { allocation: Allocation { sections }, deviations }, rank)
    });
    coded.collect()
}

fn value_plans(bases: &[ValueBasis], spec: &CacheSpec, shape: &ModelShape) -> Vec<Plan<ValueTransform>> {
    let variances: Vec<Vec<f32>> = bases.iter().map(|b| b.variances.clone()).collect();
    let plan = |(basis, (coding, rank)): (&ValueBasis, (Coding, usize))| {
        let transform = ValueTransform::new(basis, rank, shape.kv_dim(), shape.head_dim);
        Plan { first: basis.first, layers: basis.layers, transform, coding }
    };
    bases.iter().zip(codings(&spec.v, spec, &variances, 1)).map(plan).collect()
}

fn key_plans(
    bases: &[KeyBasis],
    spec: &CacheSpec,
    shape: &ModelShape,
    phases: &Arc<Phases>,
) -> Vec<Plan<KeyTransform>> {
    // Components of all frequencies together, by variance.
    let order = |basis: &KeyBasis| {
        let mut order: Vec<usize> = (0..basis.variances.len()).collect();
        order.sort_by(|&a, &b| basis.variances[b].total_cmp(&basis.variances[a]).then(a.cmp(&b)));
        order
    };
    let orders: Vec<Vec<usize>> = bases.iter().map(order).collect();
    let variances: Vec<Vec<f32>> =
        bases.iter().zip(&orders).map(|(b, o)| o.iter().map(|&i| b.variances[i]).collect()).collect();
    let plan = |((basis, order), (coding, rank)): ((&KeyBasis, &Vec<usize>), (Coding, usize))| {
        let m = basis.layers * shape.kv_heads;
        let kept: Vec<(usize, usize)> = order[..rank.div_ceil(2)].iter().map(|&i| (i / m, i % m)).collect();
        let transform = KeyTransform::new(basis, &kept, shape.kv_heads, shape.head_dim, phases.clone());
        Plan { first: basis.first, layers: basis.layers, transform, coding }
    };
    bases.iter().zip(&orders).zip(codings(&spec.k, spec, &variances, 2)).map(plan).collect()
}

struct KeyView<'a> {
    shape: &'a ModelShape,
    layer: usize,
    transform: &'a KeyTransform,
    states: &'a Coded,
}

impl KeyView<'_> {
    fn read(&self, head: usize, position: usize, out: &mut [f32]) {
        if let Err(latent) = self.states.read_exact(self.layer, head, position, out) {
            let mut z = vec![0.0; self.transform.rank()];
            self.states.latents.read(latent, &mut z);
            self.transform.decode(self.layer, head, position, &z, out);
        }
    }
}

impl Keys for KeyView<'_> {
    /// A mapped query is the query itself (for exact tokens), its part for the mean, and its part for the latents.
    fn query_dim(&self, head_dim: usize) -> usize {
        2 * head_dim + self.transform.rank()
    }

    fn joint(&self) -> bool {
        true
    }

    fn map_queries(&self, heads: Range<usize>, q: &[f32], out: &mut [f32]) {
        let dim = self.shape.head_dim;
        let per_head = q.len() / dim / heads.len();
        for (row, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(self.query_dim(dim))).enumerate()
        {
            let head = heads.start + row / per_head;
            let (exact, rest) = out.split_at_mut(dim);
            let (mean, latent) = rest.split_at_mut(dim);
            exact.copy_from_slice(q);
            self.transform.map_mean(self.layer, head, q, mean);
            self.transform.map_query(self.layer, head, q, latent);
            self.states.latents.fold_query(latent);
        }
    }

    fn scores(&self, heads: Range<usize>, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]) {
        let dim = self.shape.head_dim;
        let (stride, width) = (self.query_dim(dim), range.len());
        let [sinks, latents, recent] = self.states.cut(&range);
        let per_head = rows / heads.len();
        let column = |from: usize, rows: Range<usize>| {
            rows.flat_map(move |r| q[r * stride + from..][..dim].iter().copied())
        };
        for ((part, offset), stores) in [(sinks, &self.states.sinks), (recent, &self.states.recent)] {
            if part.is_empty() {
                continue;
            }
            for (i, head) in heads.clone().enumerate() {
                let rows = i * per_head..(i + 1) * per_head;
                crate::scratch::with_buffer(per_head * (dim + part.len()), |buffer| {
                    let (q, scores) = buffer.split_at_mut(per_head * dim);
                    q.iter_mut().zip(column(0, rows.clone())).for_each(|(a, b)| *a = b);
                    stores[self.layer].scores(head, part.clone(), q, per_head, scores);
                    for (r, scores) in rows.zip(scores.chunks_exact(part.len())) {
                        out[r * width + offset..][..part.len()].copy_from_slice(scores);
                    }
                });
            }
        }
        let (part, offset) = latents;
        if part.is_empty() {
            return;
        }
        let count = part.len();
        crate::scratch::with_buffer(rows * (dim + count), |buffer| {
            let (q_mean, scores) = buffer.split_at_mut(rows * dim);
            q_mean.iter_mut().zip(column(dim, 0..rows)).for_each(|(a, b)| *a = b);
            let first = range.start + offset;
            self.transform.phases.read(|table| table.scores(0, first..first + count, q_mean, rows, scores));
            self.states.latents.add_scores(part, &q[2 * dim..], stride, rows, scores);
            for (row, scores) in scores.chunks_exact(count).enumerate() {
                out[row * width + offset..][..count].copy_from_slice(scores);
            }
        });
    }
}

struct ValueView<'a> {
    shape: &'a ModelShape,
    layer: usize,
    transform: &'a ValueTransform,
    states: &'a Coded,
}

impl ValueView<'_> {
    fn read(&self, head: usize, position: usize, out: &mut [f32]) {
        if let Err(latent) = self.states.read_exact(self.layer, head, position, out) {
            let mut z = vec![0.0; self.transform.rank];
            self.states.latents.read(latent, &mut z);
            out.fill(0.0);
            self.transform.decode(self.layer, head, &z, 1.0, out);
        }
    }
}

impl Values for ValueView<'_> {
    /// A sum is that of exact values, then that of the latents, then the weight that the latents have together.
    fn sum_dim(&self, head_dim: usize) -> usize {
        head_dim + self.transform.rank + 1
    }

    fn accumulate(&self, heads: Range<usize>, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]) {
        let dim = self.shape.head_dim;
        let (stride, width) = (self.sum_dim(dim), range.len());
        let [sinks, latents, recent] = self.states.cut(&range);
        let per_head = rows / heads.len();
        let gather = |part: &Range<usize>, offset: usize, rows: Range<usize>, to: &mut [f32]| {
            for (r, to) in rows.zip(to.chunks_exact_mut(part.len())) {
                to.copy_from_slice(&p[r * width + offset..][..part.len()]);
            }
        };
        for ((part, offset), stores) in [(sinks, &self.states.sinks), (recent, &self.states.recent)] {
            if part.is_empty() {
                continue;
            }
            for (i, head) in heads.clone().enumerate() {
                let rows = i * per_head..(i + 1) * per_head;
                crate::scratch::with_buffer(per_head * (dim + part.len()), |buffer| {
                    let (sums, weights) = buffer.split_at_mut(per_head * dim);
                    gather(&part, offset, rows.clone(), weights);
                    sums.fill(0.0);
                    stores[self.layer].accumulate(head, part.clone(), weights, per_head, sums);
                    for (r, sums) in rows.zip(sums.chunks_exact(dim)) {
                        out[r * stride..][..dim].iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                    }
                });
            }
        }
        let (part, offset) = latents;
        if part.is_empty() {
            return;
        }
        crate::scratch::with_buffer(rows * part.len(), |weights| {
            gather(&part, offset, 0..rows, weights);
            for (row, weights) in weights.chunks_exact(part.len()).enumerate() {
                out[row * stride + stride - 1] += weights.iter().sum::<f32>();
            }
            self.states.latents.accumulate(part.clone(), weights, rows, &mut out[dim..], stride);
        });
    }

    fn map_sum(&self, head: usize, sum: &[f32], out: &mut [f32]) {
        let (exact, rest) = sum.split_at(self.shape.head_dim);
        out.copy_from_slice(exact);
        let (latent, weight) = rest.split_at(self.transform.rank);
        crate::scratch::with_buffer(latent.len(), |z| {
            z.copy_from_slice(latent);
            self.states.latents.unfold_sum(z);
            self.transform.decode(self.layer, head, z, weight[0], out);
        });
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
                keys.read(head, position, &mut row);
                out.keys.extend_from_slice(&row);
                values.read(head, position, &mut row);
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
