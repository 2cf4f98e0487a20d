//! Slots of a sequence whose method drops tokens: blocks of 16 for all KV heads of layers that see as far, with the states,
//! the position and, where it decides, the attention received of each token.

use half::f16;
use minicache_core::settings::StoreType;
use minicache_core::{Footprint, Restored, Scheme, Side, Store, StoreCount};

use super::PartCache;
use crate::Result;
use crate::device::Device;
use crate::driver::{Address, bytes_of_mut};
use crate::evicting::Evicting;
use crate::method::{Method, RECENT};
use crate::pool::Piece;
use crate::table::Table;

/// The slots of a sequence.
#[derive(Debug)]
pub(crate) struct Slots {
    /// Of layers without and with a sliding window.
    tables: [Table; 2],
    /// How many slots a KV head of each has, at most; after the step in progress, too.
    held: [usize; 2],
    next: [usize; 2],
    /// The keys of a KV head of each, as the host counts them; values are as many bytes.
    stores: [StoreCount; 2],
    /// How many each KV head of each layer has: i32, on the device.
    counts: Piece,
}

/// Where a layer's slots are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotLayer {
    /// Of the two tables.
    pub(crate) table: usize,
    /// In its blocks.
    pub(crate) layer: usize,
}

impl Method {
    fn is_windowed(&self, layer: usize) -> bool {
        self.shape.window_of(layer).is_some()
    }

    /// Where the slots of a layer are.
    pub(crate) fn slot_layer(&self, layer: usize) -> SlotLayer {
        let windowed = self.is_windowed(layer);
        let before = self.layers.start..layer;
        let layer = before.filter(|&l| self.is_windowed(l) == windowed).count();
        SlotLayer { table: usize::from(windowed), layer }
    }

    /// Bytes of the states in a block of 16 slots of one KV head, and of what is kept beside them.
    fn slot_bytes(&self, evicting: &Evicting) -> (usize, usize) {
        let states = 2 * RECENT * self.shape.head_dim * self.exact().bytes();
        (states, RECENT * size_of::<u32>() * if evicting.remembers() { 2 } else { 1 })
    }

    /// KV heads of the layers of each of the two tables.
    fn slot_heads(&self) -> [usize; 2] {
        [false, true].map(|windowed| {
            let layers = self.layers.clone().filter(|&layer| self.is_windowed(layer) == windowed).count();
            layers * self.shape.kv_heads
        })
    }

    /// Bytes of a block of each of the two tables.
    fn slot_blocks(&self, evicting: &Evicting) -> [usize; 2] {
        let (states, beside) = self.slot_bytes(evicting);
        self.slot_heads().map(|heads| heads * (states + beside))
    }

    /// A layer of each of the two tables, if it has any.
    fn slot_classes(&self) -> [Option<usize>; 2] {
        [false, true].map(|windowed| self.layers.clone().find(|&l| self.is_windowed(l) == windowed))
    }
}

impl Slots {
    pub(super) fn new(device: &Device, method: &Method) -> Result<Self> {
        let counts = device.pool.take(method.layers.len() * method.shape.kv_heads * size_of::<i32>())?;
        let scheme = if method.exact() == StoreType::F16 { Scheme::F16 } else { Scheme::F32 };
        let store = Store::new(1, method.shape.head_dim, scheme, Side::Keys).with_blocks(RECENT).count();
        let stores = [store.clone(), store];
        Ok(Self { tables: Default::default(), held: [0; 2], next: [0; 2], stores, counts })
    }

    /// Addresses of the tables and of the counts.
    pub(super) fn addresses(&self) -> ([Address; 2], Address) {
        (self.tables.each_ref().map(Table::address), self.counts.address())
    }

    /// The most slots that any KV head has.
    pub(crate) fn most(&self) -> usize {
        self.held[0].max(self.held[1])
    }

    /// Likewise after the step in progress.
    pub(crate) fn most_after(&self) -> usize {
        self.next[0].max(self.next[1])
    }

    /// Makes room for what a step of `tokens` tokens after `len` leaves.
    pub(super) fn begin(
        &mut self,
        device: &Device,
        method: &Method,
        evicting: &Evicting,
        (len, tokens): (usize, usize),
    ) -> Result<()> {
        let bytes = method.slot_blocks(evicting);
        for (class, layer) in method.slot_classes().into_iter().enumerate() {
            let Some(layer) = layer else { continue };
            let held = self.held[class];
            let next = evicting.held(&method.shape, layer, (len, tokens), held);
            // Moves write anywhere; where nothing goes, only what comes is written.
            let goes = !evicting.ranking(len, tokens).ranked.is_empty()
                || method.shape.first_seen(layer, len + tokens) > 0;
            let first = if goes { 0 } else { held };
            let blocks = first / RECENT..next.div_ceil(RECENT);
            self.tables[class].writable(device, blocks, bytes[class])?;
            self.next[class] = next;
        }
        Ok(())
    }

    /// Ends a step of so many tokens; blocks beyond what it left are given back.
    pub(super) fn end(&mut self, tokens: usize) {
        self.held = self.next;
        let tables = self.tables.iter_mut().zip(&mut self.stores);
        for ((table, store), held) in tables.zip(self.held) {
            table.truncate(held.div_ceil(RECENT));
            store.push(tokens);
            store.truncate(held);
        }
    }

    pub(super) fn fork(&self, device: &Device) -> Result<Self> {
        let counts = device.pool.take(self.counts.bytes())?;
        device.driver.copy(counts.address(), self.counts.address(), self.counts.bytes())?;
        let [a, b] = &self.tables;
        let (tables, stores) = ([a.fork(device)?, b.fork(device)?], self.stores.clone());
        Ok(Self { tables, held: self.held, next: self.held, stores, counts })
    }

    /// Bytes of its pieces of memory.
    pub(super) fn allocated(&self) -> usize {
        self.counts.bytes() + self.tables.iter().map(Table::bytes).sum::<usize>()
    }

    /// What the host counts for so many tokens, of as many in all heads of layers that see as far.
    pub(super) fn count(&self, method: &Method, evicting: &Evicting, total: &mut Footprint) {
        let (_, beside) = method.slot_bytes(evicting);
        for ((heads, store), held) in method.slot_heads().into_iter().zip(&self.stores).zip(self.held) {
            total.states += heads * 2 * store.bytes().total();
            total.state += heads * held.div_ceil(RECENT) * beside;
        }
    }
}

/// What a KV head holds of one token.
struct Token {
    position: usize,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl PartCache {
    /// As [`minicache_core::KvCache::restored`] of a method that drops tokens: of each head the tokens by position, the
    /// newest of each where a window has left heads with different numbers.
    pub(crate) fn restored_slots(&self, layer: usize) -> Result<Restored> {
        let (method, mut restored) = (&self.method, Restored::default());
        let (Some(slots), Some(evicting)) = (&self.slots, &method.evicting) else { return Ok(restored) };
        let kv_heads = method.shape.kv_heads;
        let mut counts = vec![0i32; method.layers.len() * kv_heads];
        self.device.driver.download(slots.counts.address(), bytes_of_mut(&mut counts))?;
        let first = (layer - method.layers.start) * kv_heads;
        let mut heads = Vec::new();
        for (head, &count) in counts[first..first + kv_heads].iter().enumerate() {
            let mut tokens = self.tokens_of(slots, evicting, (layer, head), count as usize)?;
            tokens.sort_by_key(|token| token.position);
            heads.push(tokens);
        }
        let common = heads.iter().map(Vec::len).min().unwrap_or(0);
        for i in 0..common {
            for (head, tokens) in heads.iter().enumerate() {
                let token = &tokens[tokens.len() - common + i];
                if head == 0 {
                    restored.positions.push(token.position);
                }
                restored.keys.extend(&token.key);
                restored.values.extend(&token.value);
            }
        }
        Ok(restored)
    }

    fn tokens_of(
        &self,
        slots: &Slots,
        evicting: &Evicting,
        (layer, head): (usize, usize),
        count: usize,
    ) -> Result<Vec<Token>> {
        let (method, dim) = (&self.method, self.method.shape.head_dim);
        let (states, beside) = method.slot_bytes(evicting);
        let SlotLayer { table, layer } = method.slot_layer(layer);
        let at = (layer * method.shape.kv_heads + head) * (states + beside);
        let mut tokens = Vec::new();
        for piece in slots.tables[table].pieces.iter().flatten().take(count.div_ceil(RECENT)) {
            let mut block = vec![0u8; states + beside];
            self.device.driver.download(piece.address() + at as Address, &mut block)?;
            let (rows, positions) = block.split_at(states);
            let number = |i: usize| match method.exact() {
                StoreType::F16 => f16::from_le_bytes([rows[2 * i], rows[2 * i + 1]]).to_f32(),
                StoreType::F32 => f32::from_le_bytes(rows.as_chunks().0[i]),
            };
            let row = |i: usize| (i * dim..(i + 1) * dim).map(number).collect::<Vec<_>>();
            for (i, position) in positions.as_chunks().0.iter().take(RECENT).enumerate() {
                let position = u32::from_le_bytes(*position) as usize;
                tokens.push(Token { position, key: row(i), value: row(RECENT + i) });
            }
        }
        tokens.truncate(count);
        Ok(tokens)
    }
}
