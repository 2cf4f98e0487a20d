//! Tokens of a pair that are kept exactly, beside what it shares.

use std::ops::Range;
use std::sync::Arc;

use crate::kernels::{Sums, Weights};
use crate::scratch::with_buffer;
use crate::store::Store;

/// Tokens kept exact, for one lane.
#[derive(Clone)]
pub(crate) struct Retained {
    /// Ascending.
    pub(crate) positions: Arc<Vec<u32>>,
    /// Tokens that a window has dropped before them.
    pub(crate) dropped: usize,
    /// Both layers' states; indices count the dropped ones too.
    pub(crate) members: [Store; 2],
}

impl Retained {
    /// The indices of the retained tokens whose positions lie in `range`.
    pub(crate) fn within(&self, range: &Range<usize>) -> Range<usize> {
        let at = |p: usize| self.dropped + self.positions.partition_point(|&x| (x as usize) < p);
        at(range.start)..at(range.end)
    }

    /// Positions of the tokens with these indices.
    fn positions(&self, indices: &Range<usize>) -> &[u32] {
        &self.positions[indices.start - self.dropped..indices.end - self.dropped]
    }
}

/// The retained tokens of one member, which replace what the shared store has in their places.
#[derive(Clone, Copy)]
pub(crate) struct Kept<'a> {
    pub(crate) lanes: &'a [Retained],
    pub(crate) member: usize,
}

impl<'a> Kept<'a> {
    /// The retained tokens among `range` of a KV head's lane: positions, the store, and the head and indices in it.
    fn of(&self, head: usize, range: &Range<usize>) -> Option<(&'a [u32], &'a Store, usize, Range<usize>)> {
        let (lane, inner) = if self.lanes.len() > 1 { (head, 0) } else { (0, head) };
        let retained = &self.lanes[lane];
        let indices = retained.within(range);
        let found = (retained.positions(&indices), &retained.members[self.member], inner, indices.clone());
        (!indices.is_empty()).then_some(found)
    }

    /// Reads the vector at `position`, where it is retained.
    pub(crate) fn read(&self, head: usize, position: usize, out: &mut [f32]) -> bool {
        let found = self.of(head, &(position..position + 1));
        found.is_some_and(|(_, store, inner, indices)| {
            store.read(inner, indices.start, out);
            true
        })
    }

    /// Puts exact scores in the place of those of shared vectors at `range`.
    pub(crate) fn replace_scores(&self, head: usize, range: &Range<usize>, q: Weights, out: Sums) {
        let Some((positions, store, inner, indices)) = self.of(head, range) else { return };
        let stride = indices.len();
        with_buffer(q.rows * stride, |exact| {
            exact.fill(0.0);
            store.add_scores(inner, indices, q, Sums { y: exact, stride });
            for (row, exact) in exact.chunks_exact(stride).enumerate() {
                for (&position, &score) in positions.iter().zip(exact) {
                    out.y[row * out.stride + position as usize - range.start] = score;
                }
            }
        });
    }

    /// Adds what is retained of `range`, weighed by `p (rows, range.len())`.
    pub(crate) fn accumulate(&self, head: usize, range: &Range<usize>, p: Weights, out: Sums) {
        let Some((positions, store, inner, indices)) = self.of(head, range) else { return };
        let stride = indices.len();
        with_buffer(p.rows * stride, |exact| {
            for (row, exact) in exact.chunks_exact_mut(stride).enumerate() {
                for (&position, x) in positions.iter().zip(exact) {
                    *x = p.w[row * p.stride + position as usize - range.start];
                }
            }
            store.add_sums(inner, indices, Weights { w: exact, stride, rows: p.rows }, out);
        });
    }
}
