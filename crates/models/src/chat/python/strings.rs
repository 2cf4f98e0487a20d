//! Methods of Python's strings.

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::args::Args;
use super::formatting::format_method;
use super::{Result, pay, wrong};

/// Python's white space, which `strip` takes away.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

pub(super) fn string(state: &State, text: &str, name: &str, args: Args) -> Result<Value> {
    let all = |test: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    // Whether there are letters of a case, and none of the other.
    let cased = |wanted: fn(char) -> bool, other: fn(char) -> bool| {
        Value::from(text.chars().any(wanted) && !text.chars().any(other))
    };
    let most = match name {
        "format" => return format_method(state, text, &args),
        "count" | "find" | "index" | "rfind" | "rindex" | "startswith" | "endswith" | "replace" => 3,
        "split" | "rsplit" | "center" | "ljust" | "rjust" => 2,
        "strip" | "lstrip" | "rstrip" | "join" | "removeprefix" | "removesuffix" | "zfill" | "splitlines"
        | "partition" | "rpartition" | "expandtabs" => 1,
        _ => 0,
    };
    let result = match name {
        "upper" => Value::from(text.to_uppercase()),
        "lower" | "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => {
            let swap = |c: char| -> Vec<char> {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            text.chars().flat_map(swap).collect::<String>().into()
        }
        "capitalize" => {
            let mut rest = text.chars();
            let first = rest.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
            Value::from(first + &rest.as_str().to_lowercase())
        }
        "title" => title(text).into(),
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isdigit" | "isdecimal" | "isnumeric" => all(char::is_numeric),
        "isascii" => text.is_ascii().into(),
        "islower" => cased(char::is_lowercase, char::is_uppercase),
        "isupper" => cased(char::is_uppercase, char::is_lowercase),
        "istitle" => (title(text) == text && text.chars().any(char::is_alphabetic)).into(),
        "isidentifier" => {
            let start = |c: char| c == '_' || c.is_alphabetic();
            (text.starts_with(start) && text.chars().all(|c| start(c) || c.is_numeric())).into()
        }
        "strip" | "lstrip" | "rstrip" => {
            let chars = args.text(0, "chars")?;
            let inside = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
            pay(state, text.len() * chars.as_ref().map_or(0, String::len) / 8)?;
            let text = if name == "rstrip" { text } else { text.trim_start_matches(inside) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(inside) })
        }
        "removeprefix" => text.strip_prefix(&*args.need_text(0, "prefix")?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(&*args.need_text(0, "suffix")?).unwrap_or(text).into(),
        "startswith" | "endswith" => {
            let text = &text[range(text, args.integer(1, "start")?, args.integer(2, "end")?).unwrap_or(0..0)];
            let what = args.get(0, "prefix")?.unwrap_or_default();
            let holds = |part: &Value| {
                let part = part
                    .as_str()
                    .ok_or_else(|| wrong(format!("{name}() takes a string or a tuple of strings")))?;
                Ok(if name == "startswith" { text.starts_with(part) } else { text.ends_with(part) })
            };
            let parts: Vec<Value> = match what.kind() {
                ValueKind::Seq | ValueKind::Iterable => what.try_iter()?.collect(),
                _ => vec![what],
            };
            let holds: Result<Vec<bool>> = parts.iter().map(holds).collect();
            holds?.contains(&true).into()
        }
        "count" => {
            let what = args.need_text(0, "sub")?;
            let range = range(text, args.integer(1, "start")?, args.integer(2, "end")?);
            range.map_or(0, |range| text[range].matches(&*what).count()).into()
        }
        "find" | "index" | "rfind" | "rindex" => {
            let what = args.need_text(0, "sub")?;
            let found = range(text, args.integer(1, "start")?, args.integer(2, "end")?).and_then(|range| {
                let part = &text[range.clone()];
                let at = if name.starts_with('r') { part.rfind(&*what) } else { part.find(&*what) };
                Some(text[..range.start + at?].chars().count() as i64)
            });
            match found {
                Some(at) => at.into(),
                None if name.ends_with("find") => (-1).into(),
                None => return Err(wrong("substring not found")),
            }
        }
        "replace" => {
            let (from, to) = (args.need_text(0, "old")?, args.need_text(1, "new")?);
            let count = args.integer(2, "count")?.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
            if to.len() > from.len() {
                pay(state, text.matches(&*from).take(count).count().saturating_mul(to.len() - from.len()))?;
            }
            text.replacen(&*from, &to, count).into()
        }
        "split" | "rsplit" => {
            let most = args.integer(1, "maxsplit")?.and_then(|n| usize::try_from(n).ok());
            let parts = split(text, args.text(0, "sep")?, most, name == "rsplit")?;
            pay(state, parts.len() * 32)?;
            parts.into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let keep = args.get(0, "keepends")?.is_some_and(|keep| keep.is_true());
            lines(text, keep).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let sep = args.need_text(0, "sep")?;
            if sep.is_empty() {
                return Err(wrong("empty separator"));
            }
            let last = name == "rpartition";
            let parts = if last { text.rsplit_once(&*sep) } else { text.split_once(&*sep) };
            let three = match parts {
                Some((before, after)) => [before, &*sep, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Value::from(Tuple::from(three.map(Value::from)))
        }
        "join" => {
            let mut out = String::new();
            for (index, part) in args.get(0, "iterable")?.unwrap_or_default().try_iter()?.enumerate() {
                let Some(part) = part.as_str() else {
                    return Err(wrong(format!(
                        "join() takes strings; item {index} is of type {}",
                        part.kind()
                    )));
                };
                pay(state, 64 + part.len() + text.len())?;
                if index > 0 {
                    out.push_str(text);
                }
                out.push_str(part);
            }
            out.into()
        }
        "center" | "ljust" | "rjust" => {
            let fill = args.text(1, "fillchar")?.unwrap_or_else(|| " ".to_string());
            let side = match name {
                "center" => Side::Both,
                "ljust" => Side::Right,
                _ => Side::Left,
            };
            pad(state, text, args.need_integer(0, "width")?, &fill, side)?.into()
        }
        "zfill" => {
            let sign = usize::from(text.starts_with(['+', '-']));
            let width = args.need_integer(0, "width")? - sign as i64;
            Value::from(text[..sign].to_string() + &pad(state, &text[sign..], width, "0", Side::Left)?)
        }
        "expandtabs" => {
            let size = args.integer(0, "tabsize")?.map_or(8, |n| usize::try_from(n).unwrap_or(0));
            pay(state, text.matches('\t').count().saturating_mul(size))?;
            expand_tabs(text, size).into()
        }
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    };
    args.at_most(name, most)?;
    Ok(result)
}

/// Bytes of the characters from `start` to before `end`, both as Python counts them; `None` where it begins behind the
/// end.
fn range(text: &str, start: Option<i64>, end: Option<i64>) -> Option<std::ops::Range<usize>> {
    if start.is_none() && end.is_none() {
        return Some(0..text.len());
    }
    let length = text.chars().count();
    let place = |at: i64| {
        let at = if at < 0 { at.saturating_add_unsigned(length as u64).max(0) } else { at };
        usize::try_from(at).unwrap_or(usize::MAX)
    };
    let (start, end) = (start.map_or(0, place), end.map_or(length, place).min(length));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (start <= end).then(|| byte(start)..byte(end))
}

/// `str.split` and `str.rsplit`.
fn split(text: &str, sep: Option<String>, most: Option<usize>, from_right: bool) -> Result<Vec<String>> {
    let limit = most.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match &sep {
        Some(sep) if sep.is_empty() => return Err(wrong("empty separator")),
        Some(sep) if from_right => text.rsplitn(limit.saturating_add(1), &**sep).collect(),
        Some(sep) => text.splitn(limit.saturating_add(1), &**sep).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest =
                if from_right { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
            while !rest.is_empty() {
                let cut = if parts.len() == limit {
                    None
                } else if from_right {
                    rest.char_indices()
                        .rev()
                        .find(|&(_, c)| is_space(c))
                        .map(|(at, c)| (at, at + c.len_utf8()))
                } else {
                    rest.char_indices().find(|&(_, c)| is_space(c)).map(|(at, c)| (at, at + c.len_utf8()))
                };
                let Some((end, start)) = cut else {
                    parts.push(rest);
                    break;
                };
                let (part, left) =
                    if from_right { (&rest[start..], &rest[..end]) } else { (&rest[..end], &rest[start..]) };
                parts.push(part);
                rest = if from_right {
                    left.trim_end_matches(is_space)
                } else {
                    left.trim_start_matches(is_space)
                };
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(str::to_string).collect())
}

/// `str.splitlines`.
fn lines(text: &str, keep: bool) -> Vec<String> {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (end, next) = match rest.find(ends) {
            None => (rest.len(), rest.len()),
            Some(at) if rest[at..].starts_with("\r\n") => (at, at + 2),
            Some(at) => (at, at + rest[at..].chars().next().map_or(0, char::len_utf8)),
        };
        lines.push(rest[..if keep { next } else { end }].to_string());
        rest = &rest[next..];
    }
    lines
}

/// `str.title`: a letter behind anything that is no letter is a capital.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    out
}

fn expand_tabs(text: &str, size: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' => {
                let wide = if size == 0 { 0 } else { size - column % size };
                out.extend(std::iter::repeat_n(' ', wide));
                column += wide;
            }
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            _ => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// Where padding goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
    Both,
}

/// `text` with `fill` at its sides until it has `width` characters. An odd one goes where `str.center` has it.
fn pad(state: &State, text: &str, width: i64, fill: &str, side: Side) -> Result<String> {
    let mut chars = fill.chars();
    let (Some(fill), None) = (chars.next(), chars.next()) else {
        return Err(wrong("the fill character must be exactly one character long"));
    };
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    pay(state, missing.saturating_mul(fill.len_utf8()))?;
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let some = |n: usize| std::iter::repeat_n(fill, n);
    Ok(some(left).chain(text.chars()).chain(some(missing - left)).collect())
}

/// The filter `center`.
pub(in crate::chat) fn center(state: &State, value: Value, width: Option<i64>) -> Result<String> {
    pad(state, &value.to_string(), width.unwrap_or(80), " ", Side::Both)
}
