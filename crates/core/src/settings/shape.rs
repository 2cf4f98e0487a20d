//! The numbers of a model that a cache depends on.

use crate::settings::{Checked, SettingError};

/// The numbers of a model that a cache depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Key/value heads per layer; divides `heads`.
    pub kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
    /// Sliding window in tokens: a query at position p sees positions p-window+1 ..= p.
    pub window: Option<usize>,
    /// Factor on the scores q.k before the softmax, usually 1/sqrt(head_dim).
    pub scale: f32,
}

impl ModelShape {
    /// Numbers per token and layer on one side (keys or values): `kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Bytes of the full FP16 cache of one sequence of `tokens`, the yardstick of every compression ratio.
    /// A sliding window bounds it: `min(tokens, window)` are held.
    pub fn full_bytes(&self, tokens: usize) -> usize {
        let held = self.window.map_or(tokens, |w| tokens.min(w));
        // Settings are bounded so that this does not come near the largest number in any model.
        [2, 2, self.layers, self.kv_heads, self.head_dim].into_iter().fold(held, usize::saturating_mul)
    }

    /// Checks that a cache can have this shape.
    ///
    /// # Errors
    /// A number that is zero, query heads that are no multiple of the KV heads, a scale that is not finite.
    pub fn validate(&self) -> Checked {
        let counts = [
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("window", self.window.unwrap_or(1)),
        ];
        if let Some((key, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Err(SettingError::new(key, "must be at least 1"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!("must be a multiple of the {} KV heads, not {}", self.kv_heads, self.heads);
            return Err(SettingError::new("heads", message));
        }
        if !self.scale.is_finite() {
            return Err(SettingError::new("scale", format!("must be finite, not {}", self.scale)));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn impossible_shapes_are_named() {
        let good = ModelShape { layers: 4, heads: 6, kv_heads: 3, head_dim: 8, window: None, scale: 0.3 };
        good.validate().unwrap();
        let key = |shape: ModelShape| shape.validate().unwrap_err().key;
        assert_eq!(key(ModelShape { layers: 0, ..good }), "layers");
        assert_eq!(key(ModelShape { kv_heads: 0, ..good }), "kv_heads");
        assert_eq!(key(ModelShape { kv_heads: 4, ..good }), "heads");
        assert_eq!(key(ModelShape { head_dim: 0, ..good }), "head_dim");
        assert_eq!(key(ModelShape { window: Some(0), ..good }), "window");
        assert_eq!(key(ModelShape { scale: f32::NAN, ..good }), "scale");
        assert_eq!(good.full_bytes(2), 2 * 2 * 4 * 3 * 8 * 2);
    }
}
