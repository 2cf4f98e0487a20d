//! Tokens kept exact beside a merged store, on one side of a sequence: a table of blocks for each column of each pair. How
//! many are kept is decided on the device, which is asked where room might not last.

use std::sync::Arc;

use minicache_core::StoreCount;

use crate::Result;
use crate::device::Device;
use crate::driver::{Address, bytes_of, bytes_of_mut};
use crate::method::{RECENT, Side};
use crate::pool::Piece;
use crate::table::Table;

/// What is kept exact of one column of one pair, as kernels have it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct KeptHead {
    blocks: Address,
    count: i32,
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

/// See the module.
#[derive(Debug)]
pub(super) struct KeptSide {
    tables: Vec<Table>,
    /// The device's array of [`KeptHead`].
    heads: Piece,
    /// Bytes of a block.
    block: usize,
    /// How many each column kept when the device was last asked.
    counts: Vec<usize>,
    /// Tokens since then.
    since: usize,
    /// By column, of no more tokens than are kept.
    held: Vec<KeptCount>,
}

impl KeptSide {
    /// None kept.
    pub(super) fn new(device: &Device, side: &Side) -> Result<Self> {
        let count = side.pairs * side.columns;
        let heads = device.pool.take(count * size_of::<KeptHead>())?;
        device.driver.upload(heads.address(), bytes_of(&vec![KeptHead::NONE; count]))?;
        let none = KeptCount { store: side.kept_count.clone(), listed: 0, room: 0 };
        Ok(Self {
            tables: (0..count).map(|_| Table::default()).collect(),
            heads,
            block: side.kept_bytes(),
            counts: vec![0; count],
            since: 0,
            held: vec![none; count],
        })
    }

    /// Where kernels find it.
    pub(super) fn address(&self) -> Address {
        self.heads.address()
    }

    /// Columns of all pairs.
    pub(super) fn columns(&self) -> usize {
        self.tables.len()
    }

    /// Makes room for `more` tokens in every column; asks the device for their number only where the room might not do.
    pub(super) fn make_room(&mut self, device: &Arc<Device>, more: usize) -> Result<()> {
        if !self.has_room(more) {
            let heads = self.ask(device)?;
            for (column, head) in heads.iter().enumerate() {
                self.extend(device, column, head.count as usize, more)?;
            }
            self.asked(&heads);
        }
        self.since += more;
        Ok(())
    }

    /// Whether `more` tokens have room, in pieces that nobody else has, whatever became of those since.
    fn has_room(&self, more: usize) -> bool {
        self.tables.iter().zip(&self.counts).all(|(table, &count)| {
            let open = table.pieces.iter().skip(count / RECENT).flatten();
            count + self.since + more <= table.pieces.len() * RECENT
                && open.into_iter().all(|piece| Arc::strong_count(piece) == 1)
        })
    }

    /// Makes room for what a long step has just decided to keep.
    pub(super) fn settle(&mut self, device: &Arc<Device>) -> Result<()> {
        let now = self.ask(device)?;
        for (column, head) in now.iter().enumerate() {
            // No fewer were kept before than when the device was last asked.
            let (from, to) = (self.counts[column], head.count as usize);
            if to > from {
                self.extend(device, column, from, to - from)?;
            }
        }
        self.asked(&now);
        Ok(())
    }

    /// What columns keep now.
    pub(super) fn ask(&self, device: &Device) -> Result<Vec<KeptHead>> {
        let mut heads = vec![KeptHead::NONE; self.tables.len()];
        device.driver.download(self.heads.address(), bytes_of_mut(&mut heads))?;
        Ok(heads)
    }

    fn asked(&mut self, heads: &[KeptHead]) {
        self.counts = heads.iter().map(|head| head.count as usize).collect();
        self.since = 0;
    }

    /// Makes the blocks of the tokens `count .. count + more` of a column writable.
    fn extend(&mut self, device: &Arc<Device>, column: usize, count: usize, more: usize) -> Result<()> {
        let table = &mut self.tables[column];
        let before = table.address();
        let end = (count + more).div_ceil(RECENT).max(table.pieces.len());
        table.writable(device, count / RECENT..end, self.block)?;
        if table.address() != before {
            let at = self.heads.address() + (column * size_of::<KeptHead>()) as Address;
            device.driver.upload(at, bytes_of(&[table.address()]))?;
        }
        Ok(())
    }

    /// Whether more than the first `ranked` tokens have had a say in which are kept.
    pub(super) fn decided(&self, device: &Device, ranked: usize) -> Result<bool> {
        Ok(self.ask(device)?.iter().any(|head| ranked < head.settled as usize))
    }

    /// Has the rule know what it knew before the step after `len` tokens.
    pub(super) fn roll_back(&self, device: &Device, len: usize) -> Result<()> {
        let heads: Vec<KeptHead> = self.ask(device)?.into_iter().map(|head| head.taken_back(len)).collect();
        device.driver.upload(self.heads.address(), bytes_of(&heads))
    }

    /// Gives back what is kept before the index `gone` of each column, which the device has just forgotten; `before` is what
    /// it said until then.
    pub(super) fn leave_behind(&mut self, before: &[KeptHead], gone: &[usize]) {
        let own = self.held.iter_mut().zip(&mut self.tables);
        for ((held, table), (head, &gone)) in own.zip(before.iter().zip(gone)) {
            held.reach(head.count as usize);
            held.store.drop_before(gone);
            held.listed -= gone - head.from as usize;
            table.drop_before(held.store.blocks()[0].start);
        }
    }

    /// Likewise of what is kept from the index `left` on.
    pub(super) fn take_back(&mut self, before: &[KeptHead], left: Vec<usize>) {
        let own = self.held.iter_mut().zip(&mut self.tables);
        for ((held, table), (head, &left)) in own.zip(before.iter().zip(&left)) {
            held.reach(head.count as usize);
            held.store.truncate(left);
            held.listed = held.listed.min(left.saturating_sub(head.from as usize));
            table.truncate(held.store.blocks()[0].end);
        }
        (self.counts, self.since) = (left, 0);
    }

    /// Gives back everything; the rule knows nothing any more.
    pub(super) fn clear(&mut self, device: &Device) -> Result<()> {
        let before = self.ask(device)?;
        self.take_back(&before, vec![0; before.len()]);
        let none = |t: &Table| KeptHead { blocks: t.address(), ..KeptHead::NONE };
        let none: Vec<KeptHead> = self.tables.iter().map(none).collect();
        device.driver.upload(self.heads.address(), bytes_of(&none))
    }

    /// A copy that shares blocks.
    pub(super) fn fork(&self, device: &Arc<Device>) -> Result<Self> {
        let tables: Vec<Table> = self.tables.iter().map(|t| t.fork(device)).collect::<Result<_>>()?;
        let heads = device.pool.take(self.heads.bytes())?;
        device.driver.copy(heads.address(), self.heads.address(), self.heads.bytes())?;
        for (column, table) in tables.iter().enumerate() {
            let at = heads.address() + (column * size_of::<KeptHead>()) as Address;
            device.driver.upload(at, bytes_of(&[table.address()]))?;
        }
        let (counts, since) = (self.counts.clone(), self.since);
        let held = self.held_now(device);
        Ok(Self { tables, heads, block: self.block, counts, since, held })
    }

    /// What columns keep now, counted; as far as is known, where the device does not answer.
    fn held_now(&self, device: &Device) -> Vec<KeptCount> {
        let mut held = self.held.clone();
        match self.ask(device) {
            Ok(heads) => held.iter_mut().zip(heads).for_each(|(held, head)| held.reach(head.count as usize)),
            Err(_) => held.iter_mut().zip(&self.counts).for_each(|(held, count)| held.reach(*count)),
        }
        held
    }

    /// Bytes that the host counts for as many.
    pub(super) fn counted(&self, device: &Device) -> usize {
        self.held_now(device).iter().map(KeptCount::bytes).sum()
    }

    /// Bytes of its pieces of memory.
    pub(super) fn allocated(&self) -> usize {
        self.heads.bytes() + self.tables.iter().map(Table::bytes).sum::<usize>()
    }
}
