//! The cache of methods that drop tokens: a bounded set of exact states per layer and KV head.

use std::ops::Range;

use crate::settings::{ModelShape, StoreType};
use half::f16;
use rayon::prelude::*;

use crate::archive::{Archive, Number, damaged};
use crate::attend;
use crate::cache::{KvCache, Restored};
use crate::dense::{View, add_product, mul_transposed};
use crate::kernels::Float;
use crate::kernels::loops::{self, exp_sum, largest};
use crate::scratch::with_buffer;
use crate::states::{States, check_layer, check_truncate};
use crate::{Footprint, Result};

/// Why a cache that drops tokens cannot go back.
pub const DROPPED: &str = "it drops tokens for good";

/// Query tokens worked on together.
const TILE: usize = 32;
/// Rows of queries up to which states are read where they lie, a few at a time. For more they are widened as a whole.
const FEW: usize = 16;
/// States widened at a time: they are to be in the first-level cache when they are multiplied.
const BLOCK: usize = 32;
/// Tokens that room is made for at a time. Doubling would cost fewer copies and hold twice what the method keeps.
const ROOM: usize = 16;

/// Which tokens stay when `slots` hold more than the method allows.
pub(crate) trait Evict: Send + Sync {
    /// The queries of a step of `tokens` tokens after `len` that count in what [`Held::received`] says.
    fn counted(&self, len: usize, tokens: usize) -> Range<usize> {
        let _ = (len, tokens);
        0..0
    }

    /// Whether counts go on from step to step, kept beside the tokens.
    fn remembers(&self) -> bool {
        false
    }

    /// Marks the tokens to keep; all are marked to begin with.
    fn keep(&self, held: &Held<'_>, keep: &mut [bool]);
}

/// What one KV head of one layer holds after a step, before tokens are dropped.
pub(crate) struct Held<'a> {
    pub(crate) shape: &'a ModelShape,
    pub(crate) head: usize,
    /// Tokens seen before the step.
    pub(crate) len: usize,
    /// The step's states, of all heads.
    pub(crate) states: States<'a>,
    /// Positions of the tokens, those of the step last and ascending, the others in any order.
    pub(crate) positions: &'a [u32],
    /// Attention that each token has received from the queries that count, summed over the query heads of this one;
    /// nothing where none were counted, or where states came without queries.
    pub(crate) received: &'a [f32],
}

impl Held<'_> {
    /// Tokens seen, those of the step included.
    pub(crate) fn seen(&self) -> usize {
        self.len + self.states.tokens(self.shape)
    }
}

/// Of the tokens `some`, unmarks all but the `most` with the highest score, given by their places. Ties go to the older
/// token, so that the outcome does not depend on the order of the slots.
pub(crate) fn drop_least(
    some: Vec<usize>,
    most: usize,
    held: &Held<'_>,
    score: impl Fn(usize) -> f32,
    keep: &mut [bool],
) {
    let mut some = some;
    if some.len() > most {
        let positions = held.positions;
        some.sort_unstable_by(|&i, &j| score(j).total_cmp(&score(i)).then(positions[i].cmp(&positions[j])));
        some[most..].iter().for_each(|&i| keep[i] = false);
    }
}

/// An empty cache that drops what `evict` says, with its states stored as `dtype`.
pub(crate) fn evicting(
    shape: &ModelShape,
    dtype: StoreType,
    evict: impl Evict + Clone + 'static,
) -> Box<dyn KvCache> {
    match dtype {
        StoreType::F16 => Box::new(Evicting::<_, f16>::new(shape, evict)),
        StoreType::F32 => Box::new(Evicting::<_, f32>::new(shape, evict)),
    }
}

/// The states held for one KV head of one layer, in no particular order.
#[derive(Clone, Default)]
struct Slots<T> {
    positions: Vec<u32>,
    keys: Vec<T>,
    values: Vec<T>,
    attention: Vec<f32>,
}

impl<T: Float> Slots<T> {
    /// Takes the step's states of KV head `head`, whose first token is at position `len`, and the attention that held
    /// and new tokens received in it; then evicts.
    fn take(
        &mut self,
        shape: &ModelShape,
        evict: &impl Evict,
        (layer, head, len): (usize, usize, usize),
        states: States<'_>,
        received: &[f32],
    ) {
        let dim = shape.head_dim;
        let tokens = states.tokens(shape);
        make_room(&mut self.positions, tokens, ROOM);
        self.positions.extend((len..len + tokens).map(|p| p as u32));
        for (store, x) in [(&mut self.keys, states.k), (&mut self.values, states.v)] {
            make_room(store, tokens * dim, ROOM * dim);
            for token in x.chunks_exact(shape.kv_dim()) {
                let at = store.len();
                store.resize(at + dim, T::default());
                T::round(&token[head * dim..(head + 1) * dim], &mut store[at..]);
            }
        }
        if evict.remembers() {
            make_room(&mut self.attention, tokens, ROOM);
            self.attention.resize(self.positions.len(), 0.0);
            self.attention.iter_mut().zip(received).for_each(|(a, r)| *a += r);
        }
        let received = if evict.remembers() { &self.attention } else { received };
        let mut keep = vec![true; self.positions.len()];
        evict.keep(&Held { shape, head, len, states, positions: &self.positions, received }, &mut keep);
        let start = shape.first_seen(layer, len + tokens);
        keep.iter_mut().zip(&self.positions).for_each(|(k, &p)| *k &= p as usize >= start);
        self.retain(&keep, dim);
    }

    /// Removes the tokens that are not marked, filling gaps from the end.
    fn retain(&mut self, keep: &[bool], dim: usize) {
        let mut next = 0;
        for (i, _) in keep.iter().enumerate().filter(|(_, k)| **k) {
            if i != next {
                self.positions[next] = self.positions[i];
                self.keys.copy_within(i * dim..(i + 1) * dim, next * dim);
                self.values.copy_within(i * dim..(i + 1) * dim, next * dim);
                if !self.attention.is_empty() {
                    self.attention[next] = self.attention[i];
                }
            }
            next += 1;
        }
        self.positions.truncate(next);
        self.keys.truncate(next * dim);
        self.values.truncate(next * dim);
        self.attention.truncate(next);
        // A prefill's tokens are mostly dropped at once; the room for them goes back, with some left to grow into.
        if self.positions.capacity() > next + 2 * ROOM {
            self.positions.shrink_to(next + ROOM);
            self.keys.shrink_to((next + ROOM) * dim);
            self.values.shrink_to((next + ROOM) * dim);
            self.attention.shrink_to(next + ROOM);
        }
    }
}

/// Room for `more` numbers, at least `step` where there is not enough.
fn make_room<T>(list: &mut Vec<T>, more: usize, step: usize) {
    if list.capacity() - list.len() < more {
        list.reserve_exact(more.max(step));
    }
}

/// See the module; states are kept as `T`.
#[derive(Clone)]
pub(crate) struct Evicting<E, T> {
    shape: ModelShape,
    evict: E,
    /// By layer, then KV head.
    slots: Vec<Vec<Slots<T>>>,
    len: usize,
    step: usize,
}

impl<E: Evict + Clone + 'static, T: Float + 'static> Evicting<E, T> {
    pub(crate) fn new(shape: &ModelShape, evict: E) -> Self {
        let slots = vec![vec![Slots::default(); shape.kv_heads]; shape.layers];
        Self { shape: *shape, evict, slots, len: 0, step: 0 }
    }
}

/// Columns `head` of `x (tokens, kv_heads, dim)` appended to `to`.
fn take_head(x: &[f32], head: usize, shape: &ModelShape, to: &mut Vec<f32>) {
    let dim = shape.head_dim;
    for token in x.chunks_exact(shape.kv_dim()) {
        to.extend_from_slice(&token[head * dim..(head + 1) * dim]);
    }
}

fn widened<T: Float>(x: &[T], room: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len() + room);
    out.resize(x.len(), 0.0);
    T::widen(x, &mut out);
    out
}

/// Calls `f(first, vectors)` with stored vectors widened, [`BLOCK`] at a time.
fn in_blocks<T: Float>(x: &[T], dim: usize, mut f: impl FnMut(usize, &[f32])) {
    with_buffer(BLOCK * dim, |wide| {
        for (i, x) in x.chunks(BLOCK * dim).enumerate() {
            let wide = &mut wide[..x.len()];
            T::widen(x, wide);
            f(i * BLOCK, wide);
        }
    });
}

/// Attention of the step's queries of one KV head over its slots and the step; gives rows `(tokens, group, dim)` and
/// adds the attention that each held token receives from the queries of the tokens `counted` to
/// `received (slots + tokens)`.
fn attend_head<T: Float>(
    shape: &ModelShape,
    slots: &Slots<T>,
    (layer, head, len): (usize, usize, usize),
    states: States<'_>,
    counted: Range<usize>,
    received: &mut [f32],
) -> Vec<f32> {
    let States { q, k, v, sink_scores } = states;
    let (dim, group) = (shape.head_dim, shape.group());
    let tokens = k.len() / shape.kv_dim();
    let held = slots.positions.len();
    let few = tokens * group <= FEW;
    let stored = |x: &[T]| if few { Vec::new() } else { widened(x, tokens * dim) };
    let (mut keys, mut values) = (stored(&slots.keys), stored(&slots.values));
    take_head(k, head, shape, &mut keys);
    take_head(v, head, shape, &mut values);
    let mut out = vec![0.0; tokens * group * dim];
    for (tile, out) in out.chunks_mut(TILE * group * dim).enumerate() {
        let first = tile * TILE;
        let rows = out.len() / dim;
        let width = held + (first + TILE).min(tokens);
        with_buffer(rows * (width + dim), |buffer| {
            let (scores, queries) = buffer.split_at_mut(rows * width);
            for (row, query) in queries.chunks_exact_mut(dim).enumerate() {
                let from = ((first + row / group) * shape.heads + head * group + row % group) * dim;
                query.iter_mut().zip(&q[from..from + dim]).for_each(|(d, s)| *d = s * shape.scale);
            }
            if few {
                in_blocks(&slots.keys, dim, |at, x| loops::dots(x, dim, queries, width, &mut scores[at..]));
                loops::dots(&keys, dim, queries, width, &mut scores[held..]);
            } else {
                mul_transposed(View::new(queries, rows, dim, dim), View::new(&keys, width, dim, dim), scores);
            }
            attend::cap(shape, scores);
            for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
                let token = first + row / group;
                scores[held + token + 1..].fill(f32::NEG_INFINITY);
                if shape.window_of(layer).is_some() {
                    let start = shape.first_seen(layer, len + token);
                    for (s, &p) in scores.iter_mut().zip(&slots.positions) {
                        if (p as usize) < start {
                            *s = f32::NEG_INFINITY;
                        }
                    }
                    scores[held..held + start.saturating_sub(len)].fill(f32::NEG_INFINITY);
                }
                let sink = sink_scores.get(head * group + row % group).copied().unwrap_or(f32::NEG_INFINITY);
                let top = largest(scores).max(sink);
                let factor = 1.0 / (exp_sum(scores, top) + (sink - top).exp());
                scores.iter_mut().for_each(|s| *s *= factor);
                if counted.contains(&token) {
                    received.iter_mut().zip(&*scores).for_each(|(r, p)| *r += p);
                }
            }
            if few {
                in_blocks(&slots.values, dim, |at, x| loops::add_vectors(x, dim, &scores[at..], width, out));
                loops::add_vectors(&values, dim, &scores[held..], width, out);
            } else {
                add_product(scores, rows, View::new(&values, width, dim, dim), out, dim);
            }
        });
    }
    out
}

impl<E: Evict + Clone + 'static, T: Float + Number + Send + Sync + 'static> KvCache for Evicting<E, T> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        received: &mut Vec<f32>,
    ) -> Result<()> {
        let (shape, len) = (self.shape, self.len);
        let tokens = states.tokens(&shape);
        let heads = self.slots[layer].par_iter().enumerate().map(|(head, slots)| {
            let counted = self.evict.counted(len, tokens);
            let ranked = if counted.is_empty() { 0 } else { slots.positions.len() + tokens };
            let mut received = vec![0.0; ranked];
            let rows = attend_head(&shape, slots, (layer, head, len), states, counted, &mut received);
            (rows, received)
        });
        let heads: Vec<(Vec<f32>, Vec<f32>)> = heads.collect();
        let width = shape.group() * shape.head_dim;
        for (i, part) in out.chunks_exact_mut(width).enumerate() {
            let (token, head) = (i / shape.kv_heads, i % shape.kv_heads);
            part.copy_from_slice(&heads[head].0[token * width..(token + 1) * width]);
        }
        received.clear();
        heads.iter().for_each(|(_, of_head)| received.extend(of_head));
        Ok(())
    }

    /// `received` holds, head by head, what each held and each new token received, or nothing.
    fn store(&mut self, layer: usize, states: States<'_>, mut received: &[f32]) -> Result<()> {
        let (shape, len, evict) = (self.shape, self.len, &self.evict);
        self.step = states.tokens(&shape);
        let mut jobs = Vec::with_capacity(shape.kv_heads);
        for slots in &mut self.slots[layer] {
            let (own, others) = received.split_at((slots.positions.len() + self.step).min(received.len()));
            received = others;
            jobs.push((slots, own));
        }
        jobs.into_par_iter().enumerate().for_each(|(head, (slots, received))| {
            slots.take(&shape, evict, (layer, head, len), states, received);
        });
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.len += std::mem::take(&mut self.step);
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.len, len, || match len {
            0 => Ok(()),
            _ => Err(DROPPED),
        })?;
        if len == 0 {
            *self = Self::new(&self.shape, self.evict.clone());
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        for slots in self.slots.iter().flatten() {
            total.states += (slots.keys.capacity() + slots.values.capacity()) * size_of::<T>();
            total.state += (slots.positions.capacity() + slots.attention.capacity()) * size_of::<u32>();
        }
        total
    }

    /// Heads may hold different tokens: the i-th vector of each head is its i-th held token, and `positions` are
    /// those of head 0. Where a sliding window has left heads with different numbers, the newest of each are given.
    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.shape, layer)?;
        let dim = self.shape.head_dim;
        let order = |slots: &Slots<T>| {
            let mut order: Vec<usize> = (0..slots.positions.len()).collect();
            order.sort_by_key(|&i| slots.positions[i]);
            order
        };
        let layer = &self.slots[layer];
        let orders: Vec<Vec<usize>> = layer.iter().map(order).collect();
        let common = orders.iter().map(Vec::len).min().unwrap_or(0);
        let orders: Vec<&[usize]> = orders.iter().map(|o| &o[o.len() - common..]).collect();
        let mut restored = Restored::default();
        for i in 0..common {
            restored.positions.push(layer[0].positions[orders[0][i]] as usize);
            for (slots, order) in layer.iter().zip(&orders) {
                let at = order[i] * dim..(order[i] + 1) * dim;
                restored.keys.extend(slots.keys[at.clone()].iter().map(|x| x.get()));
                restored.values.extend(slots.values[at].iter().map(|x| x.get()));
            }
        }
        Ok(restored)
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        for slots in self.slots.iter_mut().flatten() {
            archive.numbers(&mut slots.positions)?;
            archive.numbers(&mut slots.keys)?;
            archive.numbers(&mut slots.values)?;
            archive.numbers(&mut slots.attention)?;
            let (held, numbers) = (slots.positions.len(), slots.positions.len() * self.shape.head_dim);
            let ranked = if self.evict.remembers() { held } else { 0 };
            damaged(slots.positions.iter().all(|&p| (p as usize) < self.len))?;
            damaged(slots.keys.len() == numbers && slots.values.len() == numbers)?;
            damaged(slots.attention.len() == ranked)?;
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}
