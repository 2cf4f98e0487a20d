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
    /// Layers that see all tokens in spite of the window.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "LayerSet::is_empty"))]
    pub full_layers: LayerSet,
    /// Scores become `softcap * tanh(score / softcap)`, as Gemma 2 has them.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub softcap: Option<f32>,
}

/// Some of a model's first 128 layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(from = "Vec<usize>", into = "Vec<usize>"))]
pub struct LayerSet(u128);

impl LayerSet {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }

    /// Whether `layer` is one of them.
    pub fn contains(&self, layer: usize) -> bool {
        layer < 128 && self.0 >> layer & 1 == 1
    }
}

/// Layers from 128 on are left out.
impl FromIterator<usize> for LayerSet {
    fn from_iter<T: IntoIterator<Item = usize>>(layers: T) -> Self {
        Self(layers.into_iter().filter(|&layer| layer < 128).fold(0, |set, layer| set | 1 << layer))
    }
}

impl From<Vec<usize>> for LayerSet {
    fn from(layers: Vec<usize>) -> Self {
        layers.into_iter().collect()
    }
}

impl From<LayerSet> for Vec<usize> {
    fn from(set: LayerSet) -> Self {
        (0..128).filter(|&layer| set.contains(layer)).collect()
    }
}

impl ModelShape {
    /// A layer of one head, without a window or a cap: what most shapes take the rest from.
    pub const PLAIN: Self = Self {
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        window: None,
        scale: 1.0,
        full_layers: LayerSet::NONE,
        softcap: None,
    };

    /// The sliding window of a layer.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| !self.full_layers.contains(layer))
    }

    /// First position that the query at `position` sees in a layer.
    pub fn first_seen(&self, layer: usize, position: usize) -> usize {
        self.window_of(layer).map_or(0, |w| (position + 1).saturating_sub(w))
    }

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
        let held = |layer| self.window_of(layer).map_or(tokens, |w| tokens.min(w));
        // By layer, and those beyond the last that a set can have alike; settings are bounded so that this does not come
        // near the largest number in any model.
        let (some, rest) = (self.layers.min(128), self.layers.saturating_sub(128));
        let held =
            (0..some).fold(held(128).saturating_mul(rest), |sum, layer| sum.saturating_add(held(layer)));
        [2, 2, self.kv_heads, self.head_dim].into_iter().fold(held, usize::saturating_mul)
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
        if self.softcap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
            return Err(SettingError::new("softcap", "must be a number above 0"));
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
        let good =
            ModelShape { layers: 4, heads: 6, kv_heads: 3, head_dim: 8, scale: 0.3, ..ModelShape::PLAIN };
        good.validate().unwrap();
        let key = |shape: ModelShape| shape.validate().unwrap_err().key;
        assert_eq!(key(ModelShape { layers: 0, ..good }), "layers");
        assert_eq!(key(ModelShape { kv_heads: 0, ..good }), "kv_heads");
        assert_eq!(key(ModelShape { kv_heads: 4, ..good }), "heads");
        assert_eq!(key(ModelShape { head_dim: 0, ..good }), "head_dim");
        assert_eq!(key(ModelShape { window: Some(0), ..good }), "window");
        assert_eq!(key(ModelShape { scale: f32::NAN, ..good }), "scale");
        assert_eq!(key(ModelShape { softcap: Some(0.0), ..good }), "softcap");
        assert_eq!(good.full_bytes(2), 2 * 2 * 4 * 3 * 8 * 2);
        let two = ModelShape { window: Some(5), full_layers: [1, 3].into_iter().collect(), ..good };
        assert_eq!([0, 1, 2, 3].map(|layer| two.window_of(layer)), [Some(5), None, Some(5), None]);
        assert_eq!(two.full_bytes(9), 2 * 2 * (5 + 9 + 5 + 9) * 3 * 8);
        assert_eq!((two.first_seen(0, 7), two.first_seen(1, 7)), (3, 0));
    }
}
