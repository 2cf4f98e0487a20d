//! The grammar: from a text to its values, and where it breaks off.

use minicache_core::settings::shown;
use serde_json::{Map, Value};

use super::JsonError;
use super::non_finite::{from_f64, non_finite};

/// Lists and objects inside of each other, at most. Python gives up at about 1,000.
const MAX_DEPTH: usize = 512;
/// Values in one document, at most: a byte of text can become a hundred in memory.
const MAX_VALUES: usize = 2_000_000;

/// What is wrong and where, before lines are counted.
pub(super) struct Wrong {
    at: usize,
    reason: String,
    /// Keys and places, the innermost first.
    path: Vec<String>,
}

type Parsed<T> = Result<T, Box<Wrong>>;

#[derive(Debug)]
pub(super) struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// Values read so far.
    pub(super) values: usize,
}

impl<'a> Parser<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text: text.strip_prefix('\u{feff}').unwrap_or(text), at: 0, values: 0 }
    }

    pub(super) fn place(&self, wrong: Wrong) -> JsonError {
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

    pub(super) fn whole(&mut self) -> Parsed<Value> {
        let value = self.value(0)?;
        self.end()?;
        Ok(value)
    }

    pub(super) fn end(&mut self) -> Parsed<()> {
        self.space();
        if self.peek().is_some() { self.unexpected("the end of the text") } else { Ok(()) }
    }

    /// Goes to the first entry of the list; whether it is inside of an object.
    pub(super) fn find_list(&mut self, key: &str) -> Parsed<bool> {
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
    pub(super) fn rest_of_object(&mut self) -> Parsed<()> {
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
    pub(super) fn element(&mut self, first: bool, depth: usize) -> Parsed<Option<Value>> {
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
    use crate::python_json::non_finite::NON_FINITE;
    use crate::python_json::{as_f64, from_slice, from_str};
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
}
