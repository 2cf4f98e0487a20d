//! Scores of queries against a store.

use std::ops::Range;

use half::f16;

use super::layout::CodeBlock;
use super::weigh::*;
use super::{Block, Side, Store, head_view};
use crate::kernels::f8::F8;
use crate::kernels::{self, Codes, Digits, Factor, Isa, LANES, Precision, ROWS, Sums, Weights, padded, view};
use crate::settings::StoreType;

/// Rows whose digits are kept while the blocks go by.
const ROW_CHUNK: usize = 8 * ROWS;

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
                let centred = block.scaling.is_centred();
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
                        trellis: block.trellis(tile),
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
