//! `KEY=VALUE` with a dotted key, as the command line sets it.

use crate::{ConfigError, Result};

/// Parts of a dotted key, at most; the deepest there is has five.
const MOST_PARTS: usize = 16;

/// Applies `KEY=VALUE` with a dotted key to `table`. VALUE is TOML, or a bare string.
pub(super) fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let (key, value) = assignment
        .split_once('=')
        .ok_or_else(|| ConfigError::new("--set", format!("`{assignment}` is not KEY=VALUE")))?;
    if key.split('.').count() > MOST_PARTS {
        return Err(ConfigError::new("--set", format!("the key has more than {MOST_PARTS} parts")));
    }
    let value = value.trim();
    let parsed = parse_value(value);
    let digits = value.trim_start_matches(['+', '-']);
    if parsed.is_str() && !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '_') {
        let message = format!("`{value}` is no number that a setting can have (after --set {assignment})");
        return Err(ConfigError::new(key.trim(), message));
    }
    set(table, key.trim(), parsed)
}

/// A TOML value, or the text itself as a string: values as the command line takes them.
pub fn parse_value(text: &str) -> toml::Value {
    crate::toml_from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_string()))
}

/// Sets the dotted `key` to `value`, making tables on the way.
pub(crate) fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_string(), value);
            Ok(())
        }
        Some((head, rest)) => {
            let inner = table.entry(head).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            match inner {
                toml::Value::Table(t) => set(t, rest, value),
                _ => Err(ConfigError::new(
                    key,
                    format!("`{head}` is not a table, so `{rest}` cannot be set in it"),
                )),
            }
        }
    }
}
