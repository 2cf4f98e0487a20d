//! One record of a data file that knows where it stands, so that every complaint can say it.

use minicache_config::{python_json, shown};
use serde_json::{Map, Value};

use super::error::{DataError, Result};

/// One record: an object and its place in a file.
#[derive(Debug, Clone)]
pub struct Record {
    /// The fields.
    pub fields: Map<String, Value>,
    /// File and line, row or entry, as shown in errors.
    pub place: String,
    /// Position in its file, from 0.
    pub index: usize,
}

impl Record {
    /// A record at `place`; anything but an object is an error.
    pub fn new(value: Value, place: String, index: usize) -> Result<Self> {
        match value {
            Value::Object(fields) => Ok(Self { fields, place, index }),
            other => Err(DataError::Format {
                place,
                message: format!("expected an object, found {}", brief(&other)),
            }),
        }
    }

    /// The value at a dotted path such as `choices.text`; `None` when absent or null.
    pub fn get(&self, path: &str) -> Option<&Value> {
        self.at(path).filter(|value| !value.is_null())
    }

    /// The value at a dotted path, which may be null; `None` when absent.
    fn at(&self, path: &str) -> Option<&Value> {
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        let value = self.fields.get(first)?;
        rest.map_or(Some(value), |rest| rest.split('.').try_fold(value, inside))
    }

    /// Whether the field is there, be it null.
    pub fn has(&self, path: &str) -> bool {
        self.at(path).is_some()
    }

    /// A complaint about `path`.
    pub fn wrong(&self, path: &str, expected: impl Into<String>) -> DataError {
        let found = self.at(path).map_or_else(|| "nothing".to_string(), brief);
        DataError::Field { place: self.place.clone(), field: shown(path), expected: expected.into(), found }
    }

    /// A string.
    pub fn str(&self, path: &str) -> Result<&str> {
        self.get(path).and_then(Value::as_str).ok_or_else(|| self.wrong(path, "a string"))
    }

    /// A list of strings.
    pub fn strs(&self, path: &str) -> Result<Vec<String>> {
        self.list(path, "a list of strings", "a string", |value| value.as_str().map(str::to_string))
    }

    /// A list of whole numbers.
    pub fn ints(&self, path: &str) -> Result<Vec<i64>> {
        self.list(path, "a list of whole numbers", "a whole number", Value::as_i64)
    }

    /// A list, its entries read by `read`; an entry of another kind is named by its place.
    fn list<T>(
        &self,
        path: &str,
        expected: &str,
        entry: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>> {
        let list = self.get(path).and_then(Value::as_array).ok_or_else(|| self.wrong(path, expected))?;
        let read = |(i, value)| read(value).ok_or_else(|| self.wrong(&format!("{path}.{i}"), entry));
        list.iter().enumerate().map(read).collect()
    }

    /// A whole number in `0..below`, such as the index of the right choice.
    pub fn index_below(&self, path: &str, below: usize) -> Result<usize> {
        let number = self.get(path).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        number
            .filter(|&n| n < below)
            .ok_or_else(|| self.wrong(path, format!("a whole number from 0 to {}", below - 1)))
    }
}

/// The value of a key, or the entry of a list.
fn inside<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    match value {
        Value::Array(list) => list.get(key.parse::<usize>().ok()?),
        value => value.get(key),
    }
}

/// A value as shown in an error: its type and the beginning of its text.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => {
            let head: String = s.chars().take(40).collect();
            if head.len() < s.len() {
                format!("the string {head:?}...")
            } else {
                format!("the string {head:?}")
            }
        }
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => match python_json::as_f64(value) {
            Some(number) => format!("the number {number}"),
            None => format!("an object with {}", keys(map)),
        },
    }
}

/// The first keys of an object.
pub(crate) fn keys(map: &Map<String, Value>) -> String {
    map.keys().take(8).map(|key| shown(key)).collect::<Vec<_>>().join(", ")
}
