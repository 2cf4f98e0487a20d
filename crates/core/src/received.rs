//! The attention that tokens receive, for methods that rank them by it.
//!
//! A query's probabilities are known when its last score is: until then those of each block are relative to the largest
//! score so far, which stays beside them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::kernels::loops::add_scaled;
use crate::scratch::with_buffer;

/// Units of a sum: whole numbers come to the same in whatever order threads add them. There is room for what 16 million
/// rows give.
const UNIT: f64 = (1u64 << 40) as f64;

/// What the tokens of each KV head receive in a step, those held first, then the step's own: sums over the queries that
/// count and the query heads that share the KV head.
pub(crate) struct Received {
    counted: Range<usize>,
    /// Where each head's sums end.
    ends: Vec<usize>,
    /// Whether the step has one token: every sum gets one number, which is kept as it is.
    single: bool,
    sums: Vec<AtomicU64>,
}

impl Received {
    /// Nothing yet, of the queries `counted` of a step of `tokens` tokens, over heads that hold so many before it.
    pub(crate) fn new(counted: Range<usize>, tokens: usize, held: impl Iterator<Item = usize>) -> Self {
        let mut ends = Vec::new();
        for held in held {
            ends.push(ends.last().unwrap_or(&0) + held + tokens);
        }
        let all = ends.last().copied().unwrap_or(0);
        Self { counted, ends, single: tokens == 1, sums: (0..all).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Of the queries of the step's tokens `tokens`, `group` rows for each, if some of them count.
    pub(crate) fn of_queries(&self, head: usize, tokens: &Range<usize>, group: usize) -> Option<Blocks<'_>> {
        let (from, to) = (self.counted.start.max(tokens.start), self.counted.end.min(tokens.end));
        if from >= to {
            return None;
        }
        let first = if head == 0 { 0 } else { self.ends[head - 1] };
        let row = |token: usize| (token - tokens.start) * group;
        Some(Blocks {
            sums: &self.sums[first..self.ends[head]],
            single: self.single,
            rows: tokens.len() * group,
            counted: row(from)..row(to),
            blocks: Vec::new(),
            numbers: 0,
            tops: Vec::new(),
        })
    }

    /// The sums, head by head.
    pub(crate) fn into_sums(self, out: &mut Vec<f32>) {
        let sums = self.sums.into_iter().map(AtomicU64::into_inner);
        match self.single {
            true => out.extend(sums.map(|sum| f32::from_bits(sum as u32))),
            false => out.extend(sums.map(|sum| (sum as f64 / UNIT) as f32)),
        }
    }
}

/// Blocks of probabilities `(rows, width)` that wait for their rows' sums, one after the other.
pub(crate) struct Blocks<'a> {
    sums: &'a [AtomicU64],
    single: bool,
    rows: usize,
    counted: Range<usize>,
    blocks: Vec<Range<usize>>,
    /// Numbers of all blocks.
    numbers: usize,
    /// For each block the score of every row that its probabilities are relative to.
    tops: Vec<f32>,
}

impl Blocks<'_> {
    /// Takes the next block, of the tokens `tokens`, relative to `tops`.
    pub(crate) fn push(&mut self, tokens: Range<usize>, tops: &[f32]) {
        self.numbers += tokens.len() * self.rows;
        self.blocks.push(tokens);
        self.tops.extend_from_slice(tops);
    }

    /// Numbers of the blocks so far.
    pub(crate) fn numbers(&self) -> usize {
        self.numbers
    }

    /// Adds what tokens receive, the blocks lying in `scores` and rows coming to `sums` relative to the scores `tops`.
    pub(crate) fn count(&self, mut scores: &[f32], tops: &[f32], sums: &[f32]) {
        let widest = self.blocks.iter().map(Range::len).max().unwrap_or(0);
        with_buffer(widest, |columns| {
            for (tokens, block_tops) in self.blocks.iter().zip(self.tops.chunks_exact(self.rows)) {
                let (block, rest) = scores.split_at(tokens.len() * self.rows);
                scores = rest;
                let columns = &mut columns[..tokens.len()];
                columns.fill(0.0);
                for row in self.counted.clone() {
                    let factor = (block_tops[row] - tops[row]).exp() / sums[row];
                    add_scaled(&block[row * tokens.len()..][..tokens.len()], factor, columns);
                }
                for (sum, column) in self.sums[tokens.clone()].iter().zip(&*columns) {
                    match self.single {
                        true => sum.store(column.to_bits().into(), Ordering::Relaxed),
                        false => _ = sum.fetch_add((f64::from(*column) * UNIT) as u64, Ordering::Relaxed),
                    }
                }
            }
        });
    }
}
