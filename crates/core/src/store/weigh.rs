//! Scores and weighted sums over a store.

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

use super::layout::CodeBlock;
use super::{Block, RECENT, Side, Store, at_least, head_view};
use crate::kernels::{
    self, Codes, Digits, Factor, Isa, LANES, Line, Precision, ROWS, Sums, Weights, padded, view,
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
    bounds: Vec<f32>,
    floats: Vec<f32>,
}

/// A stretch of one block: `slots` of it are the tokens from `offset` on in the caller's range.
struct Part<'a> {
    lines: &'a [Line],
    /// The packed block after this one, if any: the next call, if not this one, reads it.
    next: &'a [Line],
    recent: bool,
    slots: Range<usize>,
    offset: usize,
}

impl Part<'_> {
    /// The head's lines of this block and of the next, whose scales are asked for (its codes are by the kernels).
    fn head(&self, head: usize, block: &CodeBlock) -> (&[Line], &[Line]) {
        let lines = block.head_lines();
        let place = head * lines..(head + 1) * lines;
        let next = self.next.get(place.clone()).unwrap_or(&[]);
        kernels::prefetch(next.get(block.scale_lines()).unwrap_or(&[]));
        (&self.lines[place], next)
    }
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
        let Scratch { digits, factors, bounds, floats } = scratch;
        if let Block::Codes(block) = &self.block
            && range.start < self.packed
        {
            row_bounds(q, self.dim, bounds);
            if !block.scale_of_step() {
                query_digits(isa, self.precision, block, q, bounds, digits, factors);
            }
        }
        for part in self.parts(range) {
            let strips = part.slots.start / LANES..part.slots.end.div_ceil(LANES);
            let whole = part.slots.start % LANES == 0 && part.slots.end % LANES == 0;
            if whole {
                let y = &mut out[part.offset..];
                self.score_part(
                    isa,
                    head,
                    &part,
                    strips,
                    q,
                    (digits, factors, bounds),
                    Sums { y, stride: tokens },
                );
                continue;
            }
            // A strip that the range cuts: computed whole beside the output, and the part asked for copied.
            let width = strips.len() * LANES;
            let skip = part.slots.start % LANES;
            fresh(floats, q.rows * width);
            let y = Sums { y: &mut floats[..], stride: width };
            self.score_part(isa, head, &part, strips, q, (digits, factors, bounds), y);
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
        (digits, factors, bounds): (&mut Vec<i32>, &mut Vec<Factor>, &[f32]),
        out: Sums,
    ) {
        if part.recent {
            let block = self.waiting();
            return block.scores(isa, (head_view::<f16>(part.lines, block, head), &[]), strips, q, out);
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
                let (lines, next) = part.head(head, block);
                if block.scale_of_step() {
                    prepare(digits, factors, q.rows, block.dim);
                    let scales = Some(block.step_scales(view(lines)));
                    kernels::digits(isa, self.precision, q, bounds, block.dim, scales, digits, factors);
                }
                let mut set = 0;
                for (i, tile) in block.tiles.iter().enumerate() {
                    let bytes = kernels::strip_bytes(block.bits, tile.steps, LANES);
                    let lanes = (block.scaled() && !block.scale_of_step()).then(|| {
                        let (scale, zero) = block.lane_scales(view(lines), tile);
                        (&scale[strips.start * LANES..], &zero[strips.start * LANES..])
                    });
                    let codes = tile.codes + strips.start * bytes;
                    let codes = codes..codes + strips.len() * bytes;
                    let m = Codes {
                        bits: block.bits,
                        codes: &view(lines)[codes.clone()],
                        next: view(next).get(codes).unwrap_or(&[]),
                        strips: strips.len(),
                        width: LANES,
                        steps: tile.steps,
                        per_set: strips.len(),
                        lanes,
                    };
                    let padded = padded(tile.steps);
                    for row in (0..q.rows).step_by(ROWS) {
                        let w = Digits {
                            digits: &digits[set + row * padded..],
                            factors: &factors[i * q.rows + row..],
                            rows: ROWS.min(q.rows - row),
                            precision: self.precision,
                        };
                        let y = Sums { y: &mut out.y[row * out.stride..], stride: out.stride };
                        kernels::codes(isa, m, w, y);
                    }
                    set += q.rows * padded;
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
            if matches!(self.block, Block::Codes(_)) && range.start < self.packed {
                row_bounds(Weights { w: p, stride: tokens, rows }, tokens, &mut scratch.bounds);
            }
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
            let block = self.waiting();
            return block.sums(isa, (head_view::<f16>(part.lines, block, head), &[]), slots, w, y);
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
                let lines = part.head(head, block);
                for row in (0..w.rows).step_by(ROWS) {
                    let rows = ROWS.min(w.rows - row);
                    let w = Weights { w: &w.w[row * w.stride..], stride: w.stride, rows };
                    let out = &mut out[row * self.dim..];
                    let Scratch { digits, factors, bounds, floats } = scratch;
                    let scratch = (digits, factors, &bounds[row..], floats);
                    sum_codes(isa, self.precision, scratch, block, lines, slots.clone(), w, out);
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
                false => (true, RECENT, end),
            };
            let first = at % size;
            let slots = first..size.min(first + end - at);
            let pages = if recent { &self.recent } else { &self.pages };
            let lines = pages.block(at / size);
            let offset = at - start;
            at += slots.len();
            let next = if !recent && at < self.packed { self.pages.block(at / size) } else { &[] };
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

fn fresh<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    scratch.clear();
    scratch.resize(len, T::default());
}

/// The largest magnitude of each row's first `n` weights.
fn row_bounds(w: Weights, n: usize, bounds: &mut Vec<f32>) {
    bounds.clear();
    bounds.extend((0..w.rows).map(|row| kernels::largest(&w.w[row * w.stride..][..n])));
}

/// Room for the digits of `sets` rows of `steps`.
fn prepare(digits: &mut Vec<i32>, factors: &mut Vec<Factor>, sets: usize, steps: usize) {
    at_least(digits, sets * padded(steps));
    at_least(factors, sets);
}

/// Digits of the queries for each tile of a block whose scales belong to the lanes: the same for every block.
fn query_digits(
    isa: Isa,
    precision: Precision,
    block: &CodeBlock,
    q: Weights,
    bounds: &[f32],
    digits: &mut Vec<i32>,
    factors: &mut Vec<Factor>,
) {
    prepare(digits, factors, q.rows * block.tiles.len(), block.group);
    let mut set = 0;
    for (i, tile) in block.tiles.iter().enumerate() {
        let w = Weights { w: &q.w[tile.channel..], ..q };
        let factors = &mut factors[i * q.rows..];
        kernels::digits(isa, precision, w, bounds, tile.steps, None, &mut digits[set..], factors);
        drop_bias(block, &mut factors[..q.rows]);
        set += q.rows * padded(tile.steps);
    }
}

/// Codes that stand for themselves have no zeros for the sum of the weights to multiply.
fn drop_bias(block: &CodeBlock, factors: &mut [Factor]) {
    if !block.scaled() {
        factors.iter_mut().for_each(|f| f.bias = 0.0);
    }
}

/// At most [`ROWS`] rows of `out` get the tokens `slots` of a block of codes.
#[allow(clippy::too_many_arguments)]
fn sum_codes(
    isa: Isa,
    precision: Precision,
    (digits, factors, bounds, floats): (&mut Vec<i32>, &mut Vec<Factor>, &[f32], &mut Vec<f32>),
    block: &CodeBlock,
    (lines, next): (&[Line], &[Line]),
    slots: Range<usize>,
    w: Weights,
    out: &mut [f32],
) {
    let mut w = w;
    if slots != (0..block.slots) {
        // Tokens outside the range weigh nothing.
        fresh(floats, w.rows * block.slots);
        for (row, padded) in floats.chunks_exact_mut(block.slots).enumerate() {
            padded[slots.clone()].copy_from_slice(&w.w[row * w.stride..][..slots.len()]);
        }
        w = Weights { w: floats, stride: block.slots, rows: w.rows };
    }
    let scales = block.scale_of_step().then(|| block.step_scales(view(lines)));
    prepare(digits, factors, w.rows * block.groups(), block.slots);
    kernels::digits(isa, precision, w, bounds, block.slots, scales, digits, factors);
    drop_bias(block, &mut factors[..w.rows]);
    for tile in &block.tiles {
        let set = tile.group * w.rows;
        let bytes = tile.strips * kernels::strip_bytes(block.bits, tile.steps, tile.width);
        let m = Codes {
            bits: block.bits,
            codes: &view(lines)[tile.codes..tile.codes + bytes],
            next: view(next).get(tile.codes..tile.codes + bytes).unwrap_or(&[]),
            strips: tile.strips,
            width: tile.width,
            steps: tile.steps,
            per_set: if scales.is_some() { block.group.div_ceil(LANES) } else { tile.strips },
            lanes: (block.scaled() && scales.is_none()).then(|| block.lane_scales(view(lines), tile)),
        };
        let digits = &digits[set * padded(block.slots)..];
        let w = Digits { digits, factors: &factors[set..], rows: w.rows, precision };
        kernels::codes(isa, m, w, Sums { y: &mut out[tile.channel..], stride: block.dim });
    }
}
