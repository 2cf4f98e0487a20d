//! `json.dumps` as transformers offers it to templates.

use std::io::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde::Serialize;

/// How deep values may nest; Python has a limit too.
const MAX_DEPTH: usize = 200;
/// The widest indentation.
const MAX_INDENT: usize = 1000;

fn wrong(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, which escapes no HTML as minijinja's own filter
/// does.
pub(super) fn to_json(
    state: &State,
    value: &Value,
    given: Rest<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let option = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match given.get(at) {
            Some(value) => Some(value.clone()),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = option(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = option(1, "indent")?.map(indentation).transpose()?;
    let separators =
        option(2, "separators")?.map(|pair| -> Result<Vec<Value>, Error> { Ok(pair.try_iter()?.collect()) });
    let sort_keys = option(3, "sort_keys")?.is_some_and(|v| v.is_true());
    named.assert_all_used()?;
    let (item, key) = match separators.transpose()?.as_deref() {
        Some([item, key]) => (item.to_string(), key.to_string()),
        Some(_) => return Err(wrong("tojson: separators must be a pair")),
        // Python's defaults: no space behind a comma that ends a line.
        None if indent.is_some() => (",".to_string(), ": ".to_string()),
        None => (", ".to_string(), ": ".to_string()),
    };
    let format = PythonJson { item, key, indent, depth: 0, filled: Vec::new() };
    let text = if sort_keys {
        let plain = PythonJson { item: ",".to_string(), key: ":".to_string(), ..PythonJson::default() };
        let mut json: serde_json::Value = serde_json::from_str(&write(state, value, plain)?)
            .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
        json.sort_all_objects();
        write(state, &json, format)?
    } else {
        write(state, value, format)?
    };
    Ok(Value::from_safe_string(if ascii { escape_all(&text) } else { text }))
}

fn indentation(value: Value) -> Result<String, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value.to_string());
    }
    let width =
        i64::try_from(value).map_err(|_| wrong("tojson: indent must be a whole number or a string"))?;
    match usize::try_from(width).unwrap_or(0) {
        width if width > MAX_INDENT => Err(wrong(format!("tojson: an indent of {width} is too wide"))),
        width => Ok(" ".repeat(width)),
    }
}

/// Everything that is not plain ASCII as `\uXXXX`.
fn escape_all(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, ' '..='~' | '\n') {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    out
}

fn write(state: &State, value: &impl Serialize, format: PythonJson) -> Result<String, Error> {
    let mut out = Fueled { state, bytes: Vec::new() };
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, format))
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(String::from_utf8_lossy(&out.bytes).into_owned())
}

/// Pays in fuel for what is written.
struct Fueled<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
}

impl Write for Fueled<'_, '_, '_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        // Values are walked piece by piece, which costs more than the bytes.
        self.state.consume_fuel(data.len() as u64 / 16).map_err(std::io::Error::other)?;
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The spacing of Python's `json.dumps`.
#[derive(Default)]
struct PythonJson {
    item: String,
    key: String,
    indent: Option<String>,
    depth: usize,
    /// Whether the containers that are open hold anything yet.
    filled: Vec<bool>,
}

type Written = std::io::Result<()>;

impl PythonJson {
    fn line<W: ?Sized + Write>(&self, out: &mut W) -> Written {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(indent.as_bytes()))
    }

    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> Written {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(std::io::Error::other(format!("tojson: values nest more than {MAX_DEPTH} deep")));
        }
        self.filled.push(false);
        out.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Written {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        if let Some(filled) = self.filled.last_mut() {
            *filled = true;
        }
        self.line(out)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> Written {
        self.depth -= 1;
        if self.filled.pop() == Some(true) {
            self.line(out)?;
        }
        out.write_all(bracket)
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> Written {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> Written {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Written {
        self.next(out, first)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> Written {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> Written {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Written {
        self.next(out, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> Written {
        out.write_all(self.key.as_bytes())
    }
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> Written {
        out.write_all(super::python::float(value).as_bytes())
    }
}
