//! What scores and weighted sums over a store have in common: the parts of a range, and working memory.

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

use super::layout::CodeBlock;
use super::{Block, RECENT, Store, at_least};
use crate::kernels::{self, Factor, Isa, Line, Weights, padded, view};

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Working memory of a thread; it grows to what the largest store needs and stays.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) digits: Vec<i32>,
    pub(super) factors: Vec<Factor>,
    pub(super) bounds: Vec<f32>,
    pub(super) floats: Vec<f32>,
    pub(super) halves: Vec<f16>,
}

/// A stretch of one block, or, of centred codes, of several blocks of a page: `slots` of it are the tokens from `offset`
/// on in the caller's range.
pub(super) struct Part<'a> {
    pub(super) lines: &'a [Line],
    /// The packed blocks after these, if any: the next call, if not this one, reads them.
    pub(super) next: &'a [Line],
    pub(super) recent: bool,
    pub(super) slots: Range<usize>,
    pub(super) offset: usize,
}

impl Part<'_> {
    /// The head's lines of this block and of the next, whose scales are asked for (its codes are by the kernels). Centred
    /// codes have one head.
    pub(super) fn head(&self, head: usize, block: &CodeBlock) -> (&[Line], &[Line]) {
        let lines = block.head_lines();
        if block.scaling.is_centred() {
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
    pub(super) fn block_bytes(&self) -> usize {
        self.pages.block_lines() * Line::BYTES
    }

    /// Tokens of the blocks that a part is in.
    pub(super) fn part_tokens(&self, block: &CodeBlock, part: &Part) -> usize {
        part.lines.len() / self.pages.block_lines() * block.slots
    }

    /// The scales of a part of centred codes, by section, then token.
    pub(super) fn gather_scales(&self, block: &CodeBlock, part: &Part, halves: &mut Vec<f16>) {
        at_least(halves, self.part_tokens(block, part) * block.sections.len());
        block.centred_scales(view(part.lines), self.block_bytes(), halves);
    }

    /// Asks for the first blocks of centred codes, which no call before this one has asked for.
    pub(super) fn prefetch_first(&self, range: &Range<usize>) {
        if let Block::Codes(block) = &self.block
            && block.scaling.is_centred()
            && let Some(part) = self.parts(range).next()
            && !part.recent
        {
            kernels::prefetch(part.lines);
        }
    }

    /// The stretches of blocks that make up `range`.
    pub(super) fn parts<'a>(&'a self, range: &Range<usize>) -> impl Iterator<Item = Part<'a>> + use<'a> {
        let (start, end) = (range.start, range.end);
        let mut at = start;
        let tokens = self.block_tokens();
        let most = match &self.block {
            Block::Codes(block) if block.scaling.is_centred() => usize::MAX,
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
    pub(super) fn each_vector(&self, head: usize, range: Range<usize>, mut f: impl FnMut(usize, &[f32])) {
        SCRATCH.with_borrow_mut(|scratch| {
            fresh(&mut scratch.floats, self.dim);
            for (i, index) in range.enumerate() {
                self.read(head, index, &mut scratch.floats);
                f(i, &scratch.floats);
            }
        });
    }
}

pub(super) fn fresh<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) {
    scratch.clear();
    scratch.resize(len, T::default());
}

/// The largest magnitude of each row's first `n` weights.
pub(super) fn row_bounds(isa: Isa, w: Weights, n: usize, bounds: &mut Vec<f32>) {
    bounds.clear();
    bounds.extend((0..w.rows).map(|row| kernels::largest(isa, &w.w[row * w.stride..][..n])));
}

/// Room for the digits of `sets` rows of `steps`.
pub(super) fn prepare(digits: &mut Vec<i32>, factors: &mut Vec<Factor>, sets: usize, steps: usize) {
    at_least(digits, sets * padded(steps));
    at_least(factors, sets);
}

/// Turns sums of entries into sums of zeros, `rows` for each section.
pub(super) fn weigh_zeros(block: &CodeBlock, rows: usize, factors: &mut [Factor]) {
    for (section, factors) in factors.chunks_mut(rows).take(block.sections.len()).enumerate() {
        let weight = block.zero_weight(section);
        factors.iter_mut().for_each(|f| f.bias *= weight);
    }
}
