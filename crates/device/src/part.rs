//! The part of a sequence's cache that is on one device: tables of pieces of memory that the kernels read, and what the
//! host has to know to hand them out: lengths. Forks share pieces until one of them writes.

mod kept;
mod rotary;
mod slots;

use std::sync::Arc;

use minicache_core::{DECIDED, DROPPED, Footprint, GONE};

use crate::device::Device;
use crate::driver::{Address, Memory, bytes_of, bytes_of_mut};
use crate::held::Held;
use crate::method::{Method, PAGE, RECENT, Side};
use crate::params::{ForgetParams, SequenceEntry, launch};
use crate::table::Table;
use crate::{Error, Result};
use kept::KeptSide;
use rotary::SequenceRotary;
use slots::Slots;

/// The tables of a sequence, as kernels have them: by side.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Tables {
    pub(crate) blocks: [Address; 2],
    pub(crate) recent: [Address; 2],
    pub(crate) magnitudes: [Address; 2],
    pub(crate) kept: [Address; 2],
    pub(crate) sinks: [Address; 2],
}

/// What becomes of tokens that `forget` is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Forgotten {
    LeftBehind,
    TakenBack,
}

/// One side of a sequence.
#[derive(Debug)]
struct SideTables {
    blocks: Table,
    recent: Table,
    magnitudes: Table,
    kept: Option<KeptSide>,
    sinks: Table,
    held: Held,
}

impl SideTables {
    fn new(side: &Side) -> Self {
        Self {
            blocks: Table::default(),
            recent: Table::default(),
            magnitudes: Table::default(),
            kept: None,
            sinks: Table::default(),
            held: side.held.clone(),
        }
    }
}

/// The part of a sequence's cache that is on one device.
#[derive(Debug)]
pub(crate) struct PartCache {
    pub(crate) device: Arc<Device>,
    pub(crate) method: Arc<Method>,
    sides: [SideTables; 2],
    /// In place of `sides`, of methods that drop tokens.
    slots: Option<Slots>,
    pub(crate) rotary: SequenceRotary,
    pub(crate) len: usize,
    /// Tokens of the step in progress.
    pub(crate) step: usize,
    /// Whether the step in progress has begun to store.
    pub(crate) stored: bool,
    /// Whether a step has ended since it was new or a fork.
    stepped: bool,
}

impl PartCache {
    pub(crate) fn new(device: &Arc<Device>, method: &Arc<Method>) -> Result<Self> {
        let mut sides = [0, 1].map(|side: usize| SideTables::new(&method.sides[side]));
        for (tables, side) in sides.iter_mut().zip(&method.sides) {
            if side.keeps {
                tables.kept = Some(KeptSide::new(device, side)?);
            }
        }
        let slots = method.evicting.as_ref().map(|_| Slots::new(device, method)).transpose()?;
        let (device, method, rotary) = (device.clone(), method.clone(), SequenceRotary::default());
        Ok(Self { device, method, sides, slots, rotary, len: 0, step: 0, stored: false, stepped: false })
    }

    pub(crate) fn slots(&self) -> Option<&Slots> {
        self.slots.as_ref()
    }

    pub(crate) fn method(&self) -> &Arc<Method> {
        &self.method
    }

    /// Tokens held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn tables(&self) -> Tables {
        if let Some(slots) = &self.slots {
            let (blocks, counts) = slots.addresses();
            return Tables { blocks, kept: [counts, 0], ..Tables::default() };
        }
        let of = |table: fn(&SideTables) -> Address| [table(&self.sides[0]), table(&self.sides[1])];
        Tables {
            blocks: of(|s| s.blocks.address()),
            recent: of(|s| s.recent.address()),
            magnitudes: of(|s| s.magnitudes.address()),
            kept: of(|s| s.kept.as_ref().map_or(0, KeptSide::address)),
            sinks: of(|s| s.sinks.address()),
        }
    }

    /// Makes room for a step of `tokens` tokens, but for those that a long one will keep exact.
    ///
    /// # Errors
    /// No memory; a step before that went wrong after it had begun to store.
    pub(crate) fn begin(&mut self, tokens: usize) -> Result<()> {
        if self.step > 0 {
            return Err(Error::Unsupported(
                "a step of this sequence went wrong on its device; begin it again".into(),
            ));
        }
        let (device, method, len) = (self.device.clone(), self.method.clone(), self.len);
        if let (Some(slots), Some(evicting)) = (&mut self.slots, &method.evicting) {
            slots.begin(&device, &method, evicting, (len, tokens))?;
            (self.step, self.stored) = (tokens, false);
            return Ok(());
        }
        let end = len + tokens;
        if let Some(latents) = &method.latents {
            latents.reach(end)?;
        }
        for (index, side) in method.sides.iter().enumerate() {
            let tables = &mut self.sides[index];
            let (before, after) = (side.packed(len), side.packed(end));
            if after > before {
                let blocks = before / side.slots()..after.div_ceil(side.slots());
                tables.blocks.writable(&device, blocks, side.block_bytes())?;
            }
            // What is not in blocks counts from the first that is no sink.
            let sinks = side.sinks();
            let (from, to) = (len.saturating_sub(sinks), end.saturating_sub(sinks));
            if side.is_packed() && to > after {
                let recent = after.max(from) / RECENT..to.div_ceil(RECENT);
                tables.recent.writable(&device, recent, side.recent_bytes())?;
            }
            if len < sinks {
                let (tokens, bytes) = side.sink_block();
                tables.sinks.writable(&device, len / tokens..end.min(sinks).div_ceil(tokens), bytes)?;
            }
            if side.has_magnitudes {
                let pages = len / PAGE..end.div_ceil(PAGE);
                tables.magnitudes.writable(&device, pages, side.page_bytes())?;
            }
            if let Some(kept) = tables.kept.as_mut().filter(|_| tokens == 1) {
                kept.make_room(&device, 1)?;
            }
        }
        (self.step, self.stored) = (tokens, false);
        Ok(())
    }

    /// Makes room for what a long step has just decided to keep.
    pub(crate) fn settle_kept(&mut self, side: usize) -> Result<()> {
        let Some(kept) = &mut self.sides[side].kept else { return Ok(()) };
        kept.settle(&self.device)
    }

    /// Ends a step: its tokens count as cached, and what nobody needs any more is given back.
    ///
    /// # Errors
    /// Of the device.
    pub(crate) fn end(&mut self) -> Result<()> {
        let tokens = std::mem::take(&mut self.step);
        self.len += tokens;
        self.stepped |= tokens > 0;
        if let Some(slots) = &mut self.slots {
            slots.end(tokens);
            return Ok(());
        }
        let first = self.method.first_seen(self.len);
        for index in 0..2 {
            let tables = &mut self.sides[index];
            let before = tables.held.start();
            tables.held.push(tokens);
            tables.held.drop_before(first);
            let start = tables.held.start();
            let [blocks, recent, sinks] = tables.held.blocks();
            tables.blocks.drop_before(blocks.start);
            tables.recent.drop_before(recent.start);
            tables.sinks.drop_before(sinks.start);
            tables.magnitudes.drop_before(start / PAGE);
            if start > before {
                self.forget(index, start, Forgotten::LeftBehind)?;
            }
        }
        Ok(())
    }

    /// Goes back to what it was before the step that has not ended, if it can: where tokens were dropped for this step's it
    /// cannot, and says so when the next one begins.
    pub(crate) fn roll_back(&mut self) {
        if self.step > 0 && self.try_roll_back().is_ok_and(|done| done) {
            self.step = 0;
        }
    }

    fn try_roll_back(&mut self) -> Result<bool> {
        if !self.stored {
            return Ok(true);
        }
        if self.slots.is_some() && self.len > 0 {
            return Ok(false);
        }
        for kept in self.sides.iter().flat_map(|side| &side.kept) {
            kept.roll_back(&self.device, self.len)?;
        }
        self.truncate(self.len)?;
        Ok(true)
    }

    /// See [`crate::DeviceCache::compile`].
    pub(crate) fn compile(&self) -> Result<()> {
        self.device.kernels(&self.method).map(drop)
    }

    /// Has the device forget kept tokens of a side before or after a position, and gives back their room.
    fn forget(&mut self, side: usize, position: usize, how: Forgotten) -> Result<()> {
        let (tables, device) = (self.tables(), &self.device);
        let Some(kept) = &mut self.sides[side].kept else { return Ok(()) };
        let (columns, before) = (kept.columns(), kept.ask(device)?);
        let kernels = device.kernels(&self.method)?;
        let entry = SequenceEntry { tables, len: self.len as i32, first: 0, rows: 0, pad: 0 };
        let sequence = Memory::of(&device.driver, bytes_of(&[entry]))?;
        let out = Memory::new(&device.driver, columns * size_of::<i32>())?;
        let params = ForgetParams {
            sequence: sequence.address(),
            out: out.address(),
            side: side as i32,
            columns: columns as i32,
            position: position as i32,
            how: how as i32,
        };
        // SAFETY: the sequence has so many columns on this side, and `out` a number for each.
        unsafe { launch(&*device.driver, kernels.of("forget")?, [1, 1, 1], &params)? };
        let mut found = vec![0i32; columns];
        device.driver.download(out.address(), bytes_of_mut(&mut found))?;
        let found: Vec<usize> = found.into_iter().map(|at| at as usize).collect();
        match how {
            Forgotten::LeftBehind => kept.leave_behind(&before, &found),
            Forgotten::TakenBack => kept.take_back(&before, found),
        }
        Ok(())
    }

    /// Why it cannot be as if it had never had more than the first `len` tokens, if it cannot: the host's reason.
    ///
    /// # Errors
    /// Of the device.
    pub(crate) fn cannot_truncate(&self, len: usize) -> Result<Option<&'static str>> {
        if self.slots.is_some() {
            return Ok((len > 0).then_some(DROPPED));
        }
        if len > 0 && self.sides.iter().any(|side| side.held.start() > self.method.first_seen(len)) {
            return Ok(Some(GONE));
        }
        let ranked = len.saturating_sub(self.method.merging.sinks);
        // Side by side, as on the host, so that of two reasons it is the same one.
        for side in 0..2 {
            if let Err(reason) = self.sides[side].held.can_truncate(len) {
                return Ok(Some(reason));
            }
            let Some(kept) = &self.sides[side].kept else { continue };
            if ranked > 0 && self.method.merging.has_rule() && kept.decided(&self.device, ranked)? {
                return Ok(Some(DECIDED));
            }
        }
        Ok(None)
    }

    /// Forgets the tokens from `len` on; [`PartCache::cannot_truncate`] has said that it can.
    ///
    /// # Errors
    /// Of the device.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        if self.slots.is_some() {
            self.slots = Some(Slots::new(&self.device, &self.method)?);
        }
        for side in 0..2 {
            match &mut self.sides[side].kept {
                Some(kept) if len == 0 => kept.clear(&self.device)?,
                _ => self.forget(side, len, Forgotten::TakenBack)?,
            }
            let tables = &mut self.sides[side];
            tables.held.truncate(len);
            let [blocks, recent, sinks] = tables.held.blocks();
            tables.blocks.truncate(blocks.end);
            tables.recent.truncate(recent.end);
            tables.sinks.truncate(sinks.end);
            tables.magnitudes.truncate(len.div_ceil(PAGE));
        }
        (self.len, self.step) = (len, 0);
        Ok(())
    }

    pub(crate) fn try_fork(&self) -> Result<Self> {
        let mut sides = [0, 1].map(|side: usize| SideTables::new(&self.method.sides[side]));
        for (to, from) in sides.iter_mut().zip(&self.sides) {
            to.blocks = from.blocks.fork(&self.device)?;
            to.recent = from.recent.fork(&self.device)?;
            to.sinks = from.sinks.fork(&self.device)?;
            to.magnitudes = from.magnitudes.fork(&self.device)?;
            to.held = from.held.clone();
            to.kept = from.kept.as_ref().map(|kept| kept.fork(&self.device)).transpose()?;
        }
        let slots = self.slots.as_ref().map(|slots| slots.fork(&self.device)).transpose()?;
        let (device, method, rotary) = (self.device.clone(), self.method.clone(), self.rotary.clone());
        Ok(Self {
            device,
            method,
            sides,
            slots,
            rotary,
            len: self.len,
            step: 0,
            stored: false,
            stepped: false,
        })
    }

    /// Adds what the host counts for the same tokens: blocks in the same pages, with what finds them.
    pub(crate) fn count(&self, total: &mut Footprint) {
        if let (Some(slots), Some(evicting)) = (&self.slots, &self.method.evicting) {
            return slots.count(&self.method, evicting, total);
        }
        for (index, side) in self.method.sides.iter().enumerate() {
            // The host keeps rows in which a step's states of the shallower layers wait for the deepest one's; here they are
            // in the working memory of a step.
            let waiting = if self.stepped { self.method.shape.kv_dim() * size_of::<f32>() } else { 0 };
            match &self.sides[index].held {
                Held::Latents(latents) => latents.count(waiting, total),
                Held::Stores(count) => {
                    let (bytes, pairs) = (count.bytes(), side.pairs);
                    total.directions += pairs * bytes.codes;
                    total.states += (side.stores - pairs) * bytes.codes;
                    total.scales += side.stores * bytes.scales;
                    total.residual += side.stores * bytes.residual + pairs * waiting;
                }
            }
            let pages = self.sides[index].magnitudes.pieces.iter().flatten().count();
            total.magnitudes += pages * side.page_bytes();
            let kept = &self.sides[index].kept;
            total.retained += kept.as_ref().map_or(0, |kept| kept.counted(&self.device));
        }
    }

    /// Bytes of its pieces of memory.
    pub(crate) fn allocated(&self) -> usize {
        if let Some(slots) = &self.slots {
            return slots.allocated();
        }
        let sides = self.sides.iter();
        let tables = sides.clone().flat_map(|s| [&s.blocks, &s.recent, &s.magnitudes, &s.sinks]);
        let kept = sides.flat_map(|s| &s.kept).map(KeptSide::allocated);
        tables.map(Table::bytes).chain(kept).sum()
    }
}
