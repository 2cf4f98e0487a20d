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

use std::iter::FusedIterator;

use serde_json::{Map, Value};

use crate::foreign::utf8;
use minicache_core::settings::shown;

/// Lists and objects inside of each other, at most. Python gives up at about 1,000.
const MAX_DEPTH: usize = 512;
/// Values in one document, at most: a byte of text can become a hundred in memory.
const MAX_VALUES: usize = 2_000_000;
/// The one key of an object that stands for a number which JSON cannot write.
const NON_FINITE: &str = "$number";

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

/// A number, also one that JSON cannot write.
pub fn as_f64(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| match value {
        Value::Object(map) if map.len() == 1 => map.get(NON_FINITE)?.as_str().and_then(non_finite),
        _ => None,
    })
}

/// The words for numbers that JSON cannot write, as Python spells them.
fn non_finite(word: &str) -> Option<f64> {
    match word {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

fn word(number: f64) -> &'static str {
    if number.is_nan() {
        "NaN"
    } else if number > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    }
}

/// The value that stands for `number`, also where JSON cannot write it.
pub fn from_f64(number: f64) -> Value {
    let marked = || Value::Object(Map::from_iter([(NON_FINITE.to_string(), word(number).into())]));
    serde_json::Number::from_f64(number).map_or_else(marked, Value::Number)
}

/// For `#[serde(with = "...")]` on a field of `f64`: `serde_json` would write `null` for what is not finite and not read
/// it again. It is written as a string, so that the file stays JSON for everyone (`"NaN"`, which Python's `float`
/// takes), and read as that or as the bare word.
pub mod number {
    use serde::de::{Deserializer, Error, MapAccess, Unexpected, Visitor};
    use serde::ser::Serializer;

    use super::{NON_FINITE, non_finite, word};

    /// Writes a number.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if number.is_finite() {
            serializer.serialize_f64(*number)
        } else {
            serializer.serialize_str(word(*number))
        }
    }

    /// Reads a number.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        deserializer.deserialize_any(Number)
    }

    struct Number;

    impl<'de> Visitor<'de> for Number {
        type Value = f64;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a number")
        }

        fn visit_f64<E: Error>(self, v: f64) -> Result<f64, E> {
            Ok(v)
        }

        fn visit_i64<E: Error>(self, v: i64) -> Result<f64, E> {
            Ok(v as f64)
        }

        fn visit_u64<E: Error>(self, v: u64) -> Result<f64, E> {
            Ok(v as f64)
        }

        fn visit_str<E: Error>(self, v: &str) -> Result<f64, E> {
            non_finite(v).ok_or_else(|| E::invalid_value(Unexpected::Str(v), &self))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<f64, A::Error> {
            let entry: Option<(String, String)> = map.next_entry()?;
            let number = entry.filter(|(key, _)| key == NON_FINITE).and_then(|(_, word)| non_finite(&word));
            number.ok_or_else(|| A::Error::invalid_type(Unexpected::Map, &self))
        }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct Number(#[serde(with = "number")] f64);

/// As [`number`], for a field of `Option<f64>`.
pub mod optional_number {
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, Serializer};

    use super::Number;

    /// Writes a number, or null.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        number.map(Number).serialize(serializer)
    }

    /// Reads a number, or null.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Number>::deserialize(deserializer)?.map(|Number(n)| n))
    }
}

/// As [`number`], for a field of `Vec<f64>`.
pub mod numbers {
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::Serializer;

    use super::Number;

    /// Writes numbers.
    ///
    /// # Errors
    /// Of the serializer.
    pub fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(numbers.iter().map(|&n| Number(n)))
    }

    /// Reads numbers.
    ///
    /// # Errors
    /// Anything else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        Ok(Vec::<Number>::deserialize(deserializer)?.into_iter().map(|Number(n)| n).collect())
    }
}

/// What is wrong and where, before lines are counted.
struct Wrong {
    at: usize,
    reason: String,
    /// Keys and places, the innermost first.
    path: Vec<String>,
}

type Parsed<T> = Result<T, Box<Wrong>>;

#[derive(Debug)]
struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// Values read so far.
    values: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { text: text.strip_prefix('\u{feff}').unwrap_or(text), at: 0, values: 0 }
    }

    fn place(&self, wrong: Wrong) -> JsonError {
        let Wrong { at, reason, path } = wrong;
        let before = &self.text[..floor(self.text, at)];
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[start..].chars().count() + 1);
        let field = path.into_iter().rev().collect::<Vec<_>>().join(".");
        JsonError::Syntax { reason, line, column, field: shown(&field) }
    }

    fn wrong<T>(&self, reason: impl Into<String>) -> Parsed<T> {
        Err(Box::new(Wrong { at: self.at, reason: reason.into(), path: Vec::new() }))
    }

    /// That something else was expected than what stands here.
    fn unexpected<T>(&self, expected: &str) -> Parsed<T> {
        match self.text[floor(self.text, self.at)..].chars().next() {
            Some(c) => self.wrong(format!("expected {expected}, found `{}`", shown(&c.to_string()))),
            None => self.wrong(format!("expected {expected}, but the text ends")),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Passes over `byte` where it comes next.
    fn takes(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn whole(&mut self) -> Parsed<Value> {
        let value = self.value(0)?;
        self.end()?;
        Ok(value)
    }

    fn end(&mut self) -> Parsed<()> {
        self.space();
        if self.peek().is_some() { self.unexpected("the end of the text") } else { Ok(()) }
    }

    /// Goes to the first entry of the list; whether it is inside of an object.
    fn find_list(&mut self, key: &str) -> Parsed<bool> {
        const EXPECTED: &str = "a list";
        self.space();
        if self.takes(b'[') {
            return Ok(false);
        }
        let expected = format!("{EXPECTED} of records, or an object with {EXPECTED} `{key}`");
        if !self.takes(b'{') {
            return self.unexpected(&expected);
        }
        let mut first = true;
        while let Some(name) = self.key(first)? {
            self.space();
            if name == key {
                return if self.takes(b'[') {
                    Ok(true)
                } else {
                    self.unexpected(&format!("{EXPECTED} `{key}`"))
                };
            }
            self.value(1).map_err(|wrong| within(wrong, name))?;
            first = false;
        }
        self.at = 0;
        self.wrong(format!("expected {expected}"))
    }

    /// Reads and drops what comes after a value in an object, and the end of the text.
    fn rest_of_object(&mut self) -> Parsed<()> {
        while let Some(name) = self.key(false)? {
            self.value(1).map_err(|wrong| within(wrong, name))?;
        }
        self.end()
    }

    fn value(&mut self, depth: usize) -> Parsed<Value> {
        self.space();
        self.values += 1;
        if self.values > MAX_VALUES {
            return self.wrong(format!("more than {MAX_VALUES} values in one document"));
        }
        match self.peek() {
            Some(b'"') => self.string().map(Value::String),
            Some(b'{') => self.object(depth + 1),
            Some(b'[') => self.list(depth + 1),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                let words = [("null", Value::Null), ("true", true.into()), ("false", false.into())];
                let numbers = ["NaN", "Infinity"].map(|w| (w, non_finite(w).map_or(Value::Null, from_f64)));
                let found =
                    words.into_iter().chain(numbers).find(|(w, _)| self.text[self.at..].starts_with(w));
                let Some((word, value)) = found else { return self.unexpected("a value") };
                self.at += word.len();
                Ok(value)
            }
        }
    }

    fn descend(&mut self, depth: usize) -> Parsed<()> {
        if depth > MAX_DEPTH {
            return self.wrong(format!("lists and objects are nested more than {MAX_DEPTH} deep"));
        }
        self.at += 1;
        Ok(())
    }

    fn object(&mut self, depth: usize) -> Parsed<Value> {
        self.descend(depth)?;
        let mut map = Map::new();
        while let Some(key) = self.key(map.is_empty())? {
            match self.value(depth) {
                Ok(value) => map.insert(key, value),
                Err(wrong) => return Err(within(wrong, key)),
            };
        }
        Ok(Value::Object(map))
    }

    /// The next key with its colon; `None` at the end of the object. Before all but the first there is a comma.
    fn key(&mut self, first: bool) -> Parsed<Option<String>> {
        self.space();
        if self.takes(b'}') {
            return Ok(None);
        }
        if !first {
            if !self.takes(b',') {
                return self.unexpected("`,` or `}`");
            }
            self.space();
        }
        if self.peek() != Some(b'"') {
            return self.unexpected("a key in double quotes");
        }
        let key = self.string()?;
        self.space();
        if self.takes(b':') { Ok(Some(key)) } else { self.unexpected("`:`") }
    }

    fn list(&mut self, depth: usize) -> Parsed<Value> {
        self.descend(depth)?;
        let mut list = Vec::new();
        while let Some(value) =
            self.element(list.is_empty(), depth).map_err(|wrong| within(wrong, list.len().to_string()))?
        {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    /// The next entry of a list; `None` at its end.
    fn element(&mut self, first: bool, depth: usize) -> Parsed<Option<Value>> {
        self.space();
        if self.takes(b']') {
            return Ok(None);
        }
        if !first && !self.takes(b',') {
            return self.unexpected("`,` or `]`");
        }
        self.value(depth).map(Some)
    }

    fn number(&mut self) -> Parsed<Value> {
        let start = self.at;
        let negative = self.takes(b'-');
        if negative && self.text[self.at..].starts_with("Infinity") {
            self.at += "Infinity".len();
            return Ok(from_f64(f64::NEG_INFINITY));
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            Some(b'1'..=b'9') => self.digits(),
            _ => return self.unexpected("a digit"),
        }
        let mut whole = true;
        for (marks, signed) in [(b".".as_slice(), false), (b"eE".as_slice(), true)] {
            let before = self.at;
            if self.peek().is_some_and(|b| marks.contains(&b)) {
                self.at += 1;
                if signed && matches!(self.peek(), Some(b'+' | b'-')) {
                    self.at += 1;
                }
                if !self.peek().is_some_and(|b| b.is_ascii_digit()) {
                    self.at = before;
                    return self.wrong("a number breaks off");
                }
                self.digits();
                whole = false;
            }
        }
        let text = &self.text[start..self.at];
        let integer =
            || text.parse::<u64>().map(Value::from).or_else(|_| text.parse::<i64>().map(Value::from)).ok();
        // The grammar of Rust's numbers includes that of JSON's.
        let float = || text.parse().map_or(Value::Null, from_f64);
        Ok(whole.then(integer).flatten().unwrap_or_else(float))
    }

    fn digits(&mut self) {
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let open = self.at;
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text.as_bytes()[self.at..];
            let plain = rest.iter().position(|&b| b == b'"' || b == b'\\' || b < b' ');
            let Some(plain) = plain else {
                self.at = open;
                return self.wrong("a string is not closed");
            };
            out.push_str(&self.text[self.at..self.at + plain]);
            self.at += plain;
            match rest[plain] {
                b'"' => {
                    self.at += 1;
                    return Ok(out);
                }
                b'\\' => out.push(self.escape()?),
                _ => return self.wrong("a control character stands in a string, where only its escape may"),
            }
        }
    }

    fn escape(&mut self) -> Parsed<char> {
        let c = match self.text.as_bytes().get(self.at + 1) {
            Some(c @ (b'"' | b'\\' | b'/')) => char::from(*c),
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode(),
            _ => return self.wrong("a backslash that begins no escape"),
        };
        self.at += 2;
        Ok(c)
    }

    /// `\uXXXX`, or two of them for a character beyond the first 65,536. A half that stands alone is U+FFFD.
    fn unicode(&mut self) -> Parsed<char> {
        let Some(unit) = self.unit() else { return self.wrong("`\\u` without four hexadecimal digits") };
        self.at += 6;
        if !(0xd800..0xdc00).contains(&unit) {
            return Ok(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
        match self.unit() {
            Some(low @ 0xdc00..0xe000) => {
                self.at += 6;
                let code = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER))
            }
            _ => Ok(char::REPLACEMENT_CHARACTER),
        }
    }

    /// The number of the `\uXXXX` that comes next.
    fn unit(&self) -> Option<u32> {
        let digits = self.text.as_bytes().get(self.at..self.at + 6)?.strip_prefix(b"\\u")?;
        digits.iter().try_fold(0, |n, &b| Some(n * 16 + char::from(b).to_digit(16)?))
    }
}

/// The error as one of the value of `key`.
fn within(mut wrong: Box<Wrong>, key: String) -> Box<Wrong> {
    wrong.path.push(key);
    wrong
}

/// The last character boundary at or before byte `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_python_reads_is_read() {
        let huge = format!("[{}]", "9".repeat(400));
        for (text, value) in [
            (
                r#" {"a" : [1, -2, 0.5, 1E5, -0, true, null], "b": {}} "#,
                json!({"a": [1, -2, 0.5, 1e5, 0, true, null], "b": {}}),
            ),
            ("[18446744073709551615, -9223372036854775808]", json!([u64::MAX, i64::MIN])),
            ("[18446744073709551616, 1e-400]", json!([1.8446744073709552e19, 0.0])),
            (r#"{"a": 1, "b": 2, "a": 3}"#, json!({"a": 3, "b": 2})),
            (r#""\u00e9\ud83d\ude00\/\"\\\b\f\n\r\t""#, json!("é😀/\"\\\u{8}\u{c}\n\r\t")),
            (
                r#"["\ud800", "\ude00\ud83d", "\ud800\u0041", "\ud83d\ud83d\ude00"]"#,
                json!(["\u{fffd}", "\u{fffd}\u{fffd}", "\u{fffd}A", "\u{fffd}😀"]),
            ),
            ("\u{feff}[\"\u{7f}\u{2028}\"]", json!(["\u{7f}\u{2028}"])),
            (&huge, json!([{ NON_FINITE: "Infinity" }])),
        ] {
            assert_eq!(from_str(text).unwrap(), value, "{text}");
        }
        let list = from_str("[NaN, Infinity, -Infinity, 1e400, -1e400]").unwrap();
        let numbers: Vec<f64> = list.as_array().unwrap().iter().map(|v| as_f64(v).unwrap()).collect();
        assert!(numbers[0].is_nan());
        assert_eq!(numbers[1..], [f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY, f64::NEG_INFINITY]);
        assert!(list.as_array().unwrap().iter().all(|v| v.as_str().is_none() && !v.is_null()));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "",
            "  ",
            "-NaN",
            "+1",
            "nan",
            "01",
            "1.",
            ".5",
            "1e",
            "-",
            "[1,]",
            "{1:2}",
            "{'a':1}",
            "{\"a\"}",
            "[1 2]",
            "1 2",
            "\"a\tb\"",
            r#""\x""#,
            r#""\u12""#,
            r#""\u+123""#,
            "tru",
            "\u{c}1",
            "\u{a0}1",
            "{\"a\":1,}",
            "[,1]",
            "\"",
            "\"\\",
            "[",
            "{",
            "// x\n1",
            "-Infinit",
            "\"\\u12\u{e9}\"",
        ] {
            assert!(from_str(text).is_err(), "{text}");
        }
    }

    #[test]
    fn errors_name_line_column_and_field() {
        let error = from_str("{\n \"é\": {\"b\": [0, x]}}").unwrap_err().to_string();
        assert_eq!(error, "not valid JSON: expected a value, found `x` (line 2, column 17, field `é.b.1`)");
        let error = from_str(r#"{"a\u001b[2J": "b"#).unwrap_err().to_string();
        assert!(
            error.ends_with("a string is not closed (line 1, column 16, field `a\\u{1b}[2J`)"),
            "{error}"
        );
        assert!(from_slice(b"\xff\xfe{\0}\0").unwrap_err().to_string().contains("UTF-16"));
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(from_str(&nested(MAX_DEPTH)).is_ok());
        assert!(from_str(&nested(MAX_DEPTH + 1)).unwrap_err().to_string().contains("nested"));
        assert!(from_str(&"{\"a\":[".repeat(1 << 20)).is_err());
        assert!(
            from_str(&format!("[{}0]", "0,".repeat(MAX_VALUES))).unwrap_err().to_string().contains("values")
        );
    }

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

    #[test]
    fn numbers_that_are_not_finite_come_back() {
        #[derive(serde::Serialize, serde::Deserialize)]
        struct Sample {
            #[serde(with = "number")]
            one: f64,
            #[serde(with = "numbers")]
            many: Vec<f64>,
            #[serde(default, with = "optional_number")]
            perhaps: Option<f64>,
        }
        let sample = Sample {
            perhaps: Some(f64::INFINITY),
            one: f64::NAN,
            many: vec![f64::NEG_INFINITY, 0.1, f64::INFINITY],
        };
        let text = serde_json::to_string(&sample).unwrap();
        assert_eq!(text, r#"{"one":"NaN","many":["-Infinity",0.1,"Infinity"],"perhaps":"Infinity"}"#);
        for text in [text.as_str(), r#"{"one": NaN, "many": [-Infinity, 0.1, 1e999], "perhaps": 1e999}"#] {
            let back: Sample = serde_json::from_value(from_str(text).unwrap()).unwrap();
            assert!(back.one.is_nan() && back.many == sample.many && back.perhaps == sample.perhaps);
        }
        let wrong =
            [r#"{"one": "x", "many": []}"#, r#"{"one": null, "many": []}"#, r#"{"one": {}, "many": []}"#];
        for text in wrong {
            assert!(serde_json::from_value::<Sample>(from_str(text).unwrap()).is_err(), "{text}");
        }
    }
}
