//! What Python's values do in templates: methods of strings, lists and dicts, and the operator `%`.
//!
//! Work that grows with the data is paid for in fuel, and results are paid for before they are made.

mod args;
mod formatting;
mod strings;

use std::borrow::Cow;
use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use args::Args;

pub(super) use formatting::modulo_function;
pub(super) use strings::center;

type Result<T> = std::result::Result<T, Error>;

/// Methods that change a value, which transformers' sandbox refuses.
const CHANGING: [&str; 16] = [
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
    "clear",
    "sort",
    "reverse",
    "update",
    "setdefault",
    "popitem",
    "add",
    "discard",
    "difference_update",
    "symmetric_difference_update",
    "intersection_update",
];

fn wrong(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Pays for `bytes` that are read or made.
fn pay(state: &State, bytes: usize) -> Result<()> {
    state.consume_fuel(bytes as u64 / 64)
}

/// Called for methods that minijinja's own values do not have.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().ok_or_else(unknown)?;
            pay(state, text.len())?;
            strings::string(state, text, name, Args::new(args)?)
        }
        ValueKind::Seq | ValueKind::Map if CHANGING.contains(&name) && !is_item(value, name) => {
            Err(wrong(format!("a template must not change values, as .{name}() does")))
        }
        ValueKind::Seq => {
            pay(state, value.len().unwrap_or(0))?;
            list(value, name, Args::new(args)?)
        }
        ValueKind::Map if name == "copy" && !is_item(value, name) => Ok(value.clone()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Whether a dict has an item of that name, which may be called.
fn is_item(value: &Value, name: &str) -> bool {
    value.kind() == ValueKind::Map && value.get_attr(name).is_ok_and(|v| !v.is_undefined())
}

fn list(value: &Value, name: &str, args: Args) -> Result<Value> {
    let same = |item: &Value| args.given.first() == Some(item);
    match name {
        "count" => Ok(value.try_iter()?.filter(same).count().into()),
        "index" => match value.try_iter()?.position(|item| same(&item)) {
            Some(at) => Ok(at.into()),
            None => Err(wrong("the value is not in the list")),
        },
        "copy" => Ok(value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// Writes until there is no more room.
pub(super) struct Capped<F> {
    pub(super) out: F,
    pub(super) left: usize,
    pub(super) written: usize,
}

impl<F: FnMut(&str) -> std::fmt::Result> Write for Capped<F> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.left = self.left.checked_sub(text.len()).ok_or(std::fmt::Error)?;
        self.written += text.len();
        (self.out)(text)
    }
}

/// `repr` of a float: the shortest digits, with an exponent outside of 1e-4 to 1e16.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_string();
    }
    // Rust's debug form has the same thresholds but writes 1e16 for Python's 1e+16.
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => match exponent.strip_prefix('-') {
            Some(digits) => format!("{mantissa}e-{digits:0>2}"),
            None => format!("{mantissa}e+{exponent:0>2}"),
        },
        None => text,
    }
}

/// `str(value)`; of a container, with `repr` of what it holds.
pub(super) fn write_str(out: &mut impl Write, value: &Value) -> std::fmt::Result {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.write_str(&float(number)),
            Err(_) => write!(out, "{value}"),
        },
        _ => write!(out, "{value}"),
    }
}
