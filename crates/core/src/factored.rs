//! The cache of a method that keeps a prompt's states in factors: of a group of consecutive layers, coefficients that its
//! layers share, and for each layer the vectors by which its states are restored. What comes after the prompt is exact.
//!
//! With the states of a group side by side, X is near Z V^T: Z `(tokens, rank)` once, and of V^T
//! `(rank, layers * kv_heads * head_dim)` every layer its columns, P_l. Values are never restored:
//! sum_i p_i v_i = (sum_i p_i z_i) P_l. Keys are factored before their rotary embedding, which no map across frequencies
//! commutes with: a block of them at a time is restored in working memory and rotated, and then meets the queries.

use std::ops::Range;
use std::sync::Arc;

use crate::angles::{Angles, angles};
use crate::archive::{Archive, damaged};
use crate::cache::{KvCache, Restored};
use crate::dense::{View, mul_transposed};
use crate::kernels::{LANES, Sums, Weights};
use crate::low_rank::{LowRank, truncated_svd};
use crate::scratch::with_buffer;
use crate::settings::{ModelShape, Rank};
use crate::states::{States, check_in_sight, check_layer, check_truncate};
use crate::store::{Scheme, Side, Store};
use crate::view::{LayerView, Segment, SideView};
use crate::{Footprint, Result, Rotary};

/// How a prompt is factored.
#[derive(Clone)]
pub(crate) struct Factoring {
    /// Layers of a group; the last one has what is left.
    pub(crate) group: usize,
    /// Of keys and of values.
    pub(crate) ranks: [Rank; 2],
    pub(crate) scheme: Scheme,
    /// The model's rotary embedding; none where keys are not rotated.
    pub(crate) rotary: Option<Arc<dyn Rotary>>,
}

impl Factoring {
    /// Ranks of keys and values for groups of `width` numbers per token. (By energy there are none before the prompt is
    /// known; methods refuse that.)
    fn ranks(&self, width: usize) -> [usize; 2] {
        self.ranks.map(|rank| rank.of(width).unwrap_or(width))
    }

    /// The groups of a model: first layer, and layers.
    fn groups(&self, layers: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let group = self.group.min(layers);
        (0..layers).step_by(group).map(move |first| (first, group.min(layers - first)))
    }

    /// Numbers held of a prompt of `tokens`, of keys and of values, each beside those of exact states.
    pub(crate) fn numbers(&self, shape: &ModelShape, tokens: usize) -> [(usize, usize); 2] {
        let mut sums = [(0, 0); 2];
        for (_, layers) in self.groups(shape.layers) {
            let width = layers * shape.kv_dim();
            for (sum, rank) in sums.iter_mut().zip(self.ranks(width)) {
                let held = if saves(rank, tokens, width) { rank * (tokens + width) } else { tokens * width };
                *sum = (sum.0 + held, sum.1 + tokens * width);
            }
        }
        sums
    }
}

/// Whether factors of this rank hold fewer numbers than `(tokens, width)` states. If not the states stay exact.
fn saves(rank: usize, tokens: usize, width: usize) -> bool {
    rank.saturating_mul(tokens + width) < tokens.saturating_mul(width)
}

/// One side of one group of layers.
#[derive(Clone)]
struct GroupSide {
    rank: usize,
    /// Z, a token's as one vector; empty where the prompt is exact.
    coefficients: Store,
    /// P_l of each layer: `rank` vectors of all its heads.
    parts: Vec<Store>,
    /// Exact states of each layer, from the end of what is factored on.
    exact: Vec<Store>,
    /// The prompt's states of the layers that are done, until the group is.
    waiting: Vec<Vec<f32>>,
}

impl GroupSide {
    fn new(shape: &ModelShape, layers: usize, rank: usize, scheme: Scheme, side: Side) -> Self {
        let (heads, dim) = (shape.kv_heads, shape.head_dim);
        // Both are summed with weights, which the layout of values serves.
        let coefficients = Store::new(1, rank, scheme, Side::Values).with_blocks(LANES);
        let part = Store::new(heads, dim, scheme, Side::Values).with_blocks(rank);
        let exact = Store::new(heads, dim, scheme, side).with_blocks(LANES);
        Self {
            rank,
            coefficients,
            parts: vec![part; layers],
            exact: vec![exact; layers],
            waiting: vec![Vec::new(); layers],
        }
    }

    /// Tokens that are factored.
    fn prompt(&self) -> usize {
        self.coefficients.len()
    }

    /// Takes the prompt that waits, of all layers.
    fn take_prompt(&mut self, shape: &ModelShape, angles: Option<&Angles>) {
        let (kv_dim, layers) = (shape.kv_dim(), self.waiting.len());
        let (tokens, width) = (self.waiting[0].len() / kv_dim, layers * kv_dim);
        let waiting = std::mem::replace(&mut self.waiting, vec![Vec::new(); layers]);
        if !saves(self.rank, tokens, width) {
            self.exact.iter_mut().zip(&waiting).for_each(|(store, states)| store.push(states));
            return;
        }
        let mut x = vec![0.0; tokens * width];
        for (layer, states) in waiting.into_iter().enumerate() {
            let rows = x.chunks_exact_mut(width).zip(states.chunks_exact(kv_dim)).enumerate();
            for (token, (x, state)) in rows {
                let x = &mut x[layer * kv_dim..(layer + 1) * kv_dim];
                x.copy_from_slice(state);
                if let Some(angles) = angles {
                    angles.unrotate(token, x, shape.head_dim);
                }
            }
        }
        let LowRank { coefficients, vectors } = truncated_svd(&x, tokens, width, self.rank);
        drop(x);
        self.put(&coefficients, &vectors);
    }

    /// Stores Z and V^T.
    fn put(&mut self, coefficients: &[f32], vectors: &[f32]) {
        self.coefficients.push(coefficients);
        let layers = self.parts.len();
        let columns = vectors.len() / self.rank / layers;
        for (layer, part) in self.parts.iter_mut().enumerate() {
            let rows = vectors.chunks_exact(layers * columns);
            let own: Vec<f32> = rows.flat_map(|row| &row[layer * columns..][..columns]).copied().collect();
            part.push(&own);
        }
    }

    /// How the first `len` tokens of a layer lie.
    fn view<'a>(&'a self, layer: usize, len: usize, angles: Option<&'a Angles>) -> SideView<'a> {
        let (factored, exact) = (self.prompt().min(len), &self.exact[layer]);
        let rows = FactoredRows { coefficients: &self.coefficients, part: &self.parts[layer], angles };
        // Where exact tokens have left a window, those before them have too, though other layers may still see them.
        let from = if exact.start() > 0 { factored } else { self.coefficients.start().min(factored) };
        let before = (from < factored).then(|| Segment::factored(from..factored, rows, from));
        let after = factored + exact.start();
        let after = (after < len).then(|| Segment::new(after..len, exact, exact.start()));
        before.into_iter().chain(after).collect()
    }

    /// Frees what no query sees any more; `first(layer)` is what that of a layer of the group sees first.
    fn drop_before(&mut self, first: impl Fn(usize) -> usize) {
        let prompt = self.prompt();
        let seen = (0..self.exact.len()).map(&first).min().unwrap_or(0);
        self.coefficients.drop_before(seen.min(prompt));
        for (layer, store) in self.exact.iter_mut().enumerate() {
            store.drop_before(first(layer).saturating_sub(prompt));
        }
    }

    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        if len > 0 && len < self.prompt() { Err("the prompt has been factored as a whole") } else { Ok(()) }
    }

    /// Forgets the tokens from `len` on; [`GroupSide::can_truncate`] has said that it can.
    fn truncate(&mut self, len: usize) {
        let after = len.saturating_sub(self.prompt());
        self.exact.iter_mut().for_each(|store| store.truncate(after));
        if len == 0 {
            self.coefficients = self.coefficients.empty();
            self.parts.iter_mut().for_each(|part| *part = part.empty());
        }
    }

    fn footprint(&self) -> Footprint {
        let bytes = |stores: &[Store]| stores.iter().map(|store| store.bytes().total()).sum();
        Footprint {
            states: bytes(&self.exact),
            latents: self.coefficients.bytes().total(),
            state: bytes(&self.parts),
            residual: self.waiting.iter().map(|w| w.capacity() * size_of::<f32>()).sum(),
            ..Footprint::default()
        }
    }

    fn archive(&mut self, archive: &mut Archive<'_>, len: usize) -> Result<()> {
        self.coefficients.archive(archive)?;
        self.parts.iter_mut().chain(&mut self.exact).try_for_each(|store| store.archive(archive))?;
        let vectors = if self.prompt() > 0 { self.rank } else { 0 };
        damaged(self.parts.iter().all(|part| part.len() == vectors && part.start() == 0))?;
        damaged(self.exact.iter().all(|store| self.prompt() + store.len() == len))
    }
}

/// A group of layers.
#[derive(Clone)]
struct Group {
    first: usize,
    keys: GroupSide,
    values: GroupSide,
}

impl Group {
    fn sides(&self) -> [&GroupSide; 2] {
        [&self.keys, &self.values]
    }

    fn sides_mut(&mut self) -> [&mut GroupSide; 2] {
        [&mut self.keys, &mut self.values]
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct FactoredCache {
    shape: ModelShape,
    factoring: Factoring,
    /// By which keys are rotated when they are read.
    angles: Option<Arc<Angles>>,
    groups: Vec<Group>,
    len: usize,
    step: usize,
}

impl FactoredCache {
    pub(crate) fn new(shape: &ModelShape, factoring: Factoring) -> Self {
        let group = |(first, layers)| {
            let ranks = factoring.ranks(layers * shape.kv_dim());
            let [keys, values] = [(ranks[0], Side::Keys), (ranks[1], Side::Values)]
                .map(|(rank, side)| GroupSide::new(shape, layers, rank, factoring.scheme, side));
            Group { first, keys, values }
        };
        let groups = factoring.groups(shape.layers).map(group).collect();
        let angles = factoring.rotary.as_ref().map(angles);
        Self { shape: *shape, factoring, angles, groups, len: 0, step: 0 }
    }

    /// Bytes of a prompt of `context` tokens: the stores are real, the numbers in them zeros, one group at a time.
    pub(crate) fn bytes_of(shape: &ModelShape, factoring: &Factoring, context: usize) -> Footprint {
        let mut total = Footprint::default();
        for (first, layers) in factoring.groups(shape.layers) {
            let width = layers * shape.kv_dim();
            let ranks = factoring.ranks(width);
            for (rank, side) in [(ranks[0], Side::Keys), (ranks[1], Side::Values)] {
                let mut made_up = GroupSide::new(shape, layers, rank, factoring.scheme, side);
                if saves(rank, context, width) {
                    made_up.put(&vec![0.0; context * rank], &vec![0.0; rank * width]);
                } else {
                    let zeros = vec![0.0; context * shape.kv_dim()];
                    made_up.exact.iter_mut().for_each(|store| store.push(&zeros));
                }
                made_up.drop_before(|layer| shape.first_seen(first + layer, context));
                total += made_up.footprint();
            }
        }
        total
    }

    /// The group of a layer, and which of its layers this is.
    fn place(&self, layer: usize) -> (usize, usize) {
        let group = self.factoring.group.min(self.shape.layers);
        (layer / group, layer % group)
    }

    fn view(&self, layer: usize) -> LayerView<'_> {
        let (group, layer) = self.place(layer);
        let Group { keys, values, .. } = &self.groups[group];
        let angles = self.angles.as_deref();
        LayerView { keys: keys.view(layer, self.len, angles), values: values.view(layer, self.len, None) }
    }

    /// Makes the rotations of keys of a prompt of `tokens`.
    fn make_angles(&self, tokens: usize) {
        self.angles.iter().for_each(|angles| angles.extend(tokens));
    }

    /// What of a layer the next query sees.
    fn visible(&self, layer: usize) -> Range<usize> {
        self.shape.first_seen(layer, self.len)..self.len
    }
}

impl KvCache for FactoredCache {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_held(&self, layer: usize, states: States<'_>, out: &mut [f32], _: &mut Vec<f32>) -> Result<()> {
        self.view(layer).attend(&self.shape, layer, self.len, states, out);
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> Result<()> {
        self.step = states.tokens(&self.shape);
        let (group, layer) = self.place(layer);
        let Group { keys, values, .. } = &mut self.groups[group];
        if self.len > 0 {
            keys.exact[layer].push(states.k);
            values.exact[layer].push(states.v);
            return Ok(());
        }
        keys.waiting[layer] = states.k.to_vec();
        values.waiting[layer] = states.v.to_vec();
        if layer + 1 == keys.waiting.len() {
            let (shape, angles) = (&self.shape, self.angles.as_deref());
            rayon::join(|| keys.take_prompt(shape, angles), || values.take_prompt(shape, None));
        }
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        if self.len == 0 {
            self.make_angles(self.step);
        }
        self.len += std::mem::take(&mut self.step);
        if self.shape.window.is_some() {
            let (shape, len) = (self.shape, self.len);
            for group in &mut self.groups {
                let first = group.first;
                let seen = |layer: usize| shape.first_seen(first + layer, len);
                group.sides_mut().into_iter().for_each(|side| side.drop_before(seen));
            }
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.len, len, || {
            check_in_sight(&self.shape, len, |layer| self.view(layer).start())?;
            self.groups.iter().flat_map(Group::sides).try_for_each(|side| side.can_truncate(len))
        })?;
        self.groups.iter_mut().flat_map(Group::sides_mut).for_each(|side| side.truncate(len));
        self.len = len;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        self.groups.iter().flat_map(Group::sides).for_each(|side| total += side.footprint());
        total
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.shape, layer)?;
        Ok(self.view(layer).restored(&self.shape, self.visible(layer)))
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        for side in self.groups.iter_mut().flat_map(Group::sides_mut) {
            side.archive(archive, self.len)?;
        }
        self.make_angles(self.groups.iter().map(|group| group.keys.prompt()).max().unwrap_or(0));
        damaged((0..self.shape.layers).all(|layer| self.view(layer).holds(self.visible(layer))))
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}

/// A layer's factored states as attention reads them.
#[derive(Clone, Copy)]
pub(crate) struct FactoredRows<'a> {
    coefficients: &'a Store,
    part: &'a Store,
    /// By which keys are rotated to their positions.
    angles: Option<&'a Angles>,
}

impl FactoredRows<'_> {
    fn rank(&self) -> usize {
        self.coefficients.dim()
    }

    /// Whether the store has these indices.
    pub(crate) fn holds(&self, indices: &Range<usize>) -> bool {
        indices.start >= self.coefficients.start() && indices.end <= self.coefficients.len()
    }

    /// A sum is that of exact values, then that of coefficients.
    pub(crate) fn sum_dim(&self, head_dim: usize) -> usize {
        head_dim + self.rank()
    }

    /// Adds z P_l to each row of `out (rows, head_dim)`.
    fn add_restored(&self, head: usize, z: Weights, out: Sums) {
        self.part.add_sums(head, 0..self.rank(), z, out);
    }

    /// The vectors of `indices`, rotated to `positions`: `out (indices, dim)`.
    fn restore(&self, head: usize, positions: Range<usize>, indices: Range<usize>, out: &mut [f32]) {
        let (rank, dim) = (self.rank(), self.part.dim());
        with_buffer(indices.len() * rank, |z| {
            let rows = indices.len();
            indices.zip(z.chunks_exact_mut(rank)).for_each(|(i, z)| self.coefficients.read(0, i, z));
            out.fill(0.0);
            self.add_restored(head, Weights { w: z, stride: rank, rows }, Sums { y: out, stride: dim });
        });
        if let Some(angles) = self.angles {
            angles.rotate(positions, out, dim);
        }
    }

    /// Adds the scores of queries.
    pub(crate) fn scores(
        &self,
        head: usize,
        dim: usize,
        positions: &Range<usize>,
        indices: Range<usize>,
        q: Weights,
        out: Sums,
    ) {
        let width = indices.len();
        with_buffer(width * (dim + q.rows), |buffer| {
            let (keys, scores) = buffer.split_at_mut(width * dim);
            self.restore(head, positions.clone(), indices, keys);
            let queries = View::new(q.w, q.rows, dim, q.stride);
            mul_transposed(queries, View::new(keys, width, dim, dim), scores);
            for (row, scores) in scores.chunks_exact(width).take(q.rows).enumerate() {
                out.y[row * out.stride..].iter_mut().zip(scores).for_each(|(y, s)| *y += s);
            }
        });
    }

    /// Adds the coefficients, weighed by `p`, to the second part of each row.
    pub(crate) fn accumulate(&self, dim: usize, indices: Range<usize>, p: Weights, out: Sums) {
        self.coefficients.add_sums(0, indices, p, Sums { y: &mut out.y[dim..], ..out });
    }

    pub(crate) fn map_sums(&self, head: usize, dim: usize, sums: &[f32], rows: usize, out: &mut [f32]) {
        let stride = self.sum_dim(dim);
        for (sum, out) in sums.chunks_exact(stride).zip(out.chunks_exact_mut(dim)) {
            out.copy_from_slice(&sum[..dim]);
        }
        self.add_restored(head, Weights { w: &sums[dim..], stride, rows }, Sums { y: out, stride: dim });
    }

    pub(crate) fn read(&self, head: usize, position: usize, index: usize, out: &mut [f32]) {
        self.restore(head, position..position + 1, index..index + 1, out);
    }
}
