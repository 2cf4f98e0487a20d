//! `str.format` and the operator `%`, which divides numbers too.

use std::fmt::Write;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::args::Args;
use super::{Capped, Result, pay, wrong};

/// `str.format`.
pub(super) fn format_method(state: &State, text: &str, args: &Args) -> Result<Value> {
    let mut all = args.given.clone();
    if args.named.args().next().is_some() {
        all.push(args.named.clone().into());
    }
    let named = args.named.args().map(|key| args.named.peek::<Value>(key)).collect::<Result<Vec<_>>>()?;
    pay_for_format(state, text, args.given.iter().chain(&named), '{')?;
    format(FormatStyle::StrFormat, text, &all).map(Value::from)
}

/// The operator `%`: formats a string, or the rest of a division, with the divisor's sign.
fn modulo(state: &State, left: &Value, right: &Value) -> Result<Value> {
    if let Some(text) = left.as_str() {
        let args: Vec<Value> =
            if right.is_tuple() { right.try_iter()?.collect() } else { vec![right.clone()] };
        pay_for_format(state, text, args.iter(), '%')?;
        let fields = fields(text);
        if args.len() > fields && right.kind() != ValueKind::Map {
            return Err(wrong("not all arguments converted during string formatting"));
        }
        return format(FormatStyle::Printf, text, &args).map(Value::from);
    }
    let refused = || {
        wrong(format!("% takes numbers, or a string and values, not {} and {}", left.kind(), right.kind()))
    };
    let number = |v: &Value| v.is_number() || v.kind() == ValueKind::Bool;
    if !number(left) || !number(right) {
        return Err(refused());
    }
    let whole = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(i128::from(v.is_true())),
        _ if v.is_integer() => i128::try_from(v.clone()).ok(),
        _ => None,
    };
    if let (Some(a), Some(b)) = (whole(left), whole(right)) {
        let rest = a.checked_rem(b).ok_or_else(|| wrong("division by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let real =
        |v: &Value| whole(v).map(|x| x as f64).or_else(|| f64::try_from(v.clone()).ok()).ok_or_else(refused);
    let (a, b) = (real(left)?, real(right)?);
    if b == 0.0 {
        return Err(wrong("division by zero"));
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}

/// The function behind the operator `%`.
pub(in crate::chat) fn modulo_function(state: &State, left: Value, right: Value) -> Result<Value> {
    modulo(state, &left, &right)
}

/// The number of values that a printf format takes.
fn fields(text: &str) -> usize {
    text.replace("%%", "").matches('%').count()
}

/// Pays for what a format may make: every width and precision that it names, and every argument in every field.
fn pay_for_format<'v>(
    state: &State,
    text: &str,
    args: impl Iterator<Item = &'v Value>,
    field: char,
) -> Result<()> {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths =
        numbers.map(|digits| digits.parse::<usize>().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
    pay(state, widths)?;
    let mut longest = 0;
    for arg in args {
        longest = longest.max(length(state, arg)?);
    }
    pay(state, text.matches(field).count().saturating_mul(longest))
}

/// The length of a value's text.
fn length(state: &State, value: &Value) -> Result<usize> {
    let left = state.fuel_levels().map_or(u64::MAX, |(_, left)| left.saturating_mul(4));
    let mut counter =
        Capped { out: |_: &str| Ok(()), left: usize::try_from(left).unwrap_or(usize::MAX), written: 0 };
    match value.as_str() {
        Some(text) => Ok(text.len()),
        None if write!(counter, "{value}").is_err() => Err(Error::from(ErrorKind::OutOfFuel)),
        None => Ok(counter.written),
    }
}
