//! Merging one pair of layers outside a model: what `minicache merge` does.

use crate::cache::{KvCache, Restored};
use crate::settings::{ModelShape, StartLayer};
use crate::{CacheSpec, Footprint, Resources, Result};

/// States of two adjacent layers, each `(tokens, kv_heads, head_dim)`.
#[derive(Debug, Clone, Copy)]
pub struct PairStates<'a> {
    /// KV heads.
    pub kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
    /// Keys of the shallower layer.
    pub key_a: &'a [f32],
    /// Keys of the deeper layer.
    pub key_b: &'a [f32],
    /// Values of the shallower layer.
    pub value_a: &'a [f32],
    /// Values of the deeper layer.
    pub value_b: &'a [f32],
}

/// A pair after compression.
#[derive(Debug, Clone)]
pub struct MergedPair {
    /// Both layers as attention would see them. Nothing is rounded to f16: this is the method's own error.
    pub restored: [Restored; 2],
    /// Retained positions of keys, one list (token granularity) or one per KV head.
    pub retained_keys: Vec<Vec<usize>>,
    /// Retained positions of values.
    pub retained_values: Vec<Vec<usize>>,
    /// Bytes of the two layers as a full FP16 cache.
    pub bytes_before: usize,
    /// Bytes really held by the cache of the specification, by part.
    pub footprint: Footprint,
}

/// Compresses the two layers as one pair with `spec` (whose start layer does not matter here).
///
/// # Errors
/// Slices that do not match, states that are not finite, a method that does not work on a pair.
pub fn merge_pair(spec: &CacheSpec, states: &PairStates<'_>) -> Result<MergedPair> {
    let (kv_heads, head_dim) = (states.kv_heads, states.head_dim);
    let shape =
        ModelShape { layers: 2, heads: kv_heads, kv_heads, head_dim, scale: 1.0, ..ModelShape::PLAIN };
    let stored = spec.clone().with_start_layer(StartLayer::Layer(0));
    let exact = stored.clone().with_f32();
    let fill = |spec: &CacheSpec| {
        let mut cache = crate::methods::layered(spec, &shape, &Resources::default())?;
        cache.append(0, states.key_a, states.value_a)?;
        cache.append(1, states.key_b, states.value_b)?;
        cache.finish_step()?;
        Ok::<_, crate::Error>(cache)
    };
    let cache = fill(&exact)?;
    let [retained_keys, retained_values] = cache.retained(1);
    Ok(MergedPair {
        restored: [cache.restored(0)?, cache.restored(1)?],
        retained_keys,
        retained_values,
        bytes_before: shape.full_bytes(cache.len()),
        footprint: fill(&stored)?.footprint(),
    })
}
