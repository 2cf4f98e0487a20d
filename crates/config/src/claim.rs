//! Claims of the paper, as data of the experiment whose rows judge them.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// A claim, the paper's figure for it, and what it takes to hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// What is claimed, in a few words.
    pub text: String,
    /// The paper's figure, with what it was measured on.
    pub paper: String,
    /// What it takes.
    pub needs: Needs,
}

/// What it takes for a claim to hold. Scores are judged by their differences from the full cache on the same samples and
/// the intervals of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum Needs {
    /// In the deeper half of the layers all mean cosines of adjacent layers are at least this, keys and values.
    Similar {
        /// Mean cosine.
        least: f64,
    },
    /// In the deep pairs the mean cosine is at least this after the first bin of positions, and lower in it.
    FirstApart {
        /// Mean cosine.
        least: f64,
    },
    /// The cache scores as the full one does.
    Kept {
        /// The cache.
        which: Which,
        /// What it may lose, as a share of the full cache's score.
        within: f64,
        /// Judged by the mean over tasks instead of each.
        #[serde(default)]
        mean: bool,
    },
    /// The cache scores less than the full one.
    Lost {
        /// The cache.
        which: Which,
        /// Judged by the mean over tasks instead of each.
        #[serde(default)]
        mean: bool,
    },
    /// The cache scores more than each of the others.
    Ahead {
        /// The cache.
        which: Which,
        /// The others.
        of: Vec<Which>,
        /// Judged by the mean over tasks instead of each.
        #[serde(default)]
        mean: bool,
    },
    /// No other value of a swept key scores more, and some score less.
    Best {
        /// The variant.
        variant: String,
        /// The swept key.
        key: String,
        /// The value.
        value: f64,
    },
    /// The cache is smaller than the full one by this factor.
    Ratio {
        /// The variant.
        variant: String,
        /// Bytes of the full FP16 cache over bytes held.
        least: f64,
        /// Only of these models; empty: of all.
        #[serde(default)]
        models: Vec<String>,
    },
    /// The cache reaches a number this many times the most that the full cache reaches.
    Times {
        /// The variant; empty: any.
        #[serde(default)]
        variant: String,
        /// Column of the number.
        column: String,
        /// The factor.
        least: f64,
    },
    /// At the full cache's largest batch the cache takes less by this share.
    Less {
        /// The variant; empty: any.
        #[serde(default)]
        variant: String,
        /// Column of the number.
        column: String,
        /// The share, 0..=1.
        share: f64,
    },
}

/// A variant, and of its rows those whose numbers are nearest to these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// Its name.
    pub variant: String,
    /// Numbers by column.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub at: IndexMap<String, f64>,
}
