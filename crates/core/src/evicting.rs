//! The cache of methods that drop tokens: a bounded set of exact states per layer and KV head.

use std::ops::Range;

use rayon::prelude::*;

use crate::archive::{Archive, damaged};
use crate::attend;
use crate::cache::{KvCache, Restored};
use crate::methods::exact;
use crate::received::Received;
use crate::settings::{ModelShape, StoreType};
use crate::states::{States, check_layer, check_truncate};
use crate::store::{Scheme, Side, Store};
use crate::view::{HeadView, Segment, SideView};
use crate::{Footprint, Result};

/// Why a cache that drops tokens cannot go back.
pub const DROPPED: &str = "it drops tokens for good";

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
        some.select_nth_unstable_by(most, |&i, &j| {
            score(j).total_cmp(&score(i)).then(positions[i].cmp(&positions[j]))
        });
        some[most..].iter().for_each(|&i| keep[i] = false);
    }
}

/// An empty cache that drops what `evict` says, with its states stored as `dtype`.
pub(crate) fn evicting(
    shape: &ModelShape,
    dtype: StoreType,
    evict: impl Evict + Clone + 'static,
) -> Box<dyn KvCache> {
    Box::new(Evicting::new(shape, exact(dtype), evict))
}

/// What is held for one KV head of one layer, in no particular order.
#[derive(Clone)]
struct Slots {
    positions: Vec<u32>,
    keys: Store,
    values: Store,
    /// What each token has received so far, of methods that remember it.
    attention: Vec<f32>,
}

impl Slots {
    fn new(shape: &ModelShape, scheme: Scheme) -> Self {
        let store = |side| Store::new(1, shape.head_dim, scheme, side).with_blocks(ROOM);
        let (keys, values) = (store(Side::Keys), store(Side::Values));
        Self { positions: Vec::new(), keys, values, attention: Vec::new() }
    }

    /// None, stored in the same way.
    fn empty(&self) -> Self {
        let (keys, values) = (self.keys.empty(), self.values.empty());
        Self { positions: Vec::new(), keys, values, attention: Vec::new() }
    }

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
        fit(&mut self.positions, tokens);
        self.positions.extend((len..len + tokens).map(|p| p as u32));
        for (store, x) in [(&mut self.keys, states.k), (&mut self.values, states.v)] {
            x.chunks_exact(shape.kv_dim()).for_each(|token| store.push(&token[head * dim..(head + 1) * dim]));
        }
        if evict.remembers() {
            fit(&mut self.attention, tokens);
            self.attention.resize(self.positions.len(), 0.0);
            self.attention.iter_mut().zip(received).for_each(|(a, r)| *a += r);
        }
        let received = if evict.remembers() { &self.attention } else { received };
        let mut keep = vec![true; self.positions.len()];
        evict.keep(&Held { shape, head, len, states, positions: &self.positions, received }, &mut keep);
        let start = shape.first_seen(layer, len + tokens);
        keep.iter_mut().zip(&self.positions).for_each(|(k, &p)| *k &= p as usize >= start);
        self.retain(&keep);
    }

    /// Removes the tokens that are not marked: the last ones take their places.
    fn retain(&mut self, keep: &[bool]) {
        let (mut at, mut end) = (0, keep.len());
        while at < end {
            if !keep[at] {
                end -= 1;
                if !keep[end] {
                    continue;
                }
                self.positions[at] = self.positions[end];
                self.keys.copy_within(end, at);
                self.values.copy_within(end, at);
                if !self.attention.is_empty() {
                    self.attention[at] = self.attention[end];
                }
            }
            at += 1;
        }
        self.positions.truncate(end);
        self.keys.truncate(end);
        self.values.truncate(end);
        self.attention.truncate(end);
        // A prefill's tokens are mostly dropped at once; the room for them goes back.
        fit(&mut self.positions, 0);
        fit(&mut self.attention, 0);
    }

    fn view(&self) -> HeadView<'_> {
        let places = 0..self.positions.len();
        let side = |store| SideView::from(Segment::new(places.clone(), store, 0));
        HeadView { keys: side(&self.keys), values: side(&self.values), positions: &self.positions }
    }
}

/// Gives a list room for `more` numbers and for no others, but for what is lacking to a multiple of [`ROOM`].
fn fit<T>(list: &mut Vec<T>, more: usize) {
    let room = (list.len() + more).next_multiple_of(ROOM);
    if list.capacity() < room {
        list.reserve_exact(room - list.len());
    } else {
        list.shrink_to(room);
    }
}

/// See the module.
#[derive(Clone)]
struct Evicting<E> {
    shape: ModelShape,
    evict: E,
    /// By layer, then KV head.
    slots: Vec<Vec<Slots>>,
    len: usize,
    step: usize,
}

impl<E: Evict + Clone + 'static> Evicting<E> {
    fn new(shape: &ModelShape, scheme: Scheme, evict: E) -> Self {
        let slots = vec![vec![Slots::new(shape, scheme); shape.kv_heads]; shape.layers];
        Self { shape: *shape, evict, slots, len: 0, step: 0 }
    }
}

impl<E: Evict + Clone + 'static> KvCache for Evicting<E> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        all: &mut Vec<f32>,
    ) -> Result<()> {
        let (shape, len, slots) = (&self.shape, self.len, &self.slots[layer]);
        let heads: Vec<HeadView<'_>> = slots.iter().map(Slots::view).collect();
        let tokens = states.tokens(shape);
        let counted = self.evict.counted(len, tokens);
        let received = (!counted.is_empty())
            .then(|| Received::new(counted, tokens, slots.iter().map(|slots| slots.positions.len())));
        attend::attend_heads(shape, layer, &heads, len, states, out, received.as_ref());
        all.clear();
        if let Some(received) = received {
            received.into_sums(all);
        }
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
            self.slots.iter_mut().flatten().for_each(|slots| *slots = slots.empty());
            (self.len, self.step) = (0, 0);
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        for slots in self.slots.iter().flatten() {
            total.states += slots.keys.bytes().total() + slots.values.bytes().total();
            total.state += (slots.positions.capacity() + slots.attention.capacity()) * size_of::<u32>();
        }
        total
    }

    /// Heads may hold different tokens: the i-th vector of each head is its i-th held token, and `positions` are
    /// those of head 0. Where a sliding window has left heads with different numbers, the newest of each are given.
    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.shape, layer)?;
        let order = |slots: &Slots| {
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
                for (store, to) in [(&slots.keys, &mut restored.keys), (&slots.values, &mut restored.values)]
                {
                    let first = to.len();
                    to.resize(first + store.dim(), 0.0);
                    store.read(0, order[i], &mut to[first..]);
                }
            }
        }
        Ok(restored)
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        for slots in self.slots.iter_mut().flatten() {
            archive.numbers(&mut slots.positions)?;
            slots.keys.archive(archive)?;
            slots.values.archive(archive)?;
            archive.numbers(&mut slots.attention)?;
            let held = slots.positions.len();
            let ranked = if self.evict.remembers() { held } else { 0 };
            damaged(slots.positions.iter().all(|&p| (p as usize) < self.len))?;
            damaged([&slots.keys, &slots.values].iter().all(|s| (s.start(), s.len()) == (0, held)))?;
            damaged(slots.attention.len() == ranked)?;
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}
