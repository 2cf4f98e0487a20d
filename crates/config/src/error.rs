//! Errors that name the file, the line and the key.

use std::path::{Path, PathBuf};

use minicache_core::settings::{SettingError, is_deep, within};

/// Characters of an error, at most: keys and values of a file have no such bound.
const LONGEST: usize = 1500;

/// What is wrong with a configuration, and where.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}", self.line_text())]
pub struct ConfigError {
    /// The file the text came from; `None` for text given on the command line.
    pub file: Option<PathBuf>,
    /// 1-based line, where known.
    pub line: Option<usize>,
    /// Dotted key, such as `cache.retention.gamma`; empty where no single key is at fault.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

/// Result with [`ConfigError`].
pub type Result<T> = std::result::Result<T, ConfigError>;

impl From<SettingError> for ConfigError {
    fn from(error: SettingError) -> Self {
        Self::new(error.key, error.message)
    }
}

impl ConfigError {
    /// An error about `key`, not yet placed in a file.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { file: None, line: None, key: key.into(), message: message.into() }
    }

    /// Puts a prefix before the key: `gamma` inside `cache.retention` becomes `cache.retention.gamma`.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        self.key = if self.key.is_empty() { prefix.to_string() } else { format!("{prefix}.{}", self.key) };
        self
    }

    /// Places the error in `file`, finding the line of its key in `text`.
    #[must_use]
    pub fn in_file(mut self, file: &Path, text: &str) -> Self {
        self.file = Some(file.to_path_buf());
        if self.line.is_none() {
            self.line = line_of(text, &self.key);
        }
        self
    }

    fn line_text(&self) -> String {
        let mut place = match (&self.file, self.line) {
            (Some(f), Some(l)) => format!("{}:{l}: ", f.display()),
            (Some(f), None) => format!("{}: ", f.display()),
            (None, _) => String::new(),
        };
        if !self.key.is_empty() {
            place.push_str(&self.key);
            place.push_str(": ");
        }
        within(&(place + &self.message), LONGEST)
    }
}

/// The 1-based line on which the longest known prefix of the dotted `key` stands in the TOML `text`.
fn line_of(text: &str, key: &str) -> Option<usize> {
    if is_deep(text) {
        return None;
    }
    let doc = toml_edit::Document::parse(text).ok()?;
    let mut item = doc.as_item();
    let mut span = None;
    let mut rest = key;
    while !rest.is_empty() {
        if let Some(array) = item.as_array_of_tables() {
            let (index, tail) = split_head(rest);
            let Some(table) = index.parse().ok().and_then(|i: usize| array.get(i)) else { break };
            span = table.span().or(span);
            let Some((found, next, left)) = step(table, tail) else { break };
            (span, item, rest) = (found.or(span), next, left);
            continue;
        }
        let Some(table) = item.as_table_like() else { break };
        let Some((found, next, left)) = step(table, rest) else { break };
        (span, item, rest) = (found.or(span), next, left);
    }
    span.map(|s| text[..s.start].matches('\n').count() + 1)
}

type Step<'a> = (Option<std::ops::Range<usize>>, &'a toml_edit::Item, &'a str);

/// One step of the descent: a quoted dotted key (as in `[sweep]`) is tried whole before it is split.
fn step<'a>(table: &'a dyn toml_edit::TableLike, rest: &'a str) -> Option<Step<'a>> {
    let (head, tail) = split_head(rest);
    for (name, left) in [(rest, ""), (head, tail)] {
        if let Some((k, v)) = table.get_key_value(name) {
            return Some((k.span(), v, left));
        }
    }
    None
}

fn split_head(key: &str) -> (&str, &str) {
    key.split_once('.').unwrap_or((key, ""))
}

/// Turns a TOML syntax or type error into one line with the key that it is about.
pub(crate) fn from_toml(error: &toml::de::Error, text: &str) -> ConfigError {
    let line = error.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    let key = error.span().and_then(|s| key_at(text, s.start)).unwrap_or_default();
    let message = error.message().lines().map(str::trim).collect::<Vec<_>>().join("; ");
    ConfigError { file: None, line, key, message }
}

/// The dotted key whose value covers byte `at`.
fn key_at(text: &str, at: usize) -> Option<String> {
    fn walk(table: &dyn toml_edit::TableLike, prefix: &str, at: usize) -> Option<String> {
        for (name, item) in table.iter() {
            let path = if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") };
            let key_span = table.get_key_value(name).and_then(|(k, _)| k.span());
            if key_span.is_some_and(|s| s.contains(&at)) {
                return Some(path);
            }
            if let Some(inner) = item.as_table_like()
                && let Some(found) = walk(inner, &path, at)
            {
                return Some(found);
            }
            if item.span().is_some_and(|s| s.contains(&at)) && !item.is_table() {
                return Some(path);
            }
        }
        None
    }
    let doc = toml_edit::Document::parse(text).ok()?;
    walk(doc.as_table(), "", at)
}
