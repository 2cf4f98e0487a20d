//! JSON as Python's `json` module reads and writes it, which most of the field's files come from.
//!
//! Beyond the standard it knows `NaN`, `Infinity` and `-Infinity`, numbers of any size and half surrogates (`\ud800`);
//! of a key that comes twice the last one counts. In everything else it is as strict as Python is. A byte order mark
//! is passed over. What it holds at once is bounded by the text, and its depth by a constant.
//!
//! What [`Value`] has no place for becomes the nearest thing that it has:
//! * `NaN`, infinities and numbers beyond `f64` become an object that no file has, so that nothing takes one for a
//!   text, a label or an absent value; [`as_f64`] and the serde helper [`number`] know it;
//! * integers beyond 64 bits become the nearest `f64`;
//! * half surrogates become U+FFFD, as in every UTF-8 text.

mod non_finite;
mod parser;

use std::iter::FusedIterator;

use serde_json::Value;

use crate::foreign::utf8;
use parser::Parser;

pub use non_finite::{as_f64, from_f64, number, numbers, optional_number};

/// What is wrong with a text that should be JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Something else than UTF-8 text.
    #[error("{0}")]
    NotText(String),
    /// Not JSON.
    #[error("not valid JSON: {reason} (line {line}, column {column}{})", field_text(.field))]
    Syntax {
        /// What is wrong.
        reason: String,
        /// Where, from 1.
        line: usize,
        /// Where in the line, in characters from 1.
        column: usize,
        /// The field whose value could not be read, dotted where nested; empty outside of all.
        field: String,
    },
}

fn field_text(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!(", field `{field}`") }
}

impl JsonError {
    /// The error without its line, for a text that is one line of a file.
    pub fn without_line(&self) -> String {
        match self {
            Self::NotText(what) => what.clone(),
            Self::Syntax { reason, column, field, .. } => {
                format!("not valid JSON: {reason} (column {column}{})", field_text(field))
            }
        }
    }
}

/// Reads one document.
///
/// # Errors
/// Bytes that are no text, text that is no JSON, or JSON that is nested too deeply.
pub fn from_slice(bytes: &[u8]) -> Result<Value, JsonError> {
    from_str(utf8(bytes).map_err(JsonError::NotText)?)
}

/// Reads one document.
///
/// ```
/// use minicache_config::python_json;
/// let value = python_json::from_str(r#"{"acc": NaN, "n": 1, "n": 2, "half": "\ud800"}"#).unwrap();
/// assert!(python_json::as_f64(&value["acc"]).unwrap().is_nan());
/// assert_eq!((value["n"].as_u64(), value["half"].as_str()), (Some(2), Some("\u{fffd}")));
/// assert!(python_json::from_str("[1,]").is_err());
/// ```
///
/// # Errors
/// As [`from_slice`].
pub fn from_str(text: &str) -> Result<Value, JsonError> {
    let mut parser = Parser::new(text);
    parser.whole().map_err(|wrong| parser.place(*wrong))
}

/// The entries of a list that is the whole document or the value of `key` in it, one by one: what is not asked for is
/// not read.
///
/// # Errors
/// A document that is neither; its entries give their own.
pub fn entries<'a>(text: &'a str, key: &str) -> Result<Entries<'a>, JsonError> {
    let mut parser = Parser::new(text);
    let inside = parser.find_list(key).map_err(|wrong| parser.place(*wrong))?;
    Ok(Entries { parser, inside, read: 0, over: false })
}

/// See [`entries`].
#[derive(Debug)]
pub struct Entries<'a> {
    parser: Parser<'a>,
    /// The list is the value of a key.
    inside: bool,
    read: usize,
    over: bool,
}

impl Iterator for Entries<'_> {
    type Item = Result<Value, JsonError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        self.parser.values = 0;
        let depth = 1 + usize::from(self.inside);
        let next = self.parser.element(self.read == 0, depth).and_then(|value| match value {
            Some(value) => Ok(Some(value)),
            None if self.inside => self.parser.rest_of_object().map(|()| None),
            None => self.parser.end().map(|()| None),
        });
        self.read += 1;
        self.over = !matches!(next, Ok(Some(_)));
        next.map_err(|wrong| self.parser.place(*wrong)).transpose()
    }
}

impl FusedIterator for Entries<'_> {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn entries_are_read_one_by_one() {
        let texts = |text: &str| entries(text, "data").map(|e| e.collect::<Result<Vec<_>, _>>());
        assert_eq!(texts("[{}, 1 ]").unwrap().unwrap(), [json!({}), json!(1)]);
        assert_eq!(
            texts(r#"{"v": "1", "data": [1, [2]], "w": 0}"#).unwrap().unwrap(),
            [json!(1), json!([2])]
        );
        for text in ["1", "{}", r#"{"data": 1}"#] {
            let error = texts(text).unwrap_err().to_string();
            assert!(error.contains("a list"), "{error}");
        }
        for text in ["[1", "[1]]", r#"{"data": [1]"#, r#"{"data": [1], "w": }"#, "[1 2]", "[1,]"] {
            assert!(texts(text).unwrap().is_err(), "{text}");
        }
        // What is not asked for may be anything.
        assert_eq!(entries("[1, 2, oops", "data").unwrap().take(2).count(), 2);
    }
}
