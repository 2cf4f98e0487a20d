//! Scores and weighted sums over a store.

use std::cell::RefCell;
use std::ops::Range;

use crate::settings::StoreType;
use half::f16;

use super::layout::{CodeBlock, Scaling};
use super::{Block, RECENT, Side, Store, at_least, head_view};
use crate::kernels::f8::F8;
use crate::kernels::{
    self, Codes, Digits, Factor, Isa, LANES, Line, Precision, ROWS, StepScales, Sums, Weights, padded, view,
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
    halves: Vec<f16>,
}

/// A stretch of one block, or, of centred codes, of several blocks of a page: `slots` of it are the tokens from `offset`
/// on in the caller's range.
struct Part<'a> {
    lines: &'a [Line],
    /// The packed blocks after these, if any: the next call, if not this one, reads them.
    next: &'a [Line],
    recent: bool,
    slots: Range<usize>,
    offset: usize,
}

impl Part<'_> {
    /// The head's lines of this block and of the next, whose scales are asked for (its codes are by the kernels). Centred
    /// codes have one head.
    fn head(&self, head: usize, block: &CodeBlock) -> (&[Line], &[Line]) {
        let lines = block.head_lines();
        if block.scaling == Scaling::Centred {
            self.next.chunks(block.head_lines()).for_each(|lines| {
                kernels::prefetch(lines.get(block.scale_lines()).unwrap_or(&[]));
            });
            return (self.lines, self.next);
        }
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
        let stride = range.len();
        assert_eq!(q.len(), rows * self.dim);
        assert_eq!(out.len(), rows * stride);
        out.fill(0.0);
        self.add_scores(head, range, Weights { w: q, stride: self.dim, rows }, Sums { y: out, stride });
    }

    /// As [`Store::scores`], added to rows that lie apart.
    pub(crate) fn add_scores(&self, head: usize, range: Range<usize>, q: Weights, out: Sums) {
        self.check(head, &range);
        let Sums { y, stride } = out;
        if self.side == Side::Values {
            self.each_vector(head, range, |i, x| {
                for row in 0..q.rows {
                    let q = &q.w[row * q.stride..][..self.dim];
                    y[row * stride + i] += q.iter().zip(x).map(|(q, x)| q * x).sum::<f32>();
                }
            });
            return;
        }
        let isa = Isa::active();
        SCRATCH.with_borrow_mut(|scratch| {
            for first in (0..q.rows).step_by(ROW_CHUNK) {
                let rows = ROW_CHUNK.min(q.rows - first);
                let q = Weights { w: &q.w[first * q.stride..], rows, ..q };
                self.score_rows(isa, scratch, head, &range, q, Sums { y: &mut y[first * stride..], stride });
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
        out: Sums,
    ) {
        let Sums { y: out, stride } = out;
        let Scratch { digits, factors, bounds, floats, halves } = scratch;
        self.prefetch_first(range);
        if let Block::Codes(block) = &self.block
            && range.start < self.packed
        {
            row_bounds(isa, q, self.dim, bounds);
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
                    (digits, factors, bounds, halves),
                    Sums { y, stride },
                );
                continue;
            }
            // A strip that the range cuts: computed whole beside the output, and the part asked for copied.
            let width = strips.len() * LANES;
            let skip = part.slots.start % LANES;
            fresh(floats, q.rows * width);
            let y = Sums { y: &mut floats[..], stride: width };
            self.score_part(isa, head, &part, strips, q, (digits, factors, bounds, halves), y);
            for (row, y) in floats.chunks_exact(width).enumerate() {
                let out = &mut out[row * stride + part.offset..][..part.slots.len()];
                out.iter_mut().zip(&y[skip..]).for_each(|(out, y)| *out += y);
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
        (digits, factors, bounds, halves): (&mut Vec<i32>, &mut Vec<Factor>, &[f32], &mut Vec<f16>),
        out: Sums,
    ) {
        if part.recent {
            let block = self.waiting();
            return match self.waits {
                StoreType::F16 => {
                    block.scores(isa, (head_view::<f16>(part.lines, block, head), &[]), strips, q, out)
                }
                StoreType::F32 => {
                    block.scores(isa, (head_view::<f32>(part.lines, block, head), &[]), strips, q, out)
                }
            };
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
            Block::F8(b) => b.scores(
                isa,
                (head_view::<F8>(part.lines, *b, head), head_view::<F8>(part.next, *b, head)),
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
                let centred = block.scaling == Scaling::Centred;
                if centred {
                    self.gather_scales(block, part, halves);
                }
                let tokens = self.part_tokens(block, part);
                let mut set = 0;
                for (i, tile) in block.tiles.iter().enumerate() {
                    let bytes = kernels::strip_bytes(tile.bits, tile.steps, LANES);
                    let stride = if centred { self.block_bytes() } else { bytes };
                    let lanes = strips.start * LANES..strips.end * LANES;
                    let lanes = (!block.scale_of_step()).then(|| {
                        if centred {
                            let scales = &halves[tile.section * tokens..][lanes];
                            return (scales, scales);
                        }
                        let (scale, zero) = block.lane_scales(view(lines), tile);
                        (&scale[lanes.clone()], &zero[lanes])
                    });
                    let codes = tile.codes + strips.start * stride;
                    let codes = codes..codes + (strips.len() - 1) * stride + bytes;
                    let m = Codes {
                        bits: tile.bits,
                        codes: &view(lines)[codes.clone()],
                        next: view(next).get(codes).unwrap_or(&[]),
                        strips: strips.len(),
                        stride,
                        width: LANES,
                        steps: tile.steps,
                        runs: 1,
                        run_stride: 0,
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
        let stride = range.len();
        assert_eq!(p.len(), rows * stride);
        assert_eq!(out.len(), rows * self.dim);
        self.add_sums(head, range, Weights { w: p, stride, rows }, Sums { y: out, stride: self.dim });
    }

    /// As [`Store::accumulate`], with rows that lie apart.
    pub(crate) fn add_sums(&self, head: usize, range: Range<usize>, p: Weights, out: Sums) {
        self.check(head, &range);
        let Sums { y, stride } = out;
        if range.is_empty() {
            return;
        }
        if self.side == Side::Keys {
            self.each_vector(head, range, |i, x| {
                for row in 0..p.rows {
                    let p = p.w[row * p.stride + i];
                    y[row * stride..].iter_mut().zip(x).for_each(|(out, x)| *out += p * x);
                }
            });
            return;
        }
        let isa = Isa::active();
        SCRATCH.with_borrow_mut(|scratch| {
            self.prefetch_first(&range);
            if matches!(self.block, Block::Codes(_)) && range.start < self.packed {
                row_bounds(isa, p, range.len(), &mut scratch.bounds);
            }
            for part in self.parts(&range) {
                let w = Weights { w: &p.w[part.offset..], ..p };
                self.sum_part(isa, scratch, head, &part, w, Sums { y: &mut *y, stride });
            }
        });
    }

    fn sum_part(&self, isa: Isa, scratch: &mut Scratch, head: usize, part: &Part, w: Weights, y: Sums) {
        let slots = part.slots.clone();
        if part.recent {
            let block = self.waiting();
            return match self.waits {
                StoreType::F16 => {
                    block.sums(isa, (head_view::<f16>(part.lines, block, head), &[]), slots, w, y)
                }
                StoreType::F32 => {
                    block.sums(isa, (head_view::<f32>(part.lines, block, head), &[]), slots, w, y)
                }
            };
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
            Block::F8(b) => b.sums(
                isa,
                (head_view::<F8>(part.lines, *b, head), head_view::<F8>(part.next, *b, head)),
                slots,
                w,
                y,
            ),
            Block::Codes(block) => {
                let lines = part.head(head, block);
                if block.scaling == Scaling::Centred {
                    self.gather_scales(block, part, &mut scratch.halves);
                }
                for row in (0..w.rows).step_by(ROWS) {
                    let rows = ROWS.min(w.rows - row);
                    let w = Weights { w: &w.w[row * w.stride..], stride: w.stride, rows };
                    let out = Sums { y: &mut y.y[row * y.stride..], stride: y.stride };
                    let Scratch { digits, factors, bounds, floats, halves } = scratch;
                    let scratch = (digits, factors, &bounds[row..], floats, &mut *halves);
                    let block = (&**block, self.block_bytes());
                    sum_codes(isa, self.precision, scratch, block, lines, slots.clone(), w, out);
                }
            }
        }
    }

    fn block_bytes(&self) -> usize {
        self.pages.block_lines() * Line::BYTES
    }

    /// Tokens of the blocks that a part is in.
    fn part_tokens(&self, block: &CodeBlock, part: &Part) -> usize {
        part.lines.len() / self.pages.block_lines() * block.slots
    }

    /// The scales of a part of centred codes, by section, then token.
    fn gather_scales(&self, block: &CodeBlock, part: &Part, halves: &mut Vec<f16>) {
        at_least(halves, self.part_tokens(block, part) * block.sections.len());
        block.centred_scales(view(part.lines), self.block_bytes(), halves);
    }

    /// Asks for the first blocks of centred codes, which no call before this one has asked for.
    fn prefetch_first(&self, range: &Range<usize>) {
        if let Block::Codes(block) = &self.block
            && block.scaling == Scaling::Centred
            && let Some(part) = self.parts(range).next()
            && !part.recent
        {
            kernels::prefetch(part.lines);
        }
    }

    /// The stretches of blocks that make up `range`.
    fn parts<'a>(&'a self, range: &Range<usize>) -> impl Iterator<Item = Part<'a>> + use<'a> {
        let (start, end) = (range.start, range.end);
        let mut at = start;
        let tokens = self.block_tokens();
        let most = match &self.block {
            Block::Codes(block) if block.scaling == Scaling::Centred => usize::MAX,
            _ => 1,
        };
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let recent = at >= self.packed;
            let (size, end) = if recent { (RECENT, end) } else { (tokens, end.min(self.packed)) };
            let first = at % size;
            let needed = (first + end - at).div_ceil(size);
            let pages = if recent { &self.recent } else { &self.pages };
            let lines = pages.blocks(at / size, if recent { 1 } else { most.min(needed) });
            let slots = first..(lines.len() / pages.block_lines() * size).min(first + end - at);
            let offset = at - start;
            at += slots.len();
            let next = if !recent && at < self.packed { self.pages.blocks(at / size, most) } else { &[] };
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
fn row_bounds(isa: Isa, w: Weights, n: usize, bounds: &mut Vec<f32>) {
    bounds.clear();
    bounds.extend((0..w.rows).map(|row| kernels::largest(isa, &w.w[row * w.stride..][..n])));
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
    let steps = block.tiles.iter().map(|t| t.steps).max().unwrap_or(0);
    prepare(digits, factors, q.rows * block.tiles.len(), steps);
    let mut set = 0;
    for (i, tile) in block.tiles.iter().enumerate() {
        let w = Weights { w: &q.w[tile.channel..], ..q };
        let factors = &mut factors[i * q.rows..];
        kernels::digits(isa, precision, w, bounds, tile.steps, None, &mut digits[set..], factors);
        set += q.rows * padded(tile.steps);
    }
    weigh_zeros(block, q.rows, factors);
}

/// Turns sums of entries into sums of zeros, `rows` for each section.
fn weigh_zeros(block: &CodeBlock, rows: usize, factors: &mut [Factor]) {
    for (section, factors) in factors.chunks_mut(rows).take(block.sections.len()).enumerate() {
        let weight = block.zero_weight(section);
        factors.iter_mut().for_each(|f| f.bias *= weight);
    }
}

/// Working memory of [`sum_codes`]; the halves hold the scales of centred codes.
type SumScratch<'a> = (&'a mut Vec<i32>, &'a mut Vec<Factor>, &'a [f32], &'a mut Vec<f32>, &'a mut Vec<f16>);

/// At most [`ROWS`] rows of `out` get the tokens `slots` of a block of codes, or of several blocks `block_bytes` apart.
#[allow(clippy::too_many_arguments)]
fn sum_codes(
    isa: Isa,
    precision: Precision,
    (digits, factors, bounds, floats, halves): SumScratch,
    (block, block_bytes): (&CodeBlock, usize),
    (lines, next): (&[Line], &[Line]),
    slots: Range<usize>,
    w: Weights,
    out: Sums,
) {
    let mut w = w;
    let centred = block.scaling == Scaling::Centred;
    let runs = if centred { lines.len() * Line::BYTES / block_bytes } else { 1 };
    let tokens = runs * block.slots;
    if slots != (0..tokens) {
        // Tokens outside the range weigh nothing.
        fresh(floats, w.rows * tokens);
        for (row, padded) in floats.chunks_exact_mut(tokens).enumerate() {
            padded[slots.clone()].copy_from_slice(&w.w[row * w.stride..][..slots.len()]);
        }
        w = Weights { w: floats, stride: tokens, rows: w.rows };
    }
    let sets = block.sections.len();
    let scales = match block.scaling {
        Scaling::Channels => None,
        Scaling::Tokens => Some(block.step_scales(view(lines))),
        Scaling::Centred => {
            Some(StepScales { data: &halves[..sets * tokens], sets, stride: tokens, to_zero: 0 })
        }
    };
    prepare(digits, factors, w.rows * sets, tokens);
    kernels::digits(isa, precision, w, bounds, tokens, scales, digits, factors);
    weigh_zeros(block, w.rows, factors);
    for tile in &block.tiles {
        let set = tile.section * w.rows;
        let stride = kernels::strip_bytes(tile.bits, tile.steps, tile.width);
        let codes = tile.codes..tile.codes + (runs - 1) * block_bytes + tile.strips * stride;
        let m = Codes {
            bits: tile.bits,
            codes: &view(lines)[codes.clone()],
            next: view(next).get(codes).unwrap_or(&[]),
            strips: tile.strips,
            stride,
            width: tile.width,
            steps: tile.steps,
            runs,
            run_stride: block_bytes,
            per_set: if scales.is_some() { tile.per_section } else { tile.strips },
            lanes: scales.is_none().then(|| block.lane_scales(view(lines), tile)),
        };
        let digits = &digits[set * padded(tokens)..];
        let w = Digits { digits, factors: &factors[set..], rows: w.rows, precision };
        kernels::codes(isa, m, w, Sums { y: &mut out.y[tile.channel..], stride: out.stride });
    }
}
