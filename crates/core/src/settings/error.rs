//! What is wrong with a setting.

use super::within;

/// Characters of an error, at most: keys and values have no such bound.
const LONGEST: usize = 1500;

/// A setting that cannot be: its dotted key, and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct SettingError {
    /// Dotted key, such as `retention.gamma`; empty where no single key is at fault.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl SettingError {
    /// An error about `key`.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
    }

    fn text(&self) -> String {
        let colon = if self.key.is_empty() { "" } else { ": " };
        within(&format!("{}{colon}{}", self.key, self.message), LONGEST)
    }

    /// Puts a prefix before the key: `gamma` inside `retention` becomes `retention.gamma`.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        self.key = if self.key.is_empty() { prefix.to_string() } else { format!("{prefix}.{}", self.key) };
        self
    }
}
