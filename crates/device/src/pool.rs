//! Memory of a device in pieces of few sizes, which come and go with sequences.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::driver::{Address, Driver, Memory};
use crate::{Error, Result};

/// Pieces are cut from allocations of a quarter of what is held, between these sizes: asking the driver takes milliseconds.
const CHUNKS: [usize; 2] = [16 << 20, 2 << 30];

/// Pieces are multiples of this.
const GRAIN: usize = 256;

/// Pieces of memory, given out and taken back without asking the driver.
#[derive(Debug)]
pub struct Pool {
    driver: Arc<dyn Driver>,
    inner: Mutex<Inner>,
    held: AtomicUsize,
}

#[derive(Debug, Default)]
struct Inner {
    /// Free pieces by size: their chunk and address.
    free: HashMap<usize, Vec<(usize, Address)>>,
    /// Chunks, with how many of their pieces are out.
    chunks: HashMap<usize, (Memory, usize)>,
    next: usize,
}

/// A zeroed piece, which goes back when it is dropped.
#[derive(Debug)]
pub struct Piece {
    pool: Arc<Pool>,
    chunk: usize,
    address: Address,
    bytes: usize,
}

impl Piece {
    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size, as it is counted.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut inner = self.pool.lock();
        inner.free.entry(self.bytes).or_default().push((self.chunk, self.address));
        if let Some((_, out)) = inner.chunks.get_mut(&self.chunk) {
            *out -= 1;
        }
        self.pool.held.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.pool.driver.checked() {
            Pool::give_back(&mut inner);
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(driver: &Arc<dyn Driver>) -> Arc<Self> {
        Arc::new(Self { driver: driver.clone(), inner: Mutex::default(), held: AtomicUsize::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes given out.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes that have been asked of the driver.
    pub fn reserved(&self) -> usize {
        self.lock().chunks.values().map(|(memory, _)| memory.bytes()).sum()
    }

    /// A zeroed piece of at least `bytes`.
    ///
    /// # Errors
    /// No memory.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Piece> {
        // A checker is to see where what is asked for ends.
        let bytes = if self.driver.checked() { bytes.max(1) } else { bytes.max(1).next_multiple_of(GRAIN) };
        let mut inner = self.lock();
        let free = inner.free.get_mut(&bytes).and_then(Vec::pop);
        let (chunk, address) = match free {
            Some(piece) => {
                self.driver.clear(piece.1, bytes)?;
                piece
            }
            None => self.cut(&mut inner, bytes)?,
        };
        if let Some((_, out)) = inner.chunks.get_mut(&chunk) {
            *out += 1;
        }
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Ok(Piece { pool: self.clone(), chunk, address, bytes })
    }

    /// A new chunk, of which the first piece is taken.
    fn cut(&self, inner: &mut Inner, bytes: usize) -> Result<(usize, Address)> {
        let chunk = (self.held() / 4).clamp(CHUNKS[0], CHUNKS[1]);
        let count = if self.driver.checked() { 1 } else { (chunk / bytes).max(1) };
        let memory = Memory::new(&self.driver, bytes * count).or_else(|e| {
            // What no sequence needs any more may be of other sizes.
            Self::give_back(inner);
            match e {
                Error::Memory { .. } => {
                    Memory::new(&self.driver, bytes * count).or_else(|_| Memory::new(&self.driver, bytes))
                }
                other => Err(other),
            }
        })?;
        let (id, first) = (inner.next, memory.address());
        inner.next += 1;
        let count = memory.bytes() / bytes;
        let rest = (1..count).rev().map(|i| (id, first + (i * bytes) as Address));
        inner.free.entry(bytes).or_default().extend(rest);
        inner.chunks.insert(id, (memory, 0));
        Ok((id, first))
    }

    /// Frees the chunks of which no piece is out.
    fn give_back(inner: &mut Inner) {
        inner.chunks.retain(|_, (_, out)| *out > 0);
        let Inner { free, chunks, .. } = inner;
        free.values_mut().for_each(|pieces| pieces.retain(|(chunk, _)| chunks.contains_key(chunk)));
    }
}
