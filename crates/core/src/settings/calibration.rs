//! Text that bases, alignments and choices are made on.

use super::Checked;
use super::bounds::{MOST_TOKENS, check_number};

/// Where the calibration text of a latent cache or an aligned model comes from.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
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

    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the key below `calibration` and what is allowed.
    pub fn validate(&self) -> Checked {
        check_number("tokens", self.tokens, 1..=MOST_TOKENS)?;
        check_number("chunk", self.chunk, 1..=MOST_TOKENS)
    }
}

impl Default for Calibration {
    fn default() -> Self {
        Self { task: "longbench".to_string(), file: None, tokens: 8192, chunk: 1024 }
    }
}
