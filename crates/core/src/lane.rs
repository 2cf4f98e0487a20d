//! What attention needs of stored states: scores against queries, and sums weighted by probabilities.

use std::ops::Range;

use crate::Footprint;

/// Past keys of one layer, by position.
pub(crate) trait Keys: Sync {
    /// Numbers of a query as [`Keys::scores`] takes it, `head_dim` of them unless it is mapped first.
    fn query_dim(&self, head_dim: usize) -> usize {
        head_dim
    }

    /// KV heads that one call had better serve, because they read the same storage: all of them, or one.
    fn together(&self) -> usize {
        1
    }

    /// Stored positions lie in blocks from this one on.
    fn aligned_from(&self) -> usize {
        0
    }

    /// Maps the queries `q (rows, head_dim)`, rows spread evenly over the KV heads `heads`, once per step, to
    /// `out (rows, query_dim)`.
    fn map_queries(&self, _heads: Range<usize>, q: &[f32], out: &mut [f32]) {
        out.copy_from_slice(q);
    }

    /// `out (rows, range.len())`: the scores of mapped queries `q (rows, query_dim)` against the positions `range` of
    /// the KV heads `heads`: one, or, if `together` says so for keys or values, several with the rows spread evenly.
    fn scores(&self, heads: Range<usize>, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]);
}

/// Past values of one layer, by position.
pub(crate) trait Values: Sync {
    /// Numbers of an accumulated row. The first `head_dim` of them are in the space of values.
    fn sum_dim(&self, head_dim: usize) -> usize {
        head_dim
    }

    /// As [`Keys::together`].
    fn together(&self) -> usize {
        1
    }

    /// `out (rows, sum_dim) +=` the sum of the positions `range`, weighed by `p (rows, range.len())`; `heads` as in
    /// [`Keys::scores`].
    fn accumulate(&self, heads: Range<usize>, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]);

    /// Maps accumulated rows `(rows, sum_dim)` of KV head `head`, once per step, to values `out (rows, head_dim)`,
    /// overwritten.
    fn map_sums(&self, _head: usize, sums: &[f32], _rows: usize, out: &mut [f32]) {
        out.copy_from_slice(sums);
    }
}

/// One side (keys or values) of one layer, stored by position.
pub(crate) trait Lane: Keys + Values + Send {
    /// Appends `(tokens, kv_heads, head_dim)`.
    fn push(&mut self, rows: &[f32]);
    /// The vector of `position` and `head` as attention sees it.
    fn read(&self, head: usize, position: usize, out: &mut [f32]);
    /// Frees what lies before `position`, where storage allows.
    fn drop_before(&mut self, position: usize);
    /// Whether it can be as if it had never had more than the first `len` tokens, of which there are fewer than it has.
    ///
    /// # Errors
    /// Why not.
    fn can_truncate(&self, len: usize) -> Result<(), &'static str>;
    /// Forgets the tokens from `len` on; [`Lane::can_truncate`] has said that it can.
    fn truncate(&mut self, len: usize);
    /// First position still held.
    fn start(&self) -> usize;
    /// Bytes held.
    fn footprint(&self) -> Footprint;
    /// A copy that shares storage until written.
    fn fork(&self) -> Box<dyn Lane>;
}
