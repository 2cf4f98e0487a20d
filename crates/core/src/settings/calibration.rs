//! Text that bases, alignments and choices are made on.

use super::bounds::{MOST_TOKENS, check_number};
use super::{Checked, SettingError};

/// What stands for the model's own text.
const OWN: &str = "self";

/// Where the calibration text of a latent cache or an aligned model comes from.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Calibration {
    /// A task whose text is used, such as `gsm8k` or `longbench/gov_report`, or a comma-separated list; or `self`: text
    /// that the model writes.
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

    /// Whether the text is the model's own.
    pub fn is_own_text(&self) -> bool {
        self.file.is_none() && self.task.trim() == OWN
    }

    /// What the text is, in words.
    pub fn source(&self) -> &str {
        match &self.file {
            Some(file) => file,
            None if self.is_own_text() => "the model's own text",
            None => &self.task,
        }
    }

    /// Checks the numbers, and that `self` stands alone.
    ///
    /// # Errors
    /// Names the key below `calibration` and what is allowed.
    pub fn validate(&self) -> Checked {
        if self.file.is_none() && !self.is_own_text() && self.tasks().any(|task| task == OWN) {
            let message = format!("must be `{OWN}` alone or a list of tasks, not `{}`", self.task);
            return Err(SettingError::new("task", message));
        }
        check_number("tokens", self.tokens, 1..=MOST_TOKENS)?;
        check_number("chunk", self.chunk, 1..=MOST_TOKENS)
    }
}

impl Default for Calibration {
    fn default() -> Self {
        Self { task: OWN.to_string(), file: None, tokens: 8192, chunk: 1024 }
    }
}
