//! Settings of the cross-layer latent cache.

use serde::{Deserialize, Serialize};

use crate::bounds::{MOST_TOKENS, check_number};
use crate::cache::as_word_or_number;
use crate::{Axis, ConfigError, Result};

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

/// How many principal components are kept of the n = group * heads * head_dim numbers that share a latent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
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

/// One side (keys or values) of a latent cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LatentSide {
    /// Layers per latent.
    pub group: Group,
    /// KV heads per latent: fewer give up what heads have in common, for attention that is as many times cheaper,
    /// because a query head reads the latents of its own KV head's set only.
    pub heads: Heads,
    /// Components kept, where `rate` is absent.
    pub rank: Rank,
    /// Mean bits per original number: bits are allocated to components by their calibrated variance, and steps are
    /// calibrated too, so that no scales are stored. Absent: `rank` components at `bits` each.
    pub rate: Option<f64>,
    /// Bits per component: 2, 3, 4 or 8; 16 keeps f16.
    pub bits: u8,
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
            quant_group: 32,
            axis: Axis::Token,
        }
    }
}

impl LatentSide {
    pub(crate) fn validate(&self) -> Result<()> {
        if self.group == Group::Layers(0) {
            return Err(ConfigError::new("group", "must be \"auto\" or at least 1 layer"));
        }
        if self.heads == Heads::Number(0) {
            return Err(ConfigError::new("heads", "must be \"all\" or at least 1 KV head"));
        }
        let share = |x: f64| x > 0.0 && x <= 1.0;
        match self.rank {
            Rank::Number(0) => return Err(ConfigError::new("rank", "must be at least 1")),
            Rank::Fraction(f) if !share(f) => {
                return Err(ConfigError::new(
                    "rank",
                    format!("a fraction must be above 0 and at most 1.0, not {f}"),
                ));
            }
            Rank::Energy { energy } if !share(energy) => {
                return Err(ConfigError::new(
                    "rank.energy",
                    format!("must be above 0 and at most 1, not {energy}"),
                ));
            }
            _ => {}
        }
        if self.rate.is_some_and(|r| !(r > 0.0 && r <= 8.0)) {
            return Err(ConfigError::new("rate", "must be above 0 and at most 8 bits"));
        }
        if ![2, 3, 4, 8, 16].contains(&self.bits) {
            return Err(ConfigError::new("bits", format!("must be 2, 3, 4, 8 or 16, not {}", self.bits)));
        }
        crate::cache::check_group("quant_group", self.quant_group)
    }
}

/// Where the calibration text of a latent cache or an aligned model comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Calibration {
    /// A task whose text is used, such as `gsm8k` or `longbench/gov_report`, or a comma-separated list.
    pub task: String,
    /// A text file, instead of a task.
    pub file: Option<String>,
    /// Tokens looked at.
    pub tokens: usize,
    /// Length of the chunks the text is cut into, in tokens.
    pub chunk: usize,
}

impl Calibration {
    /// The tasks whose text is used.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.task.split(',').map(str::trim).filter(|t| !t.is_empty())
    }

    pub(crate) fn validate(&self) -> Result<()> {
        check_number("tokens", self.tokens, 1..=MOST_TOKENS)?;
        check_number("chunk", self.chunk, 1..=MOST_TOKENS)
    }
}

impl Default for Calibration {
    fn default() -> Self {
        Self { task: "longbench".to_string(), file: None, tokens: 8192, chunk: 1024 }
    }
}
