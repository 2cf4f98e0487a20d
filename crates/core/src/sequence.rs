//! A sequence: a cache with what belongs to it from its first token to its last.

use std::fmt;
use std::sync::Arc;

use crate::cache::{KvCache, Restored};
use crate::resources::Rotary;
use crate::settings::ModelShape;
use crate::{Footprint, Result};

/// A sequence's cache, and, where its decoder rotates by it, the length that it is planned to come to and its rotary
/// embedding, which may depend on that length (LongRoPE, dynamic RoPE): cached keys are not rotated again, so both stay
/// as they are.
pub struct Sequence {
    cache: Box<dyn KvCache>,
    rotary: Option<Arc<dyn Rotary>>,
    planned_len: usize,
}

impl Sequence {
    /// A sequence of somebody's own model, who rotates keys themselves.
    pub fn new(cache: Box<dyn KvCache>) -> Self {
        Self { cache, rotary: None, planned_len: 0 }
    }

    /// A sequence whose keys are rotated by `rotary`, as the model has it for sequences of `planned_len` tokens.
    pub fn rotated(cache: Box<dyn KvCache>, rotary: Arc<dyn Rotary>, planned_len: usize) -> Self {
        Self { cache, rotary: Some(rotary), planned_len }
    }

    /// The same sequence with something around its cache, such as [`crate::observed`].
    #[must_use]
    pub fn wrapped(self, wrap: impl FnOnce(Box<dyn KvCache>) -> Box<dyn KvCache>) -> Self {
        Self { cache: wrap(self.cache), ..self }
    }

    /// The model's shape.
    pub fn shape(&self) -> &ModelShape {
        self.cache.shape()
    }

    /// Tokens seen so far: the next token's position.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// The length that it was said to come to; 0 where that is not known.
    pub fn planned_len(&self) -> usize {
        self.planned_len
    }

    /// Its rotary embedding.
    pub fn rotary(&self) -> Option<&dyn Rotary> {
        self.rotary.as_deref()
    }

    /// Bytes really held, by part. Storage that forks share counts in each of them.
    pub fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }

    /// States as attention sees them, see [`KvCache::restored`].
    ///
    /// # Errors
    /// A layer that the model does not have.
    pub fn restored(&self, layer: usize) -> Result<Restored> {
        self.cache.restored(layer)
    }

    /// Another continuation of the same tokens, which shares storage until either side writes.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { cache: self.cache.fork(), rotary: self.rotary.clone(), planned_len: self.planned_len }
    }

    /// Forgets the tokens from `len` on, see [`KvCache::truncate`].
    ///
    /// # Errors
    /// Where that cannot be undone, or there are not so many.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.cache.truncate(len)
    }

    /// Forgets every token.
    ///
    /// # Errors
    /// A cache of somebody's own that cannot.
    pub fn reset(&mut self) -> Result<()> {
        self.cache.truncate(0)
    }

    /// The cache.
    pub fn cache(&self) -> &dyn KvCache {
        &*self.cache
    }

    /// The cache, to be filled with states that were computed elsewhere.
    pub fn cache_mut(&mut self) -> &mut dyn KvCache {
        &mut *self.cache
    }

    /// For a step to put back what it was.
    pub(crate) fn replace_cache(&mut self, cache: Box<dyn KvCache>) {
        self.cache = cache;
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequence")
            .field("len", &self.len())
            .field("planned_len", &self.planned_len)
            .field("footprint", &self.footprint())
            .finish_non_exhaustive()
    }
}
