//! The stored states of one side of one group of layers: latents, and exact states before and after them.

use std::ops::Range;

use rayon::prelude::*;

use crate::archive::{Archive, damaged};
use crate::methods::Latent;
use crate::settings::ModelShape;

use super::plan::{Plan, Set};
use crate::lane::Lane;
use crate::plain::Plain;
use crate::scaled::Scaled;
use crate::scratch::with_buffer;
use crate::store::{Side, Store};
use crate::view::{Segment, SideView};
use crate::{Footprint, Precision, Result};

/// Tokens of a step up to which a group's states wait for its end, when all groups are encoded side by side.
pub(super) const LATE: usize = 8;

/// Tokens of a block of the first ones, at most.
const SINK_BLOCK: usize = 32;

/// The stored states of one side of one group.
#[derive(Clone)]
pub(super) struct Coded {
    /// Latents of each set of heads.
    pub(super) latents: Vec<Store>,
    /// States per layer: of the first tokens, exact, and of those newer than the latents, exact or in eight bits.
    pub(super) sinks: Vec<Store>,
    pub(super) recent: Vec<Box<dyn Lane>>,
    /// This step's states of the layers that are done.
    waiting: Vec<Vec<f32>>,
}

impl Coded {
    pub(super) fn new<T>(plan: &Plan<T>, side: Side, spec: &Latent, shape: &ModelShape) -> Self {
        let exact = crate::methods::exact(spec.dtype);
        // A handful of tokens: laid out token by token, because a block of keys takes 16.
        let sinks = Store::new(shape.kv_heads, shape.head_dim, exact, Side::Values)
            .with_blocks(spec.sinks.clamp(1, SINK_BLOCK));
        let recent: Box<dyn Lane> = match spec.side(side).residual_bits {
            None => Plain::boxed(exact_recent(side, spec, shape)),
            Some(_) => Box::new(Scaled::new(shape, spec.magnitudes, side).for_window()),
        };
        let precision = Precision::of(spec.activation_bits, spec.magnitudes);
        let latents = |s: &Set<T>| s.coding.store(side).with_precision(precision).with_waiting(spec.dtype);
        Self {
            latents: plan.sets.iter().map(latents).collect(),
            sinks: vec![sinks; plan.layers],
            recent: vec![recent; plan.layers],
            waiting: vec![Vec::new(); plan.layers],
        }
    }

    /// Writes or reads what it holds, of a sequence of `len` tokens.
    pub(super) fn archive(&mut self, archive: &mut Archive<'_>, len: usize) -> Result<()> {
        for store in self.latents.iter_mut().chain(&mut self.sinks) {
            store.archive(archive)?;
        }
        self.recent.iter_mut().try_for_each(|lane| lane.archive(archive))?;
        let alike = |stores: &[Store]| stores.iter().all(|s| s.len() == stores[0].len());
        let recent = self.recent.iter().all(|lane| lane.len() == self.recent[0].len());
        damaged(alike(&self.latents) && alike(&self.sinks) && recent)?;
        // Those that are newer than the latents count from the first of these.
        let after = len.checked_sub(self.first_latent());
        let recent = self.recent[0].len();
        damaged(match recent {
            0 => after == Some(self.latent_len()),
            _ => after == Some(recent) && self.recent[0].start() <= self.latent_len(),
        })
    }

    /// Tokens that have become latents.
    fn latent_len(&self) -> usize {
        self.latents[0].len()
    }

    /// Positions held exactly at the front.
    pub(super) fn first_latent(&self) -> usize {
        self.sinks[0].len()
    }

    /// First position held exactly at the end.
    fn first_recent(&self) -> usize {
        self.first_latent() + self.latent_len()
    }

    /// Keeps the states of one layer until those of all layers of the group are there; says whether they are.
    pub(super) fn wait(&mut self, layer: usize, rows: &[f32]) -> bool {
        self.waiting[layer].clear();
        self.waiting[layer].extend_from_slice(rows);
        layer + 1 == self.waiting.len()
    }

    /// Whether states of all layers are kept.
    pub(super) fn is_complete(&self) -> bool {
        self.waiting.last().is_some_and(|rows| !rows.is_empty())
    }

    /// Stores what is kept of all layers: what is older than `residual` tokens becomes latents by
    /// `encode(set of heads, states per layer, first position)`.
    pub(super) fn take(
        &mut self,
        (sinks, residual): (usize, usize),
        encode: impl Fn(usize, &[&[f32]], usize, &mut [f32]) + Sync,
    ) {
        let width = self.sinks[0].heads() * self.sinks[0].dim();
        let tokens = self.waiting[0].len() / width;
        let to_sinks = sinks.saturating_sub(self.first_latent()).min(tokens);
        for (l, waiting) in self.waiting.iter().enumerate() {
            self.sinks[l].push(&waiting[..to_sinks * width]);
        }
        if residual == 0 {
            let states: Vec<&[f32]> = self.waiting.iter().map(|w| &w[to_sinks * width..]).collect();
            let first = self.first_recent();
            encode_to(&mut self.latents, tokens - to_sinks, |set, z| encode(set, &states, first, z));
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

    fn encode_older(&mut self, residual: usize, encode: impl Fn(usize, &[&[f32]], usize, &mut [f32]) + Sync) {
        let (heads, dim) = (self.sinks[0].heads(), self.sinks[0].dim());
        // Indices of `recent` count from the first latent.
        let from = self.latent_len();
        let range = from..self.recent[0].len().saturating_sub(residual).max(from);
        if range.is_empty() {
            return;
        }
        let states: Vec<Vec<f32>> = self
            .recent
            .iter()
            .map(|lane| {
                let mut rows = vec![0.0; range.len() * heads * dim];
                SideView::from(lane.segment(range.clone())).read_all(range.start, (heads, dim), &mut rows);
                rows
            })
            .collect();
        let states: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
        let first = self.first_recent();
        encode_to(&mut self.latents, range.len(), |set, z| encode(set, &states, first, z));
        self.recent.iter_mut().for_each(|s| s.drop_before(range.end));
    }

    /// Whether it can be as if it had never had more than the first `len` tokens.
    pub(super) fn can_truncate(
        &self,
        len: usize,
        (sinks, residual): (usize, usize),
    ) -> std::result::Result<(), &'static str> {
        let latents = len.saturating_sub(sinks + residual);
        if residual > 0 && self.latent_len() > latents {
            return Err("newer tokens have become latents already");
        }
        self.latents.iter().try_for_each(|store| store.can_truncate(latents.min(store.len())))
    }

    /// Forgets the tokens from `len` on; [`Coded::can_truncate`] has said that it can.
    pub(super) fn truncate(&mut self, len: usize) {
        let after = len.saturating_sub(self.first_latent());
        self.sinks.iter_mut().for_each(|store| store.truncate(len));
        self.latents.iter_mut().for_each(|store| store.truncate(after));
        self.recent.iter_mut().for_each(|store| store.truncate(after));
        // Of a step that was given up.
        self.waiting.iter_mut().for_each(Vec::clear);
    }

    pub(super) fn start(&self) -> usize {
        // The first tokens go in blocks, and may be there when what follows them has gone.
        match self.latents.iter().map(Store::start).max() {
            Some(dropped) if dropped > 0 => self.first_latent() + dropped,
            _ => self.sinks[0].start(),
        }
    }

    pub(super) fn drop_before(&mut self, position: usize) {
        let first = self.first_latent();
        self.sinks.iter_mut().for_each(|s| s.drop_before(position.min(first)));
        let latent = position.saturating_sub(first).min(self.latent_len());
        self.latents.iter_mut().for_each(|l| l.drop_before(latent));
    }

    pub(super) fn footprint(&self) -> Footprint {
        let mut out = Footprint::default();
        for bytes in self.latents.iter().map(Store::bytes) {
            out.latents += bytes.codes;
            out.scales += bytes.scales;
            out.residual += bytes.residual;
        }
        out.retained += self.sinks.iter().map(|s| s.bytes().total()).sum::<usize>();
        out.residual += self.recent.iter().map(|lane| lane.footprint().total()).sum::<usize>();
        out.residual += self.waiting.iter().map(|w| w.capacity() * size_of::<f32>()).sum::<usize>();
        out
    }

    /// How the first `len` tokens of a layer of the group lie; `latents(positions, first index)` is the segment of what has
    /// become latents.
    pub(super) fn view<'a>(
        &'a self,
        layer: usize,
        len: usize,
        latents: impl FnOnce(Range<usize>, usize) -> Segment<'a>,
    ) -> SideView<'a> {
        let (start, a, b) = (self.start(), self.first_latent(), self.first_recent());
        let sinks = (start < a).then(|| Segment::new(start..a, &self.sinks[layer], start));
        let from = start.max(a);
        let recent = (b < len).then(|| self.recent[layer].segment(b - a..len - a).later(a));
        sinks.into_iter().chain([latents(from..b.max(from), from - a)]).chain(recent).collect()
    }
}

/// An empty store for a layer's newest tokens, where they are exact.
pub(super) fn exact_recent(side: Side, spec: &Latent, shape: &ModelShape) -> Store {
    let exact = crate::methods::exact(spec.dtype);
    Store::new(shape.kv_heads, shape.head_dim, exact, side).for_window()
}

/// Appends the latents of `tokens` tokens to each store: `encode(index, z)` adds them to zeros.
fn encode_to(latents: &mut [Store], tokens: usize, encode: impl Fn(usize, &mut [f32]) + Sync) {
    let each = |(set, store): (usize, &mut Store)| {
        with_buffer(tokens * store.dim(), |z| {
            z.fill(0.0);
            encode(set, z);
            store.push(z);
        });
    };
    match tokens > LATE {
        true => latents.par_iter_mut().enumerate().for_each(each),
        false => latents.iter_mut().enumerate().for_each(each),
    }
}
