//! One record of a data file that knows where it stands, so that every complaint can say it.

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
        let mut keys = path.split('.');
        let mut value = self.fields.get(keys.next()?)?;
        for key in keys {
            value = value.get(key)?;
        }
        (!value.is_null()).then_some(value)
    }

    /// A complaint about `path`.
    pub fn wrong(&self, path: &str, expected: impl Into<String>) -> DataError {
        let found = self.get(path).map_or_else(|| "nothing".to_string(), brief);
        DataError::Field {
            place: self.place.clone(),
            field: path.to_string(),
            expected: expected.into(),
            found,
        }
    }

    /// A string.
    pub fn str(&self, path: &str) -> Result<&str> {
        self.get(path).and_then(Value::as_str).ok_or_else(|| self.wrong(path, "a string"))
    }

    /// A list of strings.
    pub fn strs(&self, path: &str) -> Result<Vec<String>> {
        let list = self.get(path).and_then(Value::as_array);
        let strings = list.and_then(|l| l.iter().map(|v| v.as_str().map(str::to_string)).collect());
        strings.ok_or_else(|| self.wrong(path, "a list of strings"))
    }

    /// A list of whole numbers.
    pub fn ints(&self, path: &str) -> Result<Vec<i64>> {
        let list = self.get(path).and_then(Value::as_array);
        let numbers = list.and_then(|l| l.iter().map(Value::as_i64).collect());
        numbers.ok_or_else(|| self.wrong(path, "a list of whole numbers"))
    }

    /// A whole number in `0..below`, such as the index of the right choice.
    pub fn index_below(&self, path: &str, below: usize) -> Result<usize> {
        let number = self.get(path).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        number
            .filter(|&n| n < below)
            .ok_or_else(|| self.wrong(path, format!("a whole number from 0 to {}", below - 1)))
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
        Value::Object(map) => {
            format!(
                "an object with {}",
                map.keys().map(String::as_str).take(6).collect::<Vec<_>>().join(", ")
            )
        }
    }
}
