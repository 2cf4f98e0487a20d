//! A layer's own storage: what methods that keep every token may make of it.

use std::ops::Range;

use crate::archive::Archive;
use crate::view::Segment;
use crate::{Footprint, Result};

/// One side (keys or values) of one layer, stored by position.
pub(crate) trait Lane: Send + Sync {
    /// Appends `(tokens, kv_heads, head_dim)`.
    fn push(&mut self, rows: &[f32]);
    /// Tokens pushed, those that were dropped since among them.
    fn len(&self) -> usize;
    /// How these positions lie.
    fn segment(&self, positions: Range<usize>) -> Segment<'_>;
    /// Frees what lies before `position`, where storage allows.
    fn drop_before(&mut self, position: usize);
    /// Whether it can be as if it had never had more than the first `len` tokens, of which there are fewer than it has.
    ///
    /// # Errors
    /// Why not.
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str>;
    /// Forgets the tokens from `len` on; [`Lane::can_truncate`] has said that it can.
    fn truncate(&mut self, len: usize);
    /// First position still held.
    fn start(&self) -> usize;
    /// Bytes held.
    fn footprint(&self) -> Footprint;
    /// Writes or reads what it holds.
    ///
    /// # Errors
    /// A damaged file; what the file says.
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()>;
    /// A copy that shares storage until written.
    fn fork(&self) -> Box<dyn Lane>;
}

impl Clone for Box<dyn Lane> {
    fn clone(&self) -> Self {
        self.fork()
    }
}
