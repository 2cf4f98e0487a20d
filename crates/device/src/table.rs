//! Tables of pieces of memory, which kernels read and forks share.

use std::sync::Arc;

use crate::Result;
use crate::device::Device;
use crate::driver::{Address, bytes_of};
use crate::pool::Piece;

/// A table of pieces, here and on the device.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) pieces: Vec<Option<Arc<Piece>>>,
    memory: Option<Piece>,
    /// Entries that the device's copy has room for.
    room: usize,
    /// Entries that have been given back.
    dropped: usize,
}

impl Table {
    pub(crate) fn address(&self) -> Address {
        self.memory.as_ref().map_or(0, Piece::address)
    }

    /// The table of a fork: the same pieces.
    pub(crate) fn fork(&self, device: &Device) -> Result<Self> {
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
    pub(crate) fn writable(
        &mut self,
        device: &Device,
        range: std::ops::Range<usize>,
        bytes: usize,
    ) -> Result<()> {
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
    pub(crate) fn drop_before(&mut self, end: usize) {
        let end = end.min(self.pieces.len());
        for piece in self.pieces.iter_mut().take(end).skip(self.dropped) {
            *piece = None;
        }
        self.dropped = self.dropped.max(end);
    }

    /// Bytes of its pieces and of its own.
    pub(crate) fn bytes(&self) -> usize {
        let own = self.memory.as_ref().map_or(0, Piece::bytes);
        own + self.pieces.iter().flatten().map(|p| p.bytes()).sum::<usize>()
    }

    /// Gives back the entries from `end` on.
    pub(crate) fn truncate(&mut self, end: usize) {
        self.pieces.truncate(end);
        if end == 0 {
            self.dropped = 0;
        }
    }
}
