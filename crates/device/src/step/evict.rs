//! Steps of methods that drop tokens: attention over slots, who receives how much of it, who stays.

use std::cell::Cell;

use super::expect::{ExpectRoom, ExpectStep};
use super::{DeviceStates, GroupStep};
use crate::Result;
use crate::device::Device;
use crate::driver::{Address, Memory, bytes_of};
use crate::evicting::Evicting;
use crate::method::Method;
use crate::params::{KeepSlotsParams, RankingEntry, ReceiveParams, RowEntry, SlotPlace, SlotsParams};
use crate::part::PartCache;

/// Slots that a block of `move_slots` has.
const MOVED: usize = 256;

/// Working memory.
#[derive(Debug)]
pub(super) struct EvictRoom {
    rankings: Memory,
    scores: Memory,
    sums: Memory,
    received: Memory,
    ranked: Memory,
    sources: Memory,
    movers: Memory,
    kept: Memory,
    pub(super) expect: Option<ExpectRoom>,
}

impl EvictRoom {
    fn new(device: &Device) -> Result<Self> {
        let one = || Memory::new(&device.driver, 256);
        Ok(Self {
            rankings: one()?,
            scores: one()?,
            sums: one()?,
            received: one()?,
            ranked: one()?,
            sources: one()?,
            movers: one()?,
            kept: one()?,
            expect: None,
        })
    }
}

/// What the launches of a step are made of.
#[derive(Debug)]
pub(super) struct EvictStep {
    evicting: Evicting,
    rankings: Address,
    /// Tiles of rows that count, and their number: those of long steps first.
    tiles: Address,
    long_tiles: usize,
    all_tiles: usize,
    /// Candidates of all sequences, and of the one that has most.
    total: usize,
    most: usize,
    /// Slots held before and after, of the sequence that has most.
    pub(super) held: usize,
    after: usize,
    /// Whether a step is longer than one token.
    long: bool,
    /// The layer whose scores of single rows are in working memory.
    scored: Cell<Option<usize>>,
    expect: Option<ExpectStep>,
}

impl EvictStep {
    /// The step of `caches`, if they drop tokens; makes room for it.
    pub(super) fn new(
        device: &Device,
        method: &Method,
        caches: &[(&mut PartCache, usize)],
        room: &mut Option<Box<EvictRoom>>,
    ) -> Result<Option<Self>> {
        let Some(evicting) = &method.evicting else { return Ok(None) };
        let room = match room {
            Some(room) => room,
            none => none.insert(Box::new(EvictRoom::new(device)?)),
        };
        let shape = &method.shape;
        let square = if shape.head_dim <= 128 { 32 } else { 16 };
        let mut step = Self {
            evicting: evicting.clone(),
            rankings: 0,
            tiles: 0,
            long_tiles: 0,
            all_tiles: 0,
            total: 0,
            most: 0,
            held: 0,
            after: 0,
            long: false,
            scored: Cell::new(None),
            expect: None,
        };
        let (mut rankings, mut offsets) = (Vec::new(), Vec::new());
        let (mut rows, mut tiles) = (0, [Vec::new(), Vec::new()]);
        for (index, (cache, tokens)) in caches.iter().enumerate() {
            let (slots, tokens) = (cache.slots(), *tokens);
            let ranking = evicting.ranking(cache.len(), tokens);
            rankings.push(RankingEntry {
                from: ranking.ranked.start as i32,
                to: ranking.ranked.end as i32,
                most: ranking.most as i32,
                counted: ranking.counted.start as i32,
                offset: step.total as i32,
                expected: i32::from(evicting.expects(cache.len(), tokens)),
            });
            offsets.push(step.total);
            let starts = (ranking.counted.start / square * square..ranking.counted.end).step_by(square);
            let starts = starts.filter(|_| !ranking.counted.is_empty());
            tiles[usize::from(tokens == 1)]
                .extend(starts.map(|first| RowEntry { sequence: index as i32, position: first as i32 }));
            let candidates = slots.map_or(0, |s| s.most()) + tokens;
            step.total += candidates;
            step.most = step.most.max(candidates);
            step.held = step.held.max(slots.map_or(0, |s| s.most()));
            step.after = step.after.max(slots.map_or(0, |s| s.most_after()));
            step.long |= tokens > 1;
            rows += tokens;
        }
        (step.long_tiles, step.all_tiles) = (tiles[0].len(), tiles[0].len() + tiles[1].len());
        let mut bytes = bytes_of(&rankings).to_vec();
        let at = bytes.len() as Address;
        tiles.iter().for_each(|tiles| bytes.extend_from_slice(bytes_of(tiles)));
        step.rankings = room.rankings.reserve(bytes.len())?;
        step.tiles = step.rankings + at;
        device.driver.upload(step.rankings, &bytes)?;
        let heads = caches.len() * shape.kv_heads;
        if evicting.ranks_single_rows() {
            room.scores.reserve(caches.len() * shape.heads * step.held * size_of::<f32>())?;
        }
        if step.all_tiles > 0 {
            room.sums.reserve(rows * shape.heads * 2 * size_of::<f32>())?;
        }
        for memory in [&mut room.received, &mut room.ranked, &mut room.sources, &mut room.movers] {
            memory.reserve(shape.kv_heads * step.total * size_of::<f32>())?;
        }
        room.kept.reserve(heads * 2 * size_of::<i32>())?;
        step.expect = ExpectStep::new(device, method, caches, (&offsets, step.total), &mut room.expect)?;
        Ok(Some(step))
    }
}

impl GroupStep {
    fn slot_place(&self, step: &EvictStep, layer: usize) -> SlotPlace {
        let place = self.method.slot_layer(layer);
        SlotPlace {
            table: place.table as i32,
            layer: place.layer as i32,
            counts: (layer - self.method.layers.start) as i32,
            remembers: i32::from(step.evicting.remembers()),
        }
    }

    /// Parts of attention over what is held.
    pub(super) fn attend_slots(&self, step: &EvictStep, layer: usize, q: Address) -> Result<()> {
        if self.splits == 0 {
            return Ok(());
        }
        let Some(room) = &self.room.evict else { return Ok(()) };
        let shape = &self.method.shape;
        let scores = if step.evicting.ranks_single_rows() { room.scores.address() } else { 0 };
        let params = SlotsParams {
            q,
            sequences: self.sequences,
            rows: self.row_entries,
            parts: self.room.parts.address(),
            scores,
            place: self.slot_place(step, layer),
            splits: self.splits as i32,
            length: self.length as i32,
            window: shape.window_of(layer).unwrap_or(0) as i32,
            stride: step.held as i32,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
        };
        let heads = shape.kv_heads * self.method.passes();
        self.launch("attend_slots", [self.rows * self.splits, heads, 1], &params)?;
        if scores != 0 {
            step.scored.set(Some(layer));
        }
        Ok(())
    }

    /// Takes a layer's new tokens and drops what the method says.
    pub(super) fn evict(&self, step: &EvictStep, layer: usize, states: DeviceStates) -> Result<()> {
        let Some(room) = &self.room.evict else { return Ok(()) };
        let (shape, place) = (&self.method.shape, self.slot_place(step, layer));
        let saved = step.scored.get() == Some(layer);
        let (window, softcap) = (shape.window_of(layer).unwrap_or(0) as i32, shape.softcap.unwrap_or(0.0));
        let tiles = if saved { step.long_tiles } else { step.all_tiles };
        if states.q != 0 && tiles > 0 {
            let params = ReceiveParams {
                q: states.q,
                k: states.k,
                sequences: self.sequences,
                rankings: step.rankings,
                tiles: step.tiles,
                sums: room.sums.address(),
                received: room.received.address(),
                place,
                window,
                total: step.total as i32,
                saved: i32::from(saved),
                scale: shape.scale,
                softcap,
                pad: 0,
            };
            let square = if shape.head_dim <= 128 { 32 } else { 16 };
            self.launch("weigh", [tiles, shape.heads, 1], &params)?;
            let grid = [step.most.div_ceil(square), shape.kv_heads, self.count];
            self.launch("receive", grid, &params)?;
        }
        if let Some(expect) = &step.expect {
            self.expect(expect, step.rankings, (room.received.address(), step.total), states)?;
        }
        let params = KeepSlotsParams {
            q: states.q,
            k: states.k,
            v: states.v,
            sequences: self.sequences,
            rankings: step.rankings,
            scores: room.scores.address(),
            received: room.received.address(),
            ranked: room.ranked.address(),
            sources: room.sources.address(),
            movers: room.movers.address(),
            kept: room.kept.address(),
            place,
            window,
            total: step.total as i32,
            stride: step.held as i32,
            saved: i32::from(saved),
            kernel: step.evicting.kernel() as i32,
            scale: shape.scale,
            softcap,
            pad: 0,
        };
        self.launch("keep_slots", [self.count, shape.kv_heads, 1], &params)?;
        if step.long {
            let grid = [step.after.div_ceil(MOVED), shape.kv_heads, self.count];
            self.launch("move_slots", grid, &params)?;
        }
        Ok(())
    }
}
