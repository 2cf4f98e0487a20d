//! The part of a sequence's cache that is on one device: tables of pieces of memory that the kernels read, and what the
//! host has to know to hand them out: lengths. Forks share pieces until one of them writes.

mod rotary;
mod slots;

use std::sync::Arc;

use minicache_core::Footprint;

use crate::device::Device;
use crate::driver::{Address, bytes_of, bytes_of_mut};
use crate::method::{Method, PAGE, RECENT, Side};
use crate::pool::Piece;
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
}
// SAFETY: 24 bytes of numbers, without padding.
unsafe impl crate::driver::Plain for KeptHead {}

/// A table of pieces, here and on the device.
#[derive(Debug, Default)]
struct Table {
    pieces: Vec<Option<Arc<Piece>>>,
    memory: Option<Piece>,
    /// Entries that the device's copy has room for.
    room: usize,
    /// Entries that have been given back.
    dropped: usize,
}

impl Table {
    fn address(&self) -> Address {
        self.memory.as_ref().map_or(0, Piece::address)
    }

    fn bytes(&self) -> usize {
        self.pieces.iter().flatten().map(|p| p.bytes()).sum()
    }

    /// The table of a fork: the same pieces.
    fn fork(&self, device: &Device) -> Result<Self> {
        let mut table = Self { pieces: self.pieces.clone(), dropped: self.dropped, ..Self::default() };
        if self.room > 0 {
            table.make_room(device, self.room)?;
        }
        Ok(table)
    }

    fn make_room(&mut self, device: &Device, entries: usize) -> Result<()> {
        if entries > self.room {
            let room = entries.next_power_of_two().max(16);
            self.memory = Some(device.pool.take(room * size_of::<Address>())?);
            self.room = room;
            self.upload(device, 0)?;
        }
        Ok(())
    }

    fn upload(&self, device: &Device, from: usize) -> Result<()> {
        let entries: Vec<Address> =
            self.pieces[from..].iter().map(|p| p.as_ref().map_or(0, |p| p.address())).collect();
        if entries.is_empty() {
            return Ok(());
        }
        device.driver.upload(self.address() + (from * size_of::<Address>()) as Address, bytes_of(&entries))
    }

    /// Makes the entries `range` writable pieces of `bytes`: new ones where there are none, copies of shared ones.
    fn writable(&mut self, device: &Device, range: std::ops::Range<usize>, bytes: usize) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.pieces.len() < range.end {
            self.pieces.resize(range.end, None);
        }
        let mut changed = None;
        for i in range.clone() {
            let piece = match &self.pieces[i] {
                Some(piece) if Arc::strong_count(piece) == 1 => continue,
                Some(shared) => {
                    let own = device.pool.take(bytes)?;
                    device.driver.copy(own.address(), shared.address(), bytes)?;
                    own
                }
                None => device.pool.take(bytes)?,
            };
            self.pieces[i] = Some(Arc::new(piece));
            changed = changed.or(Some(i));
        }
        let had = self.room;
        self.make_room(device, range.end)?;
        match changed {
            Some(first) if had == self.room => self.upload(device, first),
            _ => Ok(()),
        }
    }

    /// Gives back the entries before `end`. The kernels do not look at them any more.
    fn drop_before(&mut self, end: usize) {
        let end = end.min(self.pieces.len());
        for piece in self.pieces.iter_mut().take(end).skip(self.dropped) {
            *piece = None;
        }
        self.dropped = self.dropped.max(end);
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
#[derive(Debug, Default)]
struct SideTables {
    blocks: Table,
    recent: Table,
    magnitudes: Table,
    kept: KeptSide,
}

/// The part of a sequence's cache that is on one device.
#[derive(Debug)]
pub struct PartCache {
    pub(crate) device: Arc<Device>,
    pub(crate) method: Arc<Method>,
    sides: [SideTables; 2],
    /// In place of `sides`, of methods that drop tokens.
    slots: Option<Slots>,
    pub(crate) rotary: SequenceRotary,
    pub(crate) len: usize,
    /// Tokens of the step in progress.
    pub(crate) step: usize,
}

impl PartCache {
    pub(crate) fn new(device: &Arc<Device>, method: &Arc<Method>) -> Result<Self> {
        let mut sides: [SideTables; 2] = Default::default();
        for (tables, side) in sides.iter_mut().zip(&method.sides) {
            if side.keeps {
                let count = side.pairs * side.columns;
                let none = KeptHead { blocks: 0, count: 0, least: 3e38, most: -3e38, least_kept: 3e38 };
                let heads = device.pool.take(count * size_of::<KeptHead>())?;
                device.driver.upload(heads.address(), bytes_of(&vec![none; count]))?;
                tables.kept.heads = Some(heads);
                tables.kept.tables.resize_with(count, Table::default);
                tables.kept.counts = vec![0; count];
            }
        }
        let slots = method.evicting.as_ref().map(|_| Slots::new(device, method)).transpose()?;
        let (device, method, rotary) = (device.clone(), method.clone(), SequenceRotary::default());
        Ok(Self { device, method, sides, slots, rotary, len: 0, step: 0 })
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
            self.step = tokens;
            return Ok(());
        }
        let end = len + tokens;
        for (index, side) in method.sides.iter().enumerate() {
            let tables = &mut self.sides[index];
            let (before, after) = (side.packed(len), side.packed(end));
            if after > before {
                let blocks = before / side.slots()..after.div_ceil(side.slots());
                tables.blocks.writable(&device, blocks, side.block_bytes().0)?;
            }
            if side.is_packed() && end > after {
                let recent = after.max(len) / RECENT..end.div_ceil(RECENT);
                tables.recent.writable(&device, recent, side.recent_bytes())?;
            }
            if side.has_magnitudes {
                let pages = len / PAGE..end.div_ceil(PAGE);
                tables.magnitudes.writable(&device, pages, side.page_bytes())?;
            }
            if side.keeps && tokens == 1 {
                self.room_for_kept(index, 1)?;
            }
        }
        self.step = tokens;
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
        let none = KeptHead { blocks: 0, count: 0, least: 0.0, most: 0.0, least_kept: 0.0 };
        let mut heads = vec![none; kept.tables.len()];
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
    pub(crate) fn end(&mut self) {
        self.len += std::mem::take(&mut self.step);
        if let Some(slots) = &mut self.slots {
            return slots.end();
        }
        let needed = self.method.first_needed(self.len);
        for (tables, side) in self.sides.iter_mut().zip(&self.method.sides) {
            tables.recent.drop_before(side.packed(self.len) / RECENT);
            tables.blocks.drop_before(needed / side.slots());
            tables.magnitudes.drop_before(needed / PAGE);
        }
    }

    pub(crate) fn try_fork(&self) -> Result<Self> {
        let mut sides: [SideTables; 2] = Default::default();
        for (to, from) in sides.iter_mut().zip(&self.sides) {
            to.blocks = from.blocks.fork(&self.device)?;
            to.recent = from.recent.fork(&self.device)?;
            to.magnitudes = from.magnitudes.fork(&self.device)?;
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
            }
        }
        let slots = self.slots.as_ref().map(|slots| slots.fork(&self.device)).transpose()?;
        let (device, method, rotary) = (self.device.clone(), self.method.clone(), self.rotary.clone());
        Ok(Self { device, method, sides, slots, rotary, len: self.len, step: 0 })
    }

    pub(crate) fn count(&self, total: &mut Footprint) {
        if let (Some(slots), Some(evicting)) = (&self.slots, &self.method.evicting) {
            return slots.count(&self.method, evicting, total);
        }
        for (tables, side) in self.sides.iter().zip(&self.method.sides) {
            Self::count_side(tables, side, total);
        }
    }

    fn count_side(tables: &SideTables, side: &Side, total: &mut Footprint) {
        let (block, scales) = side.block_bytes();
        let count = tables.blocks.pieces.iter().flatten().count();
        // A block has the stores of merged pairs first, then those of single layers.
        let merged = |bytes: usize| bytes * side.pairs / side.stores.max(1);
        let codes = count * (block - scales);
        total.directions += merged(codes);
        total.states += codes - merged(codes);
        total.scales += count * scales;
        total.residual += tables.recent.bytes();
        total.magnitudes += tables.magnitudes.bytes();
        total.retained += tables.kept.tables.iter().map(Table::bytes).sum::<usize>();
    }
}
