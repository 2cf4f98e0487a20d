//! Scores and weighted sums over a store.

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

use super::layout::{CodeBlock, FloatBlock, Tile};
use super::{Block, Side, Store};
use crate::kernels::{
    self, Codes, Digits, Factor, Float, Isa, LANES, Line, ROWS, Sums, Weights, padded, view,
};

/// Rows whose digits are kept while the blocks go by.
const ROW_CHUNK: usize = 8 * ROWS;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Working memory of a thread; it grows to what the largest store needs and stays.
#[derive(Default)]
struct Scratch {
    digits: Vec<i32>,
    factors: Vec<Factor>,
    floats: Vec<f32>,
}

/// A stretch of one block: `slots` of it are the tokens from `offset` on in the caller's range.
struct Part<'a> {
    lines: &'a [Line],
    /// The packed block after this one, empty if the range does not reach it.
    next: &'a [Line],
    recent: bool,
    slots: Range<usize>,
    offset: usize,
}

impl Store {
    /// Plain dot products of `q` `(rows, dim)` with the vectors of `head` at `range`: `out` is
    /// `(rows, range.len())`. Allocates nothing once the thread has done it for a store of this size.
    ///
    /// # Panics
    /// Tokens that are not held, slices of another length.
    pub fn scores(&self, head: usize, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]) {
        self.check(head, &range);
        let (dim, tokens) = (self.dim, range.len());
        assert_eq!(q.len(), rows * dim);
        assert_eq!(out.len(), rows * tokens);
        out.fill(0.0);
        if self.side == Side::Values {
            self.each_vector(head, range, |i, x| {
                for (row, q) in q.chunks_exact(dim).enumerate() {
                    out[row * tokens + i] = q.iter().zip(x).map(|(q, x)| q * x).sum();
                }
            });
            return;
        }
        let isa = Isa::active();
        SCRATCH.with_borrow_mut(|scratch| {
            for first in (0..rows).step_by(ROW_CHUNK) {
                let rows = ROW_CHUNK.min(rows - first);
                let q = Weights { w: &q[first * dim..], stride: dim, rows };
                let out = &mut out[first * tokens..(first + rows) * tokens];
                self.score_rows(isa, scratch, head, &range, q, out);
            }
        });
    }

    fn score_rows(
        &self,
        isa: Isa,
        scratch: &mut Scratch,
        head: usize,
        range: &Range<usize>,
        q: Weights,
        out: &mut [f32],
    ) {
        let tokens = range.len();
        let Scratch { digits, factors, floats } = scratch;
        if let Block::Codes(block) = &self.block
            && !block.scale_of_step()
            && range.start < self.packed
        {
            query_digits(isa, block, q, digits, factors);
        }
        for part in self.parts(range) {
            let strips = part.slots.start / LANES..part.slots.end.div_ceil(LANES);
            let whole = part.slots.start % LANES == 0 && part.slots.end % LANES == 0;
            if whole {
                let y = &mut out[part.offset..];
                self.score_part(isa, head, &part, strips, q, (digits, factors), Sums { y, stride: tokens });
                continue;
            }
            // A strip that the range cuts: computed whole beside the output, and the part asked for copied.
            let width = strips.len() * LANES;
            let skip = part.slots.start % LANES;
            fresh(floats, q.rows * width);
            let y = Sums { y: &mut floats[..], stride: width };
            self.score_part(isa, head, &part, strips, q, (digits, factors), y);
            for (row, y) in floats.chunks_exact(width).enumerate() {
                let n = part.slots.len();
                out[row * tokens + part.offset..][..n].copy_from_slice(&y[skip..skip + n]);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn score_part(
        &self,
        isa: Isa,
        head: usize,
        part: &Part,
        strips: Range<usize>,
        q: Weights,
        (digits, factors): (&mut Vec<i32>, &mut Vec<Factor>),
        out: Sums,
    ) {
        if part.recent {
            let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
            return ring.scores(isa, (head_view::<f16>(part.lines, ring, head), &[]), strips, q, out);
        }
        match &self.block {
            Block::F32(b) => b.scores(
                isa,
                (head_view::<f32>(part.lines, *b, head), head_view::<f32>(part.next, *b, head)),
                strips,
                q,
                out,
            ),
            Block::F16(b) => b.scores(
                isa,
                (head_view::<f16>(part.lines, *b, head), head_view::<f16>(part.next, *b, head)),
                strips,
                q,
                out,
            ),
            Block::Codes(block) => {
                let n = block.head_lines();
                let lines = &part.lines[head * n..(head + 1) * n];
                kernels::prefetch(part.next.get(head * n..(head + 1) * n).unwrap_or(&[]));
                if block.scale_of_step() {
                    block_digits(isa, block, &block.tiles[0], view(lines), q, digits, factors);
                }
                let per_row: usize = block.tiles.iter().map(|t| padded(t.steps)).sum();
                let tiles = block.tiles.len();
                let mut start = 0;
                for (i, tile) in block.tiles.iter().enumerate() {
                    let bytes = kernels::strip_bytes(block.bits, tile.steps, LANES);
                    let lanes = (block.scaled() && !block.scale_of_step()).then(|| {
                        let (scale, zero) = block.scales(view(lines), tile);
                        (&scale[strips.start * LANES..], &zero[strips.start * LANES..])
                    });
                    let m = Codes {
                        bits: block.bits,
                        codes: &view(lines)[tile.codes + strips.start * bytes..],
                        strips: strips.len(),
                        width: LANES,
                        steps: tile.steps,
                        lanes,
                    };
                    for row in (0..q.rows).step_by(ROWS) {
                        let rows = ROWS.min(q.rows - row);
                        let mut these = [Factor::default(); ROWS];
                        (0..rows).for_each(|r| these[r] = factors[(row + r) * tiles + i]);
                        let w = Digits {
                            digits: &digits[row * per_row + start..],
                            stride: per_row,
                            factors: &these[..rows],
                        };
                        let y = Sums { y: &mut out.y[row * out.stride..], stride: out.stride };
                        kernels::codes(isa, m, w, y);
                    }
                    start += padded(tile.steps);
                }
            }
        }
    }

    /// Adds to each row of `out` `(rows, dim)` the vectors of `head` at `range`, weighed by `p`
    /// `(rows, range.len())`. Allocates nothing once the thread has done it for a store of this size.
    ///
    /// # Panics
    /// Tokens that are not held, slices of another length.
    pub fn accumulate(&self, head: usize, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]) {
        self.check(head, &range);
        let (dim, tokens) = (self.dim, range.len());
        assert_eq!(p.len(), rows * tokens);
        assert_eq!(out.len(), rows * dim);
        if tokens == 0 {
            return;
        }
        if self.side == Side::Keys {
            self.each_vector(head, range, |i, x| {
                for (row, out) in out.chunks_exact_mut(dim).enumerate() {
                    let p = p[row * tokens + i];
                    out.iter_mut().zip(x).for_each(|(out, x)| *out += p * x);
                }
            });
            return;
        }
        let isa = Isa::active();
        SCRATCH.with_borrow_mut(|scratch| {
            for part in self.parts(&range) {
                let w = Weights { w: &p[part.offset..], stride: tokens, rows };
                self.sum_part(isa, scratch, head, &part, w, out);
            }
        });
    }

    fn sum_part(
        &self,
        isa: Isa,
        scratch: &mut Scratch,
        head: usize,
        part: &Part,
        w: Weights,
        out: &mut [f32],
    ) {
        let y = Sums { y: &mut out[..], stride: self.dim };
        let slots = part.slots.clone();
        if part.recent {
            let ring = FloatBlock { side: self.side, dim: self.dim, slots: self.recent.slots };
            return ring.sums(isa, (head_view::<f16>(part.lines, ring, head), &[]), slots, w, y);
        }
        match &self.block {
            Block::F32(b) => b.sums(
                isa,
                (head_view::<f32>(part.lines, *b, head), head_view::<f32>(part.next, *b, head)),
                slots,
                w,
                y,
            ),
            Block::F16(b) => b.sums(
                isa,
                (head_view::<f16>(part.lines, *b, head), head_view::<f16>(part.next, *b, head)),
                slots,
                w,
                y,
            ),
            Block::Codes(block) => {
                let n = block.head_lines();
                let lines = &part.lines[head * n..(head + 1) * n];
                kernels::prefetch(part.next.get(head * n..(head + 1) * n).unwrap_or(&[]));
                for row in (0..w.rows).step_by(ROWS) {
                    let rows = ROWS.min(w.rows - row);
                    let w = Weights { w: &w.w[row * w.stride..], stride: w.stride, rows };
                    let out = &mut out[row * self.dim..];
                    sum_codes(isa, scratch, block, lines, slots.clone(), w, out);
                }
            }
        }
    }

    /// The stretches of blocks that make up `range`.
    fn parts<'a>(&'a self, range: &Range<usize>) -> impl Iterator<Item = Part<'a>> + use<'a> {
        let (start, end) = (range.start, range.end);
        let mut at = start;
        let tokens = self.block_tokens();
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (recent, size, end) = match at < self.packed {
                true => (false, tokens, end.min(self.packed)),
                false => (true, self.recent.slots, end),
            };
            let first = at % size;
            let slots = first..size.min(first + end - at);
            let lines = if recent { &self.recent.lines[..] } else { self.pages.block(at / size) };
            let offset = at - start;
            at += slots.len();
            let next = if at < end && !recent { self.pages.block(at / size) } else { &[] };
            let part = Part { lines, next, recent, offset, slots };
            Some(part)
        })
    }

    /// Each vector of a range, restored: the way of the operation that the layout does not serve.
    fn each_vector(&self, head: usize, range: Range<usize>, mut f: impl FnMut(usize, &[f32])) {
        SCRATCH.with_borrow_mut(|scratch| {
            fresh(&mut scratch.floats, self.dim);
            for (i, index) in range.enumerate() {
                self.read(head, index, &mut scratch.floats);
                f(i, &scratch.floats);
            }
        });
    }
}

/// One head of a block of floats.
fn head_view<T: Float>(lines: &[Line], block: FloatBlock, head: usize) -> &[T] {
    let n = block.head_lines::<T>();
    view(lines.get(head * n..(head + 1) * n).unwrap_or(&[]))
}

fn fresh<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    scratch.clear();
    scratch.resize(len, T::default());
}

fn at_least<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    if scratch.len() < len {
        scratch.resize(len, T::default());
    }
}

/// Digits of the queries for each tile of a block whose scales belong to the lanes: the same for every block.
fn query_digits(isa: Isa, block: &CodeBlock, q: Weights, digits: &mut Vec<i32>, factors: &mut Vec<Factor>) {
    let per_row: usize = block.tiles.iter().map(|t| padded(t.steps)).sum();
    at_least(digits, q.rows * per_row);
    at_least(factors, q.rows * block.tiles.len());
    for row in 0..q.rows {
        let mut digits = &mut digits[row * per_row..(row + 1) * per_row];
        for (i, tile) in block.tiles.iter().enumerate() {
            let (these, rest) = digits.split_at_mut(padded(tile.steps));
            let w = &q.w[row * q.stride + tile.channel..][..tile.steps];
            factors[row * block.tiles.len() + i] = plain_digits(isa, block, w, these);
            digits = rest;
        }
    }
}

/// Digits of weights that no scale multiplies; their sum counts only where there are zeros for it to multiply.
fn plain_digits(isa: Isa, block: &CodeBlock, w: &[f32], digits: &mut [i32]) -> Factor {
    let factor = kernels::digits(isa, w, None, digits);
    if block.scaled() { factor } else { Factor { bias: 0.0, ..factor } }
}

/// Digits of the weights times the scales of one tile.
fn block_digits(
    isa: Isa,
    block: &CodeBlock,
    tile: &Tile,
    head: &[f16],
    w: Weights,
    digits: &mut Vec<i32>,
    factors: &mut Vec<Factor>,
) {
    let per_row = padded(tile.steps);
    at_least(digits, w.rows * per_row);
    at_least(factors, w.rows);
    let scales = Some(block.scales(head, tile));
    for row in 0..w.rows {
        let digits = &mut digits[row * per_row..(row + 1) * per_row];
        factors[row] = kernels::digits(isa, &w.w[row * w.stride..][..tile.steps], scales, digits);
    }
}

/// At most [`ROWS`] rows of `out` get the tokens `slots` of a block of codes.
fn sum_codes(
    isa: Isa,
    scratch: &mut Scratch,
    block: &CodeBlock,
    lines: &[Line],
    slots: Range<usize>,
    w: Weights,
    out: &mut [f32],
) {
    let Scratch { digits, factors, floats } = scratch;
    let mut w = w;
    if slots != (0..block.slots) {
        // Tokens outside the range weigh nothing.
        fresh(floats, w.rows * block.slots);
        for (row, padded) in floats.chunks_exact_mut(block.slots).enumerate() {
            padded[slots.clone()].copy_from_slice(&w.w[row * w.stride..][..slots.len()]);
        }
        w = Weights { w: floats, stride: block.slots, rows: w.rows };
    }
    let mut group = None;
    let per_row = padded(block.slots);
    at_least(digits, w.rows * per_row);
    at_least(factors, w.rows);
    for tile in &block.tiles {
        let mut lanes = None;
        if block.scale_of_step() {
            if group != Some(tile.group) {
                block_digits(isa, block, tile, view(lines), w, digits, factors);
            }
        } else {
            lanes = block.scaled().then(|| block.scales(view(lines), tile));
            if group.is_none() {
                for row in 0..w.rows {
                    let digits = &mut digits[row * per_row..(row + 1) * per_row];
                    let w = &w.w[row * w.stride..][..block.slots];
                    factors[row] = plain_digits(isa, block, w, digits);
                }
            }
        }
        group = Some(tile.group);
        let (bits, steps) = (block.bits, tile.steps);
        let codes = &view(lines)[tile.codes..];
        let m = Codes { bits, codes, strips: tile.strips, width: tile.width, steps, lanes };
        let w = Digits { digits, stride: per_row, factors: &factors[..w.rows] };
        kernels::codes(isa, m, w, Sums { y: &mut out[tile.channel..], stride: block.dim });
    }
}
