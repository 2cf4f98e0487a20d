//! Settings of the cross-layer latent cache.

use super::bounds::check_group;
use super::word::as_word_or_number;
use super::{Axis, Checked, SettingError};

/// How many consecutive layers share one latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Chosen on calibration text by measured loss per byte.
    Auto,
    /// This many layers.
    Layers(usize),
}

impl Group {
    /// The number in a model of `layers` layers; all of them where it is not chosen yet.
    pub fn layers(self, layers: usize) -> usize {
        match self {
            Group::Auto => layers,
            Group::Layers(n) => n.min(layers),
        }
    }
}

as_word_or_number!(Group, Auto = "auto", Layers, "\"auto\" or a number of layers");

/// How many KV heads share one latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heads {
    /// All of a layer's.
    All,
    /// This many; the last ones may be fewer.
    Number(usize),
}

impl Heads {
    /// The number in a model that has `kv_heads`.
    pub fn of(self, kv_heads: usize) -> usize {
        match self {
            Heads::All => kv_heads,
            Heads::Number(n) => n.min(kv_heads),
        }
    }
}

as_word_or_number!(Heads, All = "all", Number, "\"all\" or a number of KV heads");

/// How many components are kept of the n = group * heads * head_dim numbers that share a latent.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(untagged))]
pub enum Rank {
    /// This many.
    Number(usize),
    /// This share of n, in 0..=1.
    Fraction(f64),
    /// As many as hold this share of the energy (sum of eigenvalues), in 0..=1.
    Energy {
        /// The share.
        energy: f64,
    },
}

impl Rank {
    pub(crate) fn validate(self, key: &str) -> Checked {
        let share = |x: f64| x > 0.0 && x <= 1.0;
        let bad = |key: &str, message: String| Err(SettingError::new(key, message));
        match self {
            Rank::Number(0) => bad(key, "must be at least 1".into()),
            Rank::Fraction(f) if !share(f) => {
                bad(key, format!("a fraction must be above 0 and at most 1.0, not {f}"))
            }
            Rank::Energy { energy } if !share(energy) => {
                bad(&format!("{key}.energy"), format!("must be above 0 and at most 1, not {energy}"))
            }
            _ => Ok(()),
        }
    }

    /// Components of `n`, 1 at the least; `None` where their energy decides.
    pub(crate) fn of(self, n: usize) -> Option<usize> {
        let rank = match self {
            Rank::Number(rank) => rank,
            Rank::Fraction(share) => (share * n as f64).round() as usize,
            Rank::Energy { .. } => return None,
        };
        Some(rank.clamp(1, n.max(1)))
    }
}

/// One side (keys or values) of a latent cache.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct LatentSide {
    /// Layers per latent.
    pub group: Group,
    /// KV heads per latent: fewer give up what heads have in common, for attention that is as many times cheaper,
    /// because a query head reads the latents of its own KV head's set only.
    pub heads: Heads,
    /// Components kept, where `rate` is absent.
    pub rank: Rank,
    /// Mean bits per original number: bits are allocated to components by their calibrated variance, and steps are
    /// calibrated too; one magnitude per token and section is stored beside the codes. Absent: `rank` components at `bits` each.
    pub rate: Option<f64>,
    /// Bits per component: 2, 3, 4 or 8; 16 keeps f16.
    pub bits: u8,
    /// Codes of allocated bits follow a trellis: a third less error in not one bit more, for some more work when they are
    /// written and read.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "std::ops::Not::not"))]
    pub trellis: bool,
    /// Bits of the newest tokens' numbers: 8 keeps them as `fp8` does, in half the room; absent: the storage type's. Keys of
    /// some models have channels so large that three bits of mantissa are too few for them.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub residual_bits: Option<u8>,
    /// Quantisation group along the latent (per token) or along tokens (per channel).
    pub quant_group: usize,
    /// Axis of the quantisation group.
    pub axis: Axis,
}

impl Default for LatentSide {
    fn default() -> Self {
        Self {
            group: Group::Layers(4),
            heads: Heads::Number(1),
            rank: Rank::Fraction(0.5),
            rate: None,
            bits: 4,
            trellis: false,
            residual_bits: None,
            quant_group: 32,
            axis: Axis::Token,
        }
    }
}

impl LatentSide {
    pub(crate) fn validate(&self) -> Checked {
        if self.group == Group::Layers(0) {
            return Err(SettingError::new("group", "must be \"auto\" or at least 1 layer"));
        }
        if self.heads == Heads::Number(0) {
            return Err(SettingError::new("heads", "must be \"all\" or at least 1 KV head"));
        }
        self.rank.validate("rank")?;
        if self.trellis && self.rate.is_none() {
            return Err(SettingError::new("trellis", "needs a rate, by which bits are allocated"));
        }
        if let Some(bits) = self.residual_bits.filter(|&bits| bits != 8) {
            return Err(SettingError::new("residual_bits", format!("must be 8 or absent, not {bits}")));
        }
        if self.rate.is_some_and(|r| !(r > 0.0 && r <= 8.0)) {
            return Err(SettingError::new("rate", "must be above 0 and at most 8 bits"));
        }
        if ![2, 3, 4, 8, 16].contains(&self.bits) {
            return Err(SettingError::new("bits", format!("must be 2, 3, 4, 8 or 16, not {}", self.bits)));
        }
        check_group("quant_group", self.quant_group)
    }
}
