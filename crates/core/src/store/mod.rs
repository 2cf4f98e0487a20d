//! The packed store: one side (keys or values) of one layer, of a pair's shared directions, or of a group's latents.

mod grid;
mod layout;
mod pages;
mod weigh;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use minicache_config::Axis;

use self::grid::{Grid, decode};
use self::layout::{CodeBlock, FloatBlock};
use self::pages::{Pages, shared_bytes};
use crate::kernels::{Float, LANES, Line, Precision, view, view_mut};

/// Tokens of a block of floats.
const BLOCK: usize = 32;

/// Tokens of a block of codes quantised token by token: longer, because values pay for each block with the rounding of
/// its weights. Blocks of codes quantised along channels have a group of tokens each.
const PACKED_BLOCK: usize = 64;

/// How a [`Store`] keeps its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// IEEE single precision.
    F32,
    /// IEEE half precision; finite numbers beyond its range saturate.
    F16,
    /// Asymmetric round-to-nearest codes with an f16 scale and zero per group.
    Quant {
        /// Bits per code: 2, 3, 4 or 8.
        bits: u8,
        /// Numbers that share a scale and a zero; a multiple of 16.
        group: usize,
        /// `Channel`: one channel over `group` tokens, packed when `residual + group` tokens wait. `Token`: `group`
        /// channels of one token, cut at the head's end, packed as soon as `residual` newer tokens are there.
        axis: Axis,
        /// Newest tokens kept in f16.
        residual: usize,
    },
    /// Whole numbers of 0 to 2^bits - 1, as they are: the caller knows what a step is worth.
    Codes {
        /// Bits per code: 2, 3, 4 or 8.
        bits: u8,
    },
}

/// Which operation the layout serves; the other one works too, slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// [`Store::scores`].
    Keys,
    /// [`Store::accumulate`].
    Values,
}

/// Bytes of a [`Store`], counted from its allocations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreBytes {
    /// Codes or floats, with the bookkeeping of their pages.
    pub codes: usize,
    /// Scales and zeros.
    pub scales: usize,
    /// The newest tokens of a quantised store, in f16.
    pub residual: usize,
}

impl StoreBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.residual
    }
}

/// Vectors of `heads * dim` numbers, one per token, appended and dropped at the front, that attention reads where they
/// lie. A clone shares all storage until one of the two writes; then only the page written is copied.
#[derive(Clone)]
pub struct Store {
    heads: usize,
    dim: usize,
    side: Side,
    scheme: Scheme,
    precision: Precision,
    /// Tokens pushed.
    len: usize,
    /// Tokens before this one are in `pages`, the others in `recent`.
    packed: usize,
    block: Block,
    pages: Pages,
    recent: Recent,
}

#[derive(Clone)]
enum Block {
    F32(FloatBlock),
    F16(FloatBlock),
    Codes(Arc<CodeBlock>),
}

/// The newest tokens of a quantised store: a ring of slots, token i in slot i modulo their number. It grows to its
/// final size before it first wraps.
#[derive(Clone)]
struct Recent {
    lines: Arc<[Line]>,
    slots: usize,
    most: usize,
}

impl Store {
    /// An empty store for vectors of `heads` by `dim`.
    ///
    /// # Panics
    /// Bits other than 2, 3, 4 and 8, or a group that is zero or not a multiple of 16.
    pub fn new(heads: usize, dim: usize, scheme: Scheme, side: Side) -> Self {
        let floats = FloatBlock { side, dim, slots: BLOCK };
        let (block, head_lines, most) = match scheme {
            Scheme::F32 => (Block::F32(floats), floats.head_lines::<f32>(), 0),
            Scheme::F16 => (Block::F16(floats), floats.head_lines::<f16>(), 0),
            Scheme::Quant { bits, group, axis, residual } => {
                assert!(matches!(bits, 2 | 3 | 4 | 8), "bits must be 2, 3, 4 or 8, not {bits}");
                assert!(group > 0 && group % LANES == 0, "group must be a multiple of 16, not {group}");
                let (slots, waiting) = match axis {
                    Axis::Channel => (group, residual + group),
                    Axis::Token => (PACKED_BLOCK, residual),
                };
                let codes = CodeBlock::new(side, Some(axis), dim, slots, bits, group);
                let lines = codes.head_lines();
                (Block::Codes(Arc::new(codes)), lines, waiting.next_multiple_of(LANES))
            }
            Scheme::Codes { bits } => {
                assert!(matches!(bits, 2 | 3 | 4 | 8), "bits must be 2, 3, 4 or 8, not {bits}");
                let codes = CodeBlock::new(side, None, dim, PACKED_BLOCK, bits, dim);
                let lines = codes.head_lines();
                (Block::Codes(Arc::new(codes)), lines, 0)
            }
        };
        let recent = Recent { lines: Arc::new([]), slots: 0, most };
        let precision = Precision::default();
        let pages = Pages::new(heads * head_lines);
        Self { heads, dim, side, scheme, precision, len: 0, packed: 0, block, pages, recent }
    }

    /// The same store with its weights rounded otherwise where they meet codes. Floats are weighed in f32 anyway.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Appends tokens: `rows` is `(tokens, heads, dim)`.
    ///
    /// # Panics
    /// A length that is no multiple of `heads * dim`.
    pub fn push(&mut self, rows: &[f32]) {
        let size = self.heads * self.dim;
        assert_eq!(rows.len() % size.max(1), 0, "rows of {size} numbers, not {}", rows.len());
        for row in rows.chunks_exact(size) {
            match self.scheme {
                Scheme::F32 => self.push_float::<f32>(row),
                Scheme::F16 => self.push_float::<f16>(row),
                Scheme::Codes { .. } => {
                    self.pack_codes(row);
                    self.len += 1;
                }
                Scheme::Quant { residual, axis: Axis::Token, .. } => {
                    if residual == 0 {
                        self.pack_token(|head, channel, dim| f16::of(row[head * dim + channel]).to_f32());
                    } else {
                        if self.len - self.packed == residual {
                            self.pack_oldest_token();
                        }
                        self.keep(row);
                    }
                    self.len += 1;
                }
                Scheme::Quant { residual, group, axis: Axis::Channel, .. } => {
                    self.keep(row);
                    self.len += 1;
                    if self.len - self.packed == residual + group {
                        self.pack_block();
                    }
                }
            }
        }
    }

    fn push_float<T: Float>(&mut self, row: &[f32]) {
        let (Block::F32(block) | Block::F16(block)) = self.block else { return };
        let slot = self.len % BLOCK;
        if slot == 0 {
            self.pages.push();
        }
        let lines = self.pages.block_mut(self.len / BLOCK);
        write_token::<T>(lines, block, slot, row);
        self.len += 1;
        self.packed = self.len;
    }

    /// Puts the next token into the ring.
    fn keep(&mut self, row: &[f32]) {
        let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
        let ring = if self.len - self.packed == ring.slots { self.grow(ring) } else { ring };
        let lines = Arc::make_mut(&mut self.recent.lines);
        write_token::<f16>(lines, ring, self.len % ring.slots, row);
    }

    /// More slots for the ring, before it ever wrapped: token i stays in slot i.
    fn grow(&mut self, old: FloatBlock) -> FloatBlock {
        let new = FloatBlock { slots: (old.slots + BLOCK).min(self.recent.most), ..old };
        let (from, to) = (old.head_lines::<f16>(), new.head_lines::<f16>());
        let mut lines: Arc<[Line]> = std::iter::repeat_n(Line::ZERO, self.heads * to).collect();
        let data = Arc::make_mut(&mut lines);
        for head in 0..self.heads {
            let from = view::<f16>(&self.recent.lines[head * from..(head + 1) * from]);
            let to = view_mut::<f16>(&mut data[head * to..(head + 1) * to]);
            for slot in 0..old.slots {
                (0..self.dim).for_each(|c| to[new.index(slot, c)] = from[old.index(slot, c)]);
            }
        }
        self.recent = Recent { lines, slots: new.slots, most: self.recent.most };
        new
    }

    /// Moves the oldest token of the ring into the codes.
    fn pack_oldest_token(&mut self) {
        let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
        let slot = self.packed % ring.slots;
        let lines = Arc::clone(&self.recent.lines);
        let per_head = ring.head_lines::<f16>();
        self.pack_token(|head, channel, _| {
            view::<f16>(&lines[head * per_head..(head + 1) * per_head])[ring.index(slot, channel)].to_f32()
        });
    }

    /// Quantises one token along its channels.
    fn pack_token(&mut self, x: impl Fn(usize, usize, usize) -> f32) {
        let Block::Codes(block) = &self.block else { return };
        let slot = self.packed % block.slots;
        if slot == 0 {
            self.pages.push();
        }
        let lines = self.pages.block_mut(self.packed / block.slots);
        for (head, lines) in lines.chunks_exact_mut(block.head_lines()).enumerate() {
            for channels in block.group_channels() {
                let x = |c| x(head, c, block.dim);
                let grid = Grid::of(channels.clone().map(x), block.bits);
                let (scale, zero) = block.scale_index(slot, channels.start);
                let floats = view_mut::<f16>(lines);
                (floats[scale], floats[zero]) = (grid.scale, grid.zero);
                let bytes = view_mut::<u8>(lines);
                channels.for_each(|c| block.put(bytes, slot, c, grid.code(x(c))));
            }
        }
        self.packed += 1;
    }

    /// Packs one token of codes.
    fn pack_codes(&mut self, row: &[f32]) {
        let Block::Codes(block) = &self.block else { return };
        let slot = self.packed % block.slots;
        if slot == 0 {
            self.pages.push();
        }
        let most = f32::from((1u16 << block.bits) - 1);
        let lines = self.pages.block_mut(self.packed / block.slots).chunks_exact_mut(block.head_lines());
        for (lines, row) in lines.zip(row.chunks_exact(block.dim)) {
            let bytes = view_mut::<u8>(lines);
            let codes = row.iter().map(|x| x.round_ties_even().clamp(0.0, most) as u8);
            codes.enumerate().for_each(|(c, code)| block.put(bytes, slot, c, code));
        }
        self.packed += 1;
    }

    /// Quantises the oldest group of tokens of the ring along tokens, channel by channel.
    fn pack_block(&mut self) {
        let Block::Codes(block) = &self.block else { return };
        let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
        let per_head = ring.head_lines::<f16>();
        self.pages.push();
        let lines = self.pages.block_mut(self.packed / block.slots);
        for (head, lines) in lines.chunks_exact_mut(block.head_lines()).enumerate() {
            let x = view::<f16>(&self.recent.lines[head * per_head..(head + 1) * per_head]);
            for channel in 0..self.dim {
                let x = |i: usize| x[ring.index((self.packed + i) % ring.slots, channel)].to_f32();
                let grid = Grid::of((0..block.slots).map(x), block.bits);
                let (scale, zero) = block.scale_index(0, channel);
                let floats = view_mut::<f16>(lines);
                (floats[scale], floats[zero]) = (grid.scale, grid.zero);
                let bytes = view_mut::<u8>(lines);
                (0..block.slots).for_each(|i| block.put(bytes, i, channel, grid.code(x(i))));
            }
        }
        self.packed += block.slots;
    }

    /// Tokens pushed, dropped ones included: indices stay positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token was pushed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first index still held.
    pub fn start(&self) -> usize {
        (self.pages.first() * self.block_tokens()).min(self.packed)
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Size of one head's vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// How the numbers are kept.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Frees what can be freed of the tokens before `index`: whole pages of packed tokens.
    pub fn drop_before(&mut self, index: usize) {
        let block = index.min(self.packed) / self.block_tokens();
        self.pages.drop_before(block);
    }

    /// One vector as attention sees it: `out` is `(dim)`.
    ///
    /// # Panics
    /// An index that is not held, a head that does not exist, a slice of another length.
    pub fn read(&self, head: usize, index: usize, out: &mut [f32]) {
        self.check(head, &(index..index + 1));
        assert_eq!(out.len(), self.dim);
        if index >= self.packed {
            let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
            return read_token::<f16>(&self.recent.lines, ring, head, index % ring.slots, out);
        }
        let tokens = self.block_tokens();
        let lines = self.pages.block(index / tokens);
        let slot = index % tokens;
        match &self.block {
            Block::F32(block) => read_token::<f32>(lines, *block, head, slot, out),
            Block::F16(block) => read_token::<f16>(lines, *block, head, slot, out),
            Block::Codes(block) => {
                let n = block.head_lines();
                let lines = &lines[head * n..(head + 1) * n];
                let (floats, bytes) = (view::<f16>(lines), view::<u8>(lines));
                for (channel, out) in out.iter_mut().enumerate() {
                    if !block.scaled() {
                        *out = f32::from(block.get(bytes, slot, channel));
                        continue;
                    }
                    let (scale, zero) = block.scale_index(slot, channel);
                    *out = decode(block.get(bytes, slot, channel), floats[scale], floats[zero]);
                }
            }
        }
    }

    /// Bytes held, from the allocations. Storage that clones share counts in each of them.
    pub fn bytes(&self) -> StoreBytes {
        let scales = match &self.block {
            Block::Codes(block) => self.pages.held() * self.heads * block.head_bytes().1,
            _ => 0,
        };
        let residual = if self.recent.lines.is_empty() { 0 } else { shared_bytes(&self.recent.lines) };
        StoreBytes { codes: self.pages.bytes() - scales, scales, residual }
    }

    fn block_tokens(&self) -> usize {
        match &self.block {
            Block::F32(block) | Block::F16(block) => block.slots,
            Block::Codes(block) => block.slots,
        }
    }

    fn check(&self, head: usize, range: &Range<usize>) {
        assert!(head < self.heads, "head {head} of {}", self.heads);
        let held = self.start()..self.len;
        assert!(
            range.is_empty() || (range.start >= held.start && range.end <= held.end),
            "tokens {range:?} asked for, {held:?} held"
        );
    }
}

/// Writes a token `(heads, dim)` into a slot of a block of floats.
fn write_token<T: Float>(lines: &mut [Line], block: FloatBlock, slot: usize, row: &[f32]) {
    let heads = lines.chunks_exact_mut(block.head_lines::<T>());
    for (lines, row) in heads.zip(row.chunks_exact(block.dim)) {
        let x = view_mut::<T>(lines);
        row.iter().enumerate().for_each(|(c, &value)| x[block.index(slot, c)] = T::of(value));
    }
}

fn read_token<T: Float>(lines: &[Line], block: FloatBlock, head: usize, slot: usize, out: &mut [f32]) {
    let n = block.head_lines::<T>();
    let x = view::<T>(&lines[head * n..(head + 1) * n]);
    out.iter_mut().enumerate().for_each(|(c, out)| *out = x[block.index(slot, c)].get());
}
