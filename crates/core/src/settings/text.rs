//! Caches as they are written: a name, or a table of TOML.

use super::{Checked, SettingError, toml_from_str};
use crate::methods::{CacheSpec, METHODS, MethodInfo};

/// What becomes of a key that the method in question does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// It is an error: whoever wrote it expects it to do something.
    Refuse,
    /// It is left out, if any method has such a key: a default that several caches share.
    Drop,
}

impl CacheSpec {
    /// Reads SPEC as the command line takes it: a method name, `NAME-BITS` (such as `kivi-2`), or an inline table.
    ///
    /// # Errors
    /// Unknown methods and keys, wrong types and values out of range; the key is one below `cache`.
    pub fn parse(text: &str) -> Result<Self, SettingError> {
        Self::read_spec(text.trim()).map_err(|e| e.under("cache"))
    }

    fn read_spec(text: &str) -> Result<Self, SettingError> {
        if !text.starts_with('{') {
            return Self::by_name(text);
        }
        let wrapped = format!("cache = {text}");
        let mut table: toml::Table = toml_from_str(&wrapped).map_err(|e| {
            let message = e.message().lines().map(str::trim).collect::<Vec<_>>().join("; ");
            SettingError::new("", message)
        })?;
        match table.remove("cache") {
            Some(toml::Value::Table(table)) => Self::from_table(table, Unread::Refuse),
            _ => Err(SettingError::new("", "expected a table")),
        }
    }

    /// Reads a table of settings; without a `method` it is the full cache.
    ///
    /// # Errors
    /// As [`CacheSpec::parse`], with the key below the table.
    pub fn from_table(mut table: toml::Table, unread: Unread) -> Result<Self, SettingError> {
        let name = match table.remove("method") {
            None => CacheSpec::default().name().to_string(),
            Some(toml::Value::String(name)) => name,
            Some(other) => {
                let message = format!("must be the name of a method, not {}", other.type_str());
                return Err(SettingError::new("method", message));
            }
        };
        let Some(method) = MethodInfo::find(&name) else {
            return Err(SettingError::new("method", MethodInfo::unknown(&name)));
        };
        let keys = (method.keys)();
        let foreign: Vec<String> =
            table.keys().filter(|key| !keys.contains(&key.as_str())).cloned().collect();
        for key in foreign {
            if is_known(&key) && unread == Unread::Drop {
                table.remove(&key);
                continue;
            }
            return Err(foreign_key(&name, &key, keys));
        }
        let spec = (method.read)(table).map_err(|e| {
            let key = e.path().to_string();
            let key = if key == "." { String::new() } else { key };
            SettingError::new(key, e.inner().message())
        })?;
        spec.validate()?;
        Ok(spec)
    }

    /// Checks that the method reads all of these keys, `method` itself aside.
    ///
    /// # Errors
    /// Names the key and those that the method reads.
    pub fn check_reads<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> Checked {
        let read = self.keys();
        match keys.into_iter().find(|key| *key != "method" && !read.contains(key)) {
            Some(key) => Err(foreign_key(self.name(), key, read)),
            None => Ok(()),
        }
    }
}

/// Whether any method has this key.
fn is_known(key: &str) -> bool {
    METHODS.iter().any(|m| (m.keys)().contains(&key))
}

fn foreign_key(method: &str, key: &str, read: &[&str]) -> SettingError {
    let what = if is_known(key) { "not read by" } else { "unknown key of" };
    let message = format!("{what} method = \"{method}\", which reads {}", read.join(", "));
    SettingError::new(key, message)
}
