//! Weighted sums over a store.

use std::ops::Range;

use half::f16;

use super::layout::{CodeBlock, Scaling};
use super::weigh::*;
use super::{Block, Side, Store, head_view};
use crate::kernels::f8::F8;
use crate::kernels::{
    self, Codes, Digits, Factor, Isa, Line, Precision, ROWS, StepScales, Sums, Weights, padded, view,
};
use crate::settings::StoreType;

impl Store {
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
                if block.scaling.is_centred() {
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
    let centred = block.scaling.is_centred();
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
        Scaling::Tokens | Scaling::Levels => Some(block.step_scales(view(lines))),
        Scaling::Centred | Scaling::Trellis => {
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
            trellis: block.trellis(tile),
        };
        let digits = &digits[set * padded(tokens)..];
        let w = Digits { digits, factors: &factors[set..], rows: w.rows, precision };
        kernels::codes(isa, m, w, Sums { y: &mut out.y[tile.channel..], stride: out.stride });
    }
}
