//! What attention needs of stored states: scores against queries, and sums weighted by probabilities.

use std::ops::Range;

use crate::Footprint;

/// Past keys of one layer, by position.
pub(crate) trait Keys: Sync {
    /// `out (rows, range.len()) = q (rows, head_dim) . k_i` for the positions `range` of KV head `head`.
    fn scores(&self, head: usize, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]);
}

/// Past values of one layer, by position.
pub(crate) trait Values: Sync {
    /// `out (rows, head_dim) += sum_i p_i v_i` over the positions `range` of KV head `head`, `p (rows, range.len())`.
    fn accumulate(&self, head: usize, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]);
}

/// One side (keys or values) of one layer, stored by position.
pub(crate) trait Lane: Keys + Values + Send {
    /// Appends `(tokens, kv_heads, head_dim)`.
    fn push(&mut self, rows: &[f32]);
    /// The vector of `position` and `head` as attention sees it.
    fn read(&self, head: usize, position: usize, out: &mut [f32]);
    /// Frees what lies before `position`, where storage allows.
    fn drop_before(&mut self, position: usize);
    /// First position still held.
    fn start(&self) -> usize;
    /// Bytes held.
    fn footprint(&self) -> Footprint;
    /// A copy that shares storage until written.
    fn fork(&self) -> Box<dyn Lane>;
}
