//! The packed store: one side (keys or values) of one layer, of a pair's shared directions, or of a group's latents.

mod count;
mod grid;
mod layout;
pub(crate) mod lloyd;
pub(crate) mod normal;
mod pack;
mod pages;
mod scores;
mod sections;
mod sums;
pub(crate) mod trellis;
mod viterbi;
mod weigh;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::archive::{Archive, damaged};
use crate::settings::{Axis, StoreType};
use half::f16;

pub use self::count::StoreCount;
use self::grid::decode;
use self::layout::{CodeBlock, FloatBlock, Scaling};
use self::pages::Pages;
pub use self::sections::{CodeLayout, SectionLayout};
use self::trellis::Levels;
use crate::kernels::f8::F8;
use crate::kernels::{Float, LANES, Line, Precision, view};

/// Tokens of a block of floats.
const BLOCK: usize = 32;

/// Tokens of a block of those that wait to be quantised: as few as a strip holds, so that little is allocated beside
/// them.
const RECENT: usize = LANES;

/// Tokens of a block of codes quantised token by token: longer, because values pay for each block with the rounding of
/// its weights. Blocks of codes quantised along channels have a group of tokens each.
const PACKED_BLOCK: usize = 64;

/// Tokens of a block of sections of keys and of values: few, because the blocks of a page are worked on together. Codes
/// of three bits fill their vectors with 32.
const SECTION_BLOCK: [usize; 2] = [LANES, 32];

/// How a [`Store`] keeps its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// IEEE single precision.
    F32,
    /// IEEE half precision; finite numbers beyond its range saturate.
    F16,
    /// Floats of 8 bits (e4m3), up to 448; numbers beyond saturate, so that they are scaled before.
    F8,
    /// Asymmetric round-to-nearest codes with an f16 scale and zero per group.
    Quant {
        /// Bits per code: 2, 3, 4 or 8.
        bits: u8,
        /// Numbers that share a scale and a zero; a multiple of 16.
        group: usize,
        /// `Channel`: one channel over `group` tokens, packed when `residual + group` tokens wait. `Token`: `group`
        /// channels of one token, cut at the head's end, packed as soon as `residual` newer tokens are there.
        axis: Axis,
        /// Newest tokens kept as they are, see [`Store::with_waiting`].
        residual: usize,
    },
    /// Codes around zero with a scale per token and section, see [`Store::sections`].
    Sections,
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
    /// The newest tokens of a quantised store.
    pub residual: usize,
}

impl StoreBytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.residual
    }
}

/// How a block of a [`Store`] lies, for a backend that has such blocks elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLayout {
    /// Tokens of a block.
    pub tokens: usize,
    /// Bytes of a head's part; a block has the parts of all heads, one after the other.
    pub head_bytes: usize,
    /// Of these, bytes of scales and zeros.
    pub scale_bytes: usize,
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
    /// Tokens before this one are in `pages`, those from it on in `recent`.
    packed: usize,
    block: Block,
    pages: Pages,
    /// The newest tokens of a quantised store, in blocks of [`RECENT`].
    recent: Pages,
    /// The type of those.
    waits: StoreType,
}

#[derive(Clone)]
enum Block {
    F32(FloatBlock),
    F16(FloatBlock),
    F8(FloatBlock),
    Codes(Arc<CodeBlock>),
}

impl Store {
    /// An empty store for vectors of `heads` by `dim`.
    ///
    /// # Panics
    /// Bits other than 2, 3, 4 and 8, or a group that is zero or not a multiple of 16.
    pub fn new(heads: usize, dim: usize, scheme: Scheme, side: Side) -> Self {
        let floats = FloatBlock { side, dim, slots: BLOCK };
        let (block, head_lines) = match scheme {
            Scheme::F32 => (Block::F32(floats), floats.head_lines::<f32>()),
            Scheme::F16 => (Block::F16(floats), floats.head_lines::<f16>()),
            Scheme::F8 => (Block::F8(floats), floats.head_lines::<F8>()),
            Scheme::Quant { bits, group, axis, .. } => {
                assert!(group > 0 && group % LANES == 0, "group must be a multiple of 16, not {group}");
                if axis == Axis::Channel {
                    let scaling = (Scaling::Channels, Cow::Borrowed(&[][..]));
                    return Self::codes(heads, dim, scheme, side, group, scaling, &[(bits, dim)]);
                }
                let sections: Vec<(u8, usize)> =
                    (0..dim).step_by(group).map(|c| (bits, group.min(dim - c))).collect();
                let scaling = (Scaling::Tokens, Cow::Borrowed(&[][..]));
                return Self::codes(heads, dim, scheme, side, PACKED_BLOCK, scaling, &sections);
            }
            Scheme::Sections => return Self::sections(&[(8, dim)], side),
        };
        Self::with_layout(heads, dim, scheme, side, block, head_lines)
    }

    /// An empty store for vectors of several `sections` (bits and numbers each) whose numbers are near normal with mean
    /// zero: quantised token by token, each section relative to its root mean square, with the step that is best for a
    /// normal variable and no zero. One head.
    ///
    /// # Panics
    /// Bits other than 2, 3, 4 and 8.
    pub fn sections(sections: &[(u8, usize)], side: Side) -> Self {
        Self::of_sections(sections, side, (Scaling::Centred, Cow::Borrowed(&[])))
    }

    /// As [`Store::sections`], with codes of 1 to 3 bits that follow a trellis along the numbers of their section: what a
    /// code stands for depends on those before it, and takes not one bit more.
    ///
    /// # Panics
    /// Bits other than 1, 2, 3, 4 and 8.
    pub fn trellis(sections: &[(u8, usize)], side: Side) -> Self {
        Self::of_sections(sections, side, (Scaling::Trellis, Cow::Borrowed(&trellis::TABLES)))
    }

    /// An empty store for vectors of `heads` by several `sections`, with codes of 1 to 4 bits that stand for the levels of
    /// `tables`, which has one for each number of bits, relative to the root mean square of the section, kept as an f16.
    pub(crate) fn levels(heads: usize, sections: &[(u8, usize)], side: Side, tables: Vec<Levels>) -> Self {
        let dim = sections.iter().map(|s| s.1).sum();
        let scaling = (Scaling::Levels, Cow::Owned(tables));
        Self::codes(heads, dim, Scheme::Sections, side, PACKED_BLOCK, scaling, sections)
    }

    fn of_sections(sections: &[(u8, usize)], side: Side, scaling: (Scaling, Cow<'static, [Levels]>)) -> Self {
        let dim = sections.iter().map(|s| s.1).sum();
        let slots = SECTION_BLOCK[usize::from(side == Side::Values)];
        Self::codes(1, dim, Scheme::Sections, side, slots, scaling, sections)
    }

    fn codes(
        heads: usize,
        dim: usize,
        scheme: Scheme,
        side: Side,
        slots: usize,
        (scaling, tables): (Scaling, Cow<'static, [Levels]>),
        sections: &[(u8, usize)],
    ) -> Self {
        for &(bits, _) in sections {
            let one = bits == 1 && tables.iter().any(|table| table.bits == 1);
            assert!(one || matches!(bits, 2 | 3 | 4 | 8), "bits must be 2, 3, 4 or 8, not {bits}");
        }
        let block = CodeBlock::new(side, scaling, slots, sections.iter().copied(), tables);
        let lines = block.head_lines();
        Self::with_layout(heads, dim, scheme, side, Block::Codes(Arc::new(block)), lines)
    }

    fn with_layout(
        heads: usize,
        dim: usize,
        scheme: Scheme,
        side: Side,
        block: Block,
        head_lines: usize,
    ) -> Self {
        let waits = StoreType::F16;
        let recent = Pages::single(waiting_lines(heads, dim, side, waits));
        let precision = Precision::default();
        let lines = heads * head_lines;
        let joint = matches!(&block, Block::Codes(block) if block.scaling.is_centred());
        let pages = if joint { Pages::joint(lines) } else { Pages::new(lines) };
        Self { heads, dim, side, scheme, precision, len: 0, packed: 0, block, pages, recent, waits }
    }

    /// The same store with its weights rounded otherwise where they meet codes. Floats are weighed in f32 anyway.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same empty store with the tokens that wait to be quantised kept in `dtype` instead of f16, and, where none
    /// wait, quantised from it.
    #[must_use]
    pub fn with_waiting(self, dtype: StoreType) -> Self {
        debug_assert!(self.is_empty());
        let recent = Pages::single(waiting_lines(self.heads, self.dim, self.side, dtype));
        Self { recent, waits: dtype, ..self }
    }

    /// An empty store of the same kind.
    pub(crate) fn empty(&self) -> Self {
        let [pages, recent] = [&self.pages, &self.recent].map(Pages::empty);
        Self { len: 0, packed: 0, block: self.block.clone(), pages, recent, ..*self }
    }

    /// The same empty store with floats allocated for `tokens` tokens at a time, a multiple of 16 for keys, instead of
    /// 32: for few tokens.
    #[must_use]
    pub fn with_blocks(mut self, tokens: usize) -> Self {
        debug_assert!(self.is_empty() && tokens > 0);
        let slots = if self.side == Side::Keys { tokens.next_multiple_of(LANES) } else { tokens };
        let block = FloatBlock { side: self.side, dim: self.dim, slots };
        let (lines, block) = match &self.block {
            Block::F32(_) => (block.head_lines::<f32>(), Block::F32(block)),
            Block::F16(_) => (block.head_lines::<f16>(), Block::F16(block)),
            Block::F8(_) => (block.head_lines::<F8>(), Block::F8(block)),
            Block::Codes(_) => return self,
        };
        self.block = block;
        self.pages = Pages::new(self.heads * lines);
        self
    }

    /// The same empty store for a window of the newest tokens: floats of 16 of them in a page of their own, which goes as
    /// soon as these have left.
    #[must_use]
    pub(crate) fn for_window(self) -> Self {
        let store = self.with_blocks(LANES);
        Self { pages: Pages::single(store.pages.block_lines()), ..store }
    }

    /// How the tokens that wait are laid out.
    fn waiting(&self) -> FloatBlock {
        FloatBlock { side: self.side, dim: self.dim, slots: RECENT }
    }

    /// Reads a vector of a block of those that wait.
    fn read_waiting(&self, lines: &[Line], head: usize, slot: usize, out: &mut [f32]) {
        match self.waits {
            StoreType::F16 => read_token::<f16>(lines, self.waiting(), head, slot, out),
            StoreType::F32 => read_token::<f32>(lines, self.waiting(), head, slot, out),
        }
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

    /// How its blocks lie.
    pub fn block_layout(&self) -> BlockLayout {
        BlockLayout {
            tokens: self.block_tokens(),
            head_bytes: self.pages.block_lines() * Line::BYTES / self.heads.max(1),
            scale_bytes: match &self.block {
                Block::Codes(block) => block.head_bytes().1,
                _ => 0,
            },
        }
    }

    /// Frees what can be freed of the tokens before `index`: whole pages of packed tokens.
    pub fn drop_before(&mut self, index: usize) {
        let block = index.min(self.packed) / self.block_tokens();
        self.pages.drop_before(block);
    }

    /// Whether the store can be as if it had never had more than the first `len` tokens: floats and codes of single
    /// tokens can, codes that a window or a group has been left for cannot.
    ///
    /// # Errors
    /// Why not.
    pub fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        can_truncate(self.scheme, self.packed, len)
    }

    /// Forgets the tokens from `len` on; [`Store::can_truncate`] says whether what is left is what it was.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.packed = self.packed.min(len);
        let tokens = self.block_tokens();
        let left = self.packed % tokens;
        self.pages.truncate(self.packed.div_ceil(tokens));
        if let Block::Codes(block) = &self.block
            && block.scaling != Scaling::Channels
            && left > 0
        {
            // Weights are rounded by the largest scale of a block: those of the forgotten must not count.
            let lines = self.pages.block_mut(self.packed / tokens);
            lines.chunks_exact_mut(block.head_lines()).for_each(|head| block.clear_scales(head, left));
        }
        self.recent.truncate(waiting_blocks(self.packed, self.len));
    }

    /// One vector as attention sees it: `out` is `(dim)`.
    ///
    /// # Panics
    /// An index that is not held, a head that does not exist, a slice of another length.
    pub fn read(&self, head: usize, index: usize, out: &mut [f32]) {
        self.check(head, &(index..index + 1));
        assert_eq!(out.len(), self.dim);
        if index >= self.packed {
            let lines = self.recent.block(index / RECENT);
            return self.read_waiting(lines, head, index % RECENT, out);
        }
        let tokens = self.block_tokens();
        let lines = self.pages.block(index / tokens);
        let slot = index % tokens;
        match &self.block {
            Block::F32(block) => read_token::<f32>(lines, *block, head, slot, out),
            Block::F16(block) => read_token::<f16>(lines, *block, head, slot, out),
            Block::F8(block) => read_token::<F8>(lines, *block, head, slot, out),
            Block::Codes(block) => {
                let n = block.head_lines();
                let lines = &lines[head * n..(head + 1) * n];
                for (i, section) in block.sections.iter().enumerate() {
                    for channel in section.channels.clone() {
                        let (scale, zero) = block.scale(lines, slot, (i, channel));
                        out[channel] = decode(block.get(view(lines), section, slot, channel), scale, zero);
                    }
                }
            }
        }
    }

    /// Writes or reads what it holds.
    pub(crate) fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        archive.count(&mut self.packed)?;
        self.pages.archive(archive)?;
        self.recent.archive(archive)?;
        let waits = self.packed < self.len;
        damaged(
            self.packed <= self.len && self.pages.blocks_ever() == self.packed.div_ceil(self.block_tokens()),
        )?;
        let recent = self.recent.first()..self.recent.blocks_ever();
        damaged(!waits || (recent.start * RECENT <= self.packed && recent.end == self.len.div_ceil(RECENT)))?;
        // What waits to be packed is less than a group beyond the window.
        damaged(match self.scheme {
            Scheme::Quant { residual, axis: Axis::Token, .. } => self.len - self.packed <= residual,
            Scheme::Quant { residual, group, axis: Axis::Channel, .. } => {
                self.len - self.packed < residual + group
            }
            _ => !waits,
        })
    }

    /// Bytes held, from the allocations. Storage that clones share counts in each of them.
    pub fn bytes(&self) -> StoreBytes {
        let scales = match &self.block {
            Block::Codes(block) => self.pages.held() * self.heads * block.head_bytes().1,
            _ => 0,
        };
        StoreBytes { codes: self.pages.bytes() - scales, scales, residual: self.recent.bytes() }
    }

    fn block_tokens(&self) -> usize {
        match &self.block {
            Block::F32(block) | Block::F16(block) | Block::F8(block) => block.slots,
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

/// See [`Store::can_truncate`].
fn can_truncate(scheme: Scheme, packed: usize, len: usize) -> std::result::Result<(), &'static str> {
    // No more must be packed than would be of so few; a group along tokens cannot lose some of them.
    let possible = match scheme {
        Scheme::Quant { residual, axis: Axis::Token, .. } => packed.min(len) <= len.saturating_sub(residual),
        Scheme::Quant { residual, group, axis: Axis::Channel, .. } => {
            len == 0 || packed <= len.saturating_sub(residual) / group * group
        }
        Scheme::F32 | Scheme::F16 | Scheme::F8 | Scheme::Sections => true,
    };
    if possible { Ok(()) } else { Err("newer tokens have been quantised already") }
}

/// Blocks of tokens that wait after those before `len` were all that came, dropped ones included.
fn waiting_blocks(packed: usize, len: usize) -> usize {
    if packed == len { packed / RECENT } else { len.div_ceil(RECENT) }
}

/// Lines of a block of tokens that wait, all heads together.
fn waiting_lines(heads: usize, dim: usize, side: Side, dtype: StoreType) -> usize {
    let block = FloatBlock { side, dim, slots: RECENT };
    heads
        * match dtype {
            StoreType::F16 => block.head_lines::<f16>(),
            StoreType::F32 => block.head_lines::<f32>(),
        }
}

fn read_token<T: Float>(lines: &[Line], block: FloatBlock, head: usize, slot: usize, out: &mut [f32]) {
    let x = head_view::<T>(lines, block, head);
    if block.side == Side::Keys {
        return out.iter_mut().enumerate().for_each(|(c, out)| *out = x[block.index(slot, c)].get());
    }
    for (strip, out) in out.chunks_mut(LANES).enumerate() {
        let at = block.index(slot, strip * LANES);
        T::widen(&x[at..at + out.len()], out);
    }
}

/// One head of a block of floats; nothing where there is no block.
fn head_view<T: Float>(lines: &[Line], block: FloatBlock, head: usize) -> &[T] {
    let n = block.head_lines::<T>();
    view(lines.get(head * n..(head + 1) * n).unwrap_or(&[]))
}

fn at_least<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    if scratch.len() < len {
        scratch.resize(len, T::default());
    }
}
