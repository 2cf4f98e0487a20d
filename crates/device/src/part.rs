//! The part of a sequence's cache that is on one device: tables of pieces of memory that the kernels read, and what the
//! host has to know to hand them out: lengths. Forks share pieces until one of them writes.

mod rotary;
mod slots;

use std::sync::Arc;

use minicache_core::{DECIDED, DROPPED, Footprint, GONE, StoreCount};

use crate::device::Device;
use crate::driver::{Address, Memory, bytes_of, bytes_of_mut};
use crate::held::Held;
use crate::method::{Method, PAGE, RECENT, Side};
use crate::params::{ForgetParams, SequenceEntry, launch};
use crate::pool::Piece;
use crate::table::Table;
use crate::{Error, Result};
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

/// What is kept exact of one column of one pair, as kernels have it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KeptHead {
    blocks: Address,
    pub(crate) count: i32,
    least: f32,
    most: f32,
    least_kept: f32,
    settled: i32,
    from: i32,
    before: i32,
    settled_before: i32,
    least_before: f32,
    most_before: f32,
    least_kept_before: f32,
    pad: i32,
}
// SAFETY: 56 bytes of numbers, without padding.
unsafe impl crate::driver::Plain for KeptHead {}

impl KeptHead {
    /// Of no tokens.
    const NONE: Self = Self {
        blocks: 0,
        count: 0,
        least: 3e38,
        most: -3e38,
        least_kept: 3e38,
        settled: 0,
        from: 0,
        before: -1,
        settled_before: 0,
        least_before: 3e38,
        most_before: -3e38,
        least_kept_before: 3e38,
        pad: 0,
    };

    /// What the rule knew before the step after `len` tokens, if that has been here.
    fn taken_back(self, len: usize) -> Self {
        if self.before != len as i32 {
            return self;
        }
        let Self { settled_before, least_before, most_before, least_kept_before, .. } = self;
        Self {
            settled: settled_before,
            least: least_before,
            most: most_before,
            least_kept: least_kept_before,
            ..self
        }
    }
}

/// What becomes of tokens that `forget` is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Forgotten {
    LeftBehind,
    TakenBack,
}

/// What is kept of one column, as the host counts it: a store of each layer, and the list of positions.
#[derive(Debug, Clone)]
struct KeptCount {
    store: StoreCount,
    /// Positions in the list, and those that it has room for: what has been given back leaves its room.
    listed: usize,
    room: usize,
}

impl KeptCount {
    /// Of `count` tokens in all, no fewer than so far.
    fn reach(&mut self, count: usize) {
        for _ in self.store.len()..count {
            self.store.push(1);
            self.listed += 1;
            if self.listed > self.room {
                // As a vector grows.
                self.room = (2 * self.room).max(4);
            }
        }
    }

    fn bytes(&self) -> usize {
        2 * self.store.bytes().total() + self.room * size_of::<u32>()
    }
}

/// Tokens kept exact on one side: a table for each column of each pair.
#[derive(Debug, Default)]
struct KeptSide {
    tables: Vec<Table>,
    /// The device's array of [`KeptHead`].
    heads: Option<Piece>,
    /// How many each column kept when the device was last asked.
    counts: Vec<usize>,
    /// Tokens since then.
    since: usize,
    /// By column, of no more tokens than are kept.
    held: Vec<KeptCount>,
}

impl KeptSide {
    /// Whether `more` tokens have room, in pieces that nobody else has, whatever became of those since.
    fn has_room(&self, more: usize) -> bool {
        self.tables.iter().zip(&self.counts).all(|(table, &count)| {
            let open = table.pieces.iter().skip(count / RECENT).flatten();
            count + self.since + more <= table.pieces.len() * RECENT
                && open.into_iter().all(|piece| Arc::strong_count(piece) == 1)
        })
    }
}

/// One side of a sequence.
#[derive(Debug)]
struct SideTables {
    blocks: Table,
    recent: Table,
    magnitudes: Table,
    kept: KeptSide,
    sinks: Table,
    held: Held,
}

impl SideTables {
    fn new(side: &Side) -> Self {
        Self {
            blocks: Table::default(),
            recent: Table::default(),
            magnitudes: Table::default(),
            kept: KeptSide::default(),
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
                let count = side.pairs * side.columns;
                let heads = device.pool.take(count * size_of::<KeptHead>())?;
                device.driver.upload(heads.address(), bytes_of(&vec![KeptHead::NONE; count]))?;
                tables.kept.heads = Some(heads);
                tables.kept.tables.resize_with(count, Table::default);
                tables.kept.counts = vec![0; count];
                let none = KeptCount { store: side.kept_count.clone(), listed: 0, room: 0 };
                tables.kept.held = vec![none; count];
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
            kept: of(|s| s.kept.heads.as_ref().map_or(0, Piece::address)),
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
            if side.keeps && tokens == 1 {
                self.room_for_kept(index, 1)?;
            }
        }
        (self.step, self.stored) = (tokens, false);
        Ok(())
    }

    /// Makes room for `more` kept tokens in every column of a side; asks the device for their number only where the room
    /// might not do.
    fn room_for_kept(&mut self, side: usize, more: usize) -> Result<()> {
        if !self.sides[side].kept.has_room(more) {
            let heads = self.kept_heads(side)?;
            for (column, head) in heads.iter().enumerate() {
                self.extend_kept(side, column, head.count as usize, more)?;
            }
            self.counted(side, &heads);
        }
        self.sides[side].kept.since += more;
        Ok(())
    }

    fn counted(&mut self, side: usize, heads: &[KeptHead]) {
        let kept = &mut self.sides[side].kept;
        kept.counts = heads.iter().map(|head| head.count as usize).collect();
        kept.since = 0;
    }

    /// What a side's columns keep now.
    fn kept_heads(&self, side: usize) -> Result<Vec<KeptHead>> {
        let kept = &self.sides[side].kept;
        let mut heads = vec![KeptHead::NONE; kept.tables.len()];
        if let Some(piece) = &kept.heads {
            self.device.driver.download(piece.address(), bytes_of_mut(&mut heads))?;
        }
        Ok(heads)
    }

    /// Makes the blocks of the kept tokens `count .. count + more` of a column writable.
    fn extend_kept(&mut self, side: usize, column: usize, count: usize, more: usize) -> Result<()> {
        let bytes = self.method.sides[side].kept_bytes();
        let kept = &mut self.sides[side].kept;
        let table = &mut kept.tables[column];
        let before = table.address();
        let end = (count + more).div_ceil(RECENT).max(table.pieces.len());
        table.writable(&self.device, count / RECENT..end, bytes)?;
        if table.address() != before
            && let Some(heads) = &kept.heads
        {
            let at = heads.address() + (column * size_of::<KeptHead>()) as Address;
            self.device.driver.upload(at, bytes_of(&[table.address()]))?;
        }
        Ok(())
    }

    /// Makes room for what a long step has just decided to keep.
    pub(crate) fn settle_kept(&mut self, side: usize) -> Result<()> {
        let now = self.kept_heads(side)?;
        for (column, head) in now.iter().enumerate() {
            // No fewer were kept before than when the device was last asked.
            let (from, to) = (self.sides[side].kept.counts[column], head.count as usize);
            if to > from {
                self.extend_kept(side, column, from, to - from)?;
            }
        }
        self.counted(side, &now);
        Ok(())
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
            if start > before && tables.kept.heads.is_some() {
                self.leave_behind(index, start)?;
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
        for side in 0..2 {
            if let Some(piece) = &self.sides[side].kept.heads {
                let heads = self.kept_heads(side)?;
                let heads: Vec<KeptHead> = heads.into_iter().map(|head| head.taken_back(self.len)).collect();
                self.device.driver.upload(piece.address(), bytes_of(&heads))?;
            }
        }
        self.truncate(self.len)?;
        Ok(true)
    }

    /// Gives back what is kept of a side before a position.
    fn leave_behind(&mut self, side: usize, position: usize) -> Result<()> {
        let heads = self.kept_heads(side)?;
        let gone = self.forget(side, position, Forgotten::LeftBehind)?;
        let kept = &mut self.sides[side].kept;
        for (column, (head, gone)) in heads.iter().zip(gone).enumerate() {
            let held = &mut kept.held[column];
            held.reach(head.count as usize);
            held.store.drop_before(gone);
            held.listed -= gone - head.from as usize;
            kept.tables[column].drop_before(held.store.blocks()[0].start);
        }
        Ok(())
    }

    /// See [`crate::DeviceCache::compile`].
    pub(crate) fn compile(&self) -> Result<()> {
        self.device.kernels(&self.method).map(drop)
    }

    /// Has the device forget kept tokens of a side before or after a position; gives the first index from there on, by
    /// column.
    fn forget(&self, side: usize, position: usize, how: Forgotten) -> Result<Vec<usize>> {
        let columns = self.sides[side].kept.tables.len();
        let kernels = self.device.kernels(&self.method)?;
        let entry = SequenceEntry { tables: self.tables(), len: self.len as i32, first: 0, rows: 0, pad: 0 };
        let sequence = Memory::of(&self.device.driver, bytes_of(&[entry]))?;
        let out = Memory::new(&self.device.driver, columns * size_of::<i32>())?;
        let params = ForgetParams {
            sequence: sequence.address(),
            out: out.address(),
            side: side as i32,
            columns: columns as i32,
            position: position as i32,
            how: how as i32,
        };
        // SAFETY: the sequence has so many columns on this side, and `out` a number for each.
        unsafe { launch(&*self.device.driver, kernels.of("forget")?, [1, 1, 1], &params)? };
        let mut found = vec![0i32; columns];
        self.device.driver.download(out.address(), bytes_of_mut(&mut found))?;
        Ok(found.into_iter().map(|at| at as usize).collect())
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
            if ranked == 0 || !self.method.merging.has_rule() || self.sides[side].kept.heads.is_none() {
                continue;
            }
            if self.kept_heads(side)?.iter().any(|head| ranked < head.settled as usize) {
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
            if self.sides[side].kept.heads.is_some() {
                self.take_back(side, len)?;
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

    /// Gives back what is kept of a side from position `len` on.
    fn take_back(&mut self, side: usize, len: usize) -> Result<()> {
        let before = self.kept_heads(side)?;
        let left = match len {
            0 => vec![0; before.len()],
            _ => self.forget(side, len, Forgotten::TakenBack)?,
        };
        let kept = &mut self.sides[side].kept;
        for (column, (head, left)) in before.iter().zip(&left).enumerate() {
            let held = &mut kept.held[column];
            held.reach(head.count as usize);
            held.store.truncate(*left);
            held.listed = held.listed.min(left.saturating_sub(head.from as usize));
            kept.tables[column].truncate(held.store.blocks()[0].end);
        }
        if len == 0
            && let Some(heads) = &kept.heads
        {
            let none: Vec<KeptHead> =
                kept.tables.iter().map(|t| KeptHead { blocks: t.address(), ..KeptHead::NONE }).collect();
            self.device.driver.upload(heads.address(), bytes_of(&none))?;
        }
        (kept.counts, kept.since) = (left, 0);
        Ok(())
    }

    pub(crate) fn try_fork(&self) -> Result<Self> {
        let mut sides = [0, 1].map(|side: usize| SideTables::new(&self.method.sides[side]));
        for (index, (to, from)) in sides.iter_mut().zip(&self.sides).enumerate() {
            to.blocks = from.blocks.fork(&self.device)?;
            to.recent = from.recent.fork(&self.device)?;
            to.sinks = from.sinks.fork(&self.device)?;
            to.magnitudes = from.magnitudes.fork(&self.device)?;
            to.held = from.held.clone();
            (to.kept.counts, to.kept.since) = (from.kept.counts.clone(), from.kept.since);
            to.kept.tables = from.kept.tables.iter().map(|t| t.fork(&self.device)).collect::<Result<_>>()?;
            if let Some(heads) = &from.kept.heads {
                let own = self.device.pool.take(heads.bytes())?;
                self.device.driver.copy(own.address(), heads.address(), heads.bytes())?;
                for (column, table) in to.kept.tables.iter().enumerate() {
                    let at = own.address() + (column * size_of::<KeptHead>()) as Address;
                    self.device.driver.upload(at, bytes_of(&[table.address()]))?;
                }
                to.kept.heads = Some(own);
                to.kept.held = self.kept_counts(index).clone();
            }
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

    /// What a side's columns keep now, counted; as far as is known, where the device does not answer.
    fn kept_counts(&self, side: usize) -> Vec<KeptCount> {
        let kept = &self.sides[side].kept;
        let mut held = kept.held.clone();
        match self.kept_heads(side) {
            Ok(heads) => held.iter_mut().zip(heads).for_each(|(held, head)| held.reach(head.count as usize)),
            Err(_) => held.iter_mut().zip(&kept.counts).for_each(|(held, count)| held.reach(*count)),
        }
        held
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
            total.retained += self.kept_counts(index).iter().map(KeptCount::bytes).sum::<usize>();
        }
    }

    /// Bytes of its pieces of memory.
    pub(crate) fn allocated(&self) -> usize {
        let sides = self.sides.iter();
        let tables = sides
            .flat_map(|s| [&s.blocks, &s.recent, &s.magnitudes, &s.sinks].into_iter().chain(&s.kept.tables));
        if let Some(slots) = &self.slots {
            return slots.allocated();
        }
        let heads = self.sides.iter().flat_map(|s| &s.kept.heads).map(Piece::bytes).sum::<usize>();
        heads + tables.map(Table::bytes).sum::<usize>()
    }
}
