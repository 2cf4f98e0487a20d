//! The rotary embedding of a sequence, for those methods that take queries back to what they were before it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use minicache_core::Rotary;

/// A sequence's rotary embedding, or none: then queries are taken as those of a model that rotates none.
#[derive(Clone, Default)]
pub(crate) struct SequenceRotary(pub(crate) Option<Arc<dyn Rotary>>);

impl fmt::Debug for SequenceRotary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SequenceRotary").field("dim", &self.dim()).finish()
    }
}

impl SequenceRotary {
    /// Numbers of a head that are rotated.
    pub(crate) fn dim(&self) -> usize {
        self.0.as_ref().map_or(0, |rotary| rotary.rotary_dim())
    }

    /// As [`Rotary::angles_into`].
    pub(crate) fn angles_into(&self, position: usize, out: &mut [f32]) {
        if let Some(rotary) = &self.0 {
            rotary.angles_into(position, out);
        }
    }

    /// Cosines and sines averaged over `positions`.
    pub(crate) fn average(&self, positions: Range<usize>) -> Vec<f32> {
        self.0.as_ref().map_or_else(Vec::new, |rotary| rotary.mean_angles(positions))
    }
}
