//! What a decoder hands to a cache, and the checks of it.

use crate::settings::ModelShape;
use crate::{Error, Result};

/// The states of one sequence's new tokens in one layer.
#[derive(Debug, Clone, Copy)]
pub struct States<'a> {
    /// Queries `(tokens, heads, head_dim)`; empty where states are stored that were computed elsewhere.
    pub q: &'a [f32],
    /// Keys `(tokens, kv_heads, head_dim)`, as attention sees them: after RoPE.
    pub k: &'a [f32],
    /// Values, as keys.
    pub v: &'a [f32],
    /// A score for each query head that takes its share of the softmax and gives nothing (the learned sinks of gpt-oss), or
    /// none.
    pub sink_scores: &'a [f32],
}

impl<'a> States<'a> {
    /// States of a layer without sink scores.
    pub fn new(q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Self {
        Self { q, k, v, sink_scores: &[] }
    }

    /// Tokens, in a model of `shape`.
    pub fn tokens(&self, shape: &ModelShape) -> usize {
        self.k.len() / shape.kv_dim()
    }

    /// Checks the slices of a step against the shape, `out` too, and the states for NaN and infinity.
    ///
    /// # Errors
    /// A layer that the model does not have, slices of the wrong length, states that are not finite, with their
    /// position after `len` tokens.
    pub fn check(&self, shape: &ModelShape, layer: usize, len: usize, out: &[f32]) -> Result<()> {
        self.check_stored(shape, layer, len)?;
        let (tokens, width) = (self.tokens(shape), shape.heads * shape.head_dim);
        if !self.sink_scores.is_empty() {
            check_len("sink scores", self.sink_scores.len(), 1, shape.heads)?;
        }
        check_len("queries", self.q.len(), tokens, width)?;
        check_len("output", out.len(), tokens, width)
    }

    /// [`States::check`] without queries.
    ///
    /// # Errors
    /// Likewise.
    pub fn check_stored(&self, shape: &ModelShape, layer: usize, len: usize) -> Result<()> {
        check_layer(shape, layer)?;
        let (tokens, width) = (self.tokens(shape), shape.kv_dim());
        check_len("keys", self.k.len(), tokens, width)?;
        check_len("values", self.v.len(), tokens, width)?;
        for (side, x) in [("key", self.k), ("value", self.v)] {
            // One pass without branches, and the slow search only on failure.
            if !x.iter().fold(true, |all, v| all & v.is_finite()) {
                let at = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
                return Err(Error::NotFinite { side, layer, position: len + at / width });
            }
        }
        Ok(())
    }
}

/// Whether a slice of `got` numbers is that of so many tokens.
pub(crate) fn check_len(what: &'static str, got: usize, tokens: usize, width: usize) -> Result<()> {
    if tokens > 0 && got == tokens * width {
        return Ok(());
    }
    let expected = format!("{} tokens of {width} numbers", tokens.max(1));
    Err(Error::Shape { what, expected, got: format!("{got} numbers") })
}

pub(crate) fn check_layer(shape: &ModelShape, layer: usize) -> Result<()> {
    if layer < shape.layers {
        return Ok(());
    }
    let expected = format!("below {}", shape.layers);
    Err(Error::Shape { what: "layer", expected, got: layer.to_string() })
}

/// Whether a cache of `held` tokens can go back to `len`, given what its method says of fewer.
pub(crate) fn check_truncate(
    held: usize,
    len: usize,
    fewer: impl FnOnce() -> std::result::Result<(), &'static str>,
) -> Result<()> {
    if len > held {
        let expected = format!("at most {held} tokens");
        return Err(Error::Shape { what: "length", expected, got: len.to_string() });
    }
    if len == held {
        return Ok(());
    }
    fewer().map_err(|reason| Error::Truncate { len, reason })
}

/// Why a cache with a sliding window cannot go back.
pub const GONE: &str = "tokens that would come into sight again have left the sliding window";

/// Whether the layers still hold, from `start(layer)` on, what the query after `len` tokens sees.
pub(crate) fn check_in_sight(
    shape: &ModelShape,
    len: usize,
    start: impl Fn(usize) -> usize,
) -> std::result::Result<(), &'static str> {
    let gone = |layer| start(layer) > shape.first_seen(layer, len);
    if len > 0 && (0..shape.layers).any(gone) { Err(GONE) } else { Ok(()) }
}
