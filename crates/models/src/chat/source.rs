//! Jinja2's source in minijinja's terms.
//!
//! The two engines read the same language but for a few things, which are rewritten here token by token:
//! * string literals: Python's escapes, a backslash before a line end among them, which joins the lines;
//! * `a % b`, which formats where `a` is a string: [`MODULO`] is called, with Jinja's precedence;
//! * `{% set x = value %}`: the value goes through [`KEEP`] (of a namespace through [`KEEP_IN_NAMESPACE`]), which bounds
//!   what a template can build up;
//! * `{% generation %}` blocks, by which transformers marks what the assistant said: blocks that always hold;
//! * line ends: all are `\n`.
//!
//! What is not understood is left as it stands, for the engine to complain about.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Called for the operator `%`, with both of its operands.
pub(super) const MODULO: &str = "__modulo";
/// Called with what a variable is set to.
pub(super) const KEEP: &str = "__keep";
/// Called with what an attribute of a namespace is set to.
pub(super) const KEEP_IN_NAMESPACE: &str = "__keep_in_namespace";

/// The longest source that is read. The longest templates of models in use have some 30 KB.
const MAX_BYTES: usize = 1 << 20;
/// The most tokens within tags, which bounds how deep expressions and blocks nest. Templates in use have some 5,000.
const MAX_TOKENS: usize = 50_000;

/// Rewrites a template.
///
/// # Errors
/// A source that is too long, and string literals that Python refuses, in a line's words.
pub(super) fn translate(source: &str) -> Result<String, String> {
    if source.len() > MAX_BYTES {
        return Err(format!("has {} bytes; at most {MAX_BYTES} are read", source.len()));
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut translator =
        Translator { rest: &source, out: String::with_capacity(source.len() * 2), tokens: 0 };
    translator.template()?;
    Ok(translator.out)
}

struct Translator<'s> {
    rest: &'s str,
    out: String,
    /// Tokens within tags so far.
    tokens: usize,
}

/// What a token is to the operators around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Operand,
    /// A name that is not an operand: `and`, `in`, the name of a statement.
    Keyword,
    Open,
    Close,
    /// `.` and `|`, behind which an operand goes on.
    Joint,
    Multiply,
    Power,
    Modulo,
    Sign,
    /// Operators that bind less than those, and separators.
    Other,
}

/// A token and what is put around it.
struct Token<'s> {
    /// White space before it.
    space: &'s str,
    before: String,
    text: Cow<'s, str>,
    after: String,
    kind: Kind,
}

impl<'s> Translator<'s> {
    fn take(&mut self, length: usize) -> &'s str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        taken
    }

    fn copy(&mut self, length: usize) {
        let taken = self.take(length);
        self.out.push_str(taken);
    }

    fn template(&mut self) -> Result<(), String> {
        loop {
            let start = self
                .rest
                .match_indices('{')
                .find(|&(at, _)| matches!(self.rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')));
            let Some((at, _)) = start else {
                self.copy(self.rest.len());
                return Ok(());
            };
            self.copy(at);
            match self.rest.as_bytes()[1] {
                b'#' => self.copy(self.rest[2..].find("#}").map_or(self.rest.len(), |end| end + 4)),
                b'{' => self.tag("}}")?,
                _ => match raw_length(self.rest) {
                    Some(length) => self.copy(length),
                    None => self.tag("%}")?,
                },
            }
        }
    }

    /// A tag that ends with `end`, rewritten.
    fn tag(&mut self, end: &str) -> Result<(), String> {
        self.copy(2);
        if self.rest.starts_with(['-', '+']) {
            self.copy(1);
        }
        let mut tokens: Vec<Token> = Vec::new();
        let mut depth = 0usize;
        let tail = loop {
            let space = self.take(self.rest.len() - self.rest.trim_start().len());
            let signed = usize::from(self.rest.starts_with(['-', '+']));
            if self.rest.is_empty() || (depth == 0 && self.rest[signed..].starts_with(end)) {
                break (space, self.take(self.rest.len().min(signed + end.len())));
            }
            let (text, mut kind) = self.token()?;
            if kind == Kind::Keyword && tokens.last().is_some_and(|t| t.text == ".") {
                kind = Kind::Operand;
            }
            match kind {
                Kind::Open => depth += 1,
                Kind::Close => depth = depth.saturating_sub(1),
                _ => {}
            }
            self.tokens += 1;
            if self.tokens > MAX_TOKENS {
                return Err(format!("has more than {MAX_TOKENS} words and signs in its tags"));
            }
            tokens.push(Token { space, before: String::new(), text, after: String::new(), kind });
        };
        if end == "%}" {
            statement(&mut tokens);
        }
        rewrite_modulo(&mut tokens);
        if end == "%}" {
            keep_what_is_set(&mut tokens);
        }
        for token in &tokens {
            for part in [token.space, &token.before, &token.text, &token.after] {
                self.out.push_str(part);
            }
        }
        self.out.push_str(tail.0);
        self.out.push_str(tail.1);
        Ok(())
    }

    fn token(&mut self) -> Result<(Cow<'s, str>, Kind), String> {
        let rest = self.rest;
        let first = rest.chars().next().unwrap_or_default();
        let run = |from: usize| {
            let inside = |c: char| c.is_alphanumeric() || c == '_';
            rest[from..].find(|c| !inside(c)).map_or(rest.len(), |n| from + n)
        };
        let (length, kind) = match first {
            '\'' | '"' => return Ok((self.string(first)?.into(), Kind::Operand)),
            '0'..='9' => {
                let mut end = run(0);
                if rest[end..].starts_with('.') && rest[end + 1..].starts_with(|c: char| c.is_ascii_digit()) {
                    end = run(end + 1);
                }
                let exponent = rest[..end].ends_with(['e', 'E']) && !rest.starts_with("0x");
                if exponent && rest[end..].starts_with(['-', '+']) {
                    end = run(end + 1);
                }
                (end, Kind::Operand)
            }
            c if c.is_alphabetic() || c == '_' => {
                let end = run(0);
                let keyword = ["and", "or", "not", "in", "is", "if", "else"].contains(&&rest[..end]);
                (end, if keyword { Kind::Keyword } else { Kind::Operand })
            }
            '(' | '[' | '{' => (1, Kind::Open),
            ')' | ']' | '}' => (1, Kind::Close),
            '.' | '|' => (1, Kind::Joint),
            '*' if rest.starts_with("**") => (2, Kind::Power),
            '/' if rest.starts_with("//") => (2, Kind::Multiply),
            '*' | '/' => (1, Kind::Multiply),
            '%' => (1, Kind::Modulo),
            '+' | '-' => (1, Kind::Sign),
            '=' | '!' | '<' | '>' if rest[1..].starts_with('=') => (2, Kind::Other),
            c => (c.len_utf8(), Kind::Other),
        };
        Ok((self.take(length).into(), kind))
    }

    /// A string literal as minijinja reads it; the lines that it spanned follow it.
    fn string(&mut self, quote: char) -> Result<String, String> {
        let mut escaped = false;
        let end = self.rest[1..].find(|c: char| {
            let ends = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some(length) = end else {
            // Never closed: the engine says so.
            return Ok(self.take(self.rest.len()).to_string());
        };
        let literal = self.take(length + 2);
        let text = unescape(&literal[1..=length])?;
        let mut out = String::with_capacity(literal.len() + 2);
        out.push('"');
        for c in text.chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                '\n' => out.push_str("\\n"),
                _ => out.push(c),
            }
        }
        out.push('"');
        out.extend(literal.chars().filter(|&c| c == '\n'));
        Ok(out)
    }
}

/// The length of a raw block from `{% raw %}` to `{% endraw %}`, if one begins here.
fn raw_length(text: &str) -> Option<usize> {
    let is = |tag: &str, name: &str| -> Option<usize> {
        let inner = tag.strip_prefix("{%")?;
        let inner =
            inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start().strip_prefix(name)?.trim_start();
        let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).strip_prefix("%}")?;
        Some(tag.len() - inner.len())
    };
    let start = is(text, "raw")?;
    let ends = text[start..].match_indices("{%");
    let end = ends.filter_map(|(at, _)| Some(start + at + is(&text[start + at..], "endraw")?)).next();
    Some(end.unwrap_or(text.len()))
}

/// A block tag's first name is no operand, and a block of the assistant's words always holds.
fn statement(tokens: &mut [Token]) {
    if let Some(first) = tokens.first_mut() {
        first.kind = Kind::Keyword;
        match &*first.text {
            "generation" => first.text = "if true".into(),
            "endgeneration" => first.text = "endif".into(),
            _ => {}
        }
    }
}

/// Where the operators of one pair of brackets stand.
#[derive(Default)]
struct Level {
    /// The first token of the product that is being read.
    start: Option<usize>,
    /// The last token of the operand that is whole, if one is.
    operand: Option<usize>,
    /// Whether the operand is the right one of a `%`.
    pending: bool,
}

impl Level {
    fn begin(&mut self, at: usize) {
        self.start.get_or_insert(at);
    }

    /// Ends the right operand of a `%`.
    fn finish(&mut self, tokens: &mut [Token]) {
        if let (true, Some(last)) = (self.pending, self.operand) {
            tokens[last].after.push(')');
        }
        self.pending = false;
    }
}

/// `a * b % c` becomes `__modulo(a * b , c)`: `%` binds like `*` and `/`, from left to right; filters, calls, powers
/// and signs bind more.
fn rewrite_modulo(tokens: &mut [Token]) {
    let mut outer: Vec<Level> = Vec::new();
    let mut level = Level::default();
    for at in 0..tokens.len() {
        match tokens[at].kind {
            Kind::Operand => {
                level.begin(at);
                level.operand = Some(at);
            }
            Kind::Joint => level.operand = None,
            Kind::Open => {
                level.begin(at);
                outer.push(std::mem::take(&mut level));
            }
            Kind::Close => {
                level.finish(tokens);
                level = outer.pop().unwrap_or_default();
                level.operand = Some(at);
            }
            Kind::Power => level.operand = None,
            Kind::Multiply => {
                level.finish(tokens);
                level.operand = None;
            }
            Kind::Modulo => {
                level.finish(tokens);
                if let (Some(start), Some(_)) = (level.start, level.operand) {
                    let _ = write!(tokens[start].before, "{MODULO}(");
                    tokens[at].text = ",".into();
                    level.pending = true;
                }
                level.operand = None;
            }
            Kind::Sign if level.operand.is_none() => level.begin(at),
            Kind::Sign | Kind::Keyword | Kind::Other => {
                level.finish(tokens);
                level = Level::default();
            }
        }
    }
    level.finish(tokens);
}

/// `set x = value` becomes `set x = __keep((value))`.
fn keep_what_is_set(tokens: &mut [Token]) {
    if tokens.first().is_none_or(|first| first.text != "set") {
        return;
    }
    let Some(equals) = tokens.iter().position(|t| t.text == "=") else { return };
    let name = if tokens[..equals].iter().any(|t| t.text == ".") { KEEP_IN_NAMESPACE } else { KEEP };
    let value = &mut tokens[equals + 1..];
    if let Some(first) = value.first_mut() {
        first.before.insert_str(0, &format!("{name}(("));
    }
    if let Some(last) = value.last_mut() {
        last.after.push_str("))");
    }
}

/// Python's `unicode_escape`, which Jinja2 decodes string literals with.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    // The first half of a pair of surrogates.
    let mut high: Option<u32> = None;
    while let Some(c) = rest.next() {
        let escape = if c == '\\' { rest.next() } else { None };
        let number = |rest: &mut std::str::Chars, digits: usize, kind: char| {
            let hex: String = rest.by_ref().take(digits).collect();
            let whole = hex.len() == digits && hex.bytes().all(|b| b.is_ascii_hexdigit());
            let code = u32::from_str_radix(&hex, 16).ok().filter(|_| whole);
            code.ok_or_else(|| format!("a string has \\{kind} without {digits} hexadecimal digits behind it"))
        };
        let code = match escape {
            None => u32::from(c),
            Some('\n') => continue,
            Some(c @ ('\\' | '\'' | '"')) => u32::from(c),
            Some('a') => 7,
            Some('b') => 8,
            Some('t') => 9,
            Some('n') => 10,
            Some('v') => 11,
            Some('f') => 12,
            Some('r') => 13,
            Some('x') => number(&mut rest, 2, 'x')?,
            Some('u') => number(&mut rest, 4, 'u')?,
            Some('U') => number(&mut rest, 8, 'U')?,
            Some('N') => return Err("a string names a character by \\N, which is not supported".to_string()),
            Some(c @ '0'..='7') => {
                let mut code = u32::from(c) - u32::from('0');
                for _ in 0..2 {
                    let Some(digit) = rest.clone().next().and_then(|c| c.to_digit(8)) else { break };
                    rest.next();
                    code = code * 8 + digit;
                }
                code
            }
            Some(c) => {
                out.push('\\');
                u32::from(c)
            }
        };
        let code = match (high.take(), code) {
            (None, 0xd800..=0xdbff) => {
                high = Some(code);
                continue;
            }
            (Some(high), 0xdc00..=0xdfff) => 0x10000 + ((high - 0xd800) << 10) + (code - 0xdc00),
            (Some(_), _) => return Err(LONE_SURROGATE.to_string()),
            (None, _) => code,
        };
        match char::from_u32(code) {
            Some(c) => out.push(c),
            None if (0xdc00..=0xdfff).contains(&code) => return Err(LONE_SURROGATE.to_string()),
            None => return Err(format!("a string has the character U+{code:X}, which does not exist")),
        }
    }
    if high.is_some() { Err(LONE_SURROGATE.to_string()) } else { Ok(out) }
}

const LONE_SURROGATE: &str = "a string has half of a pair of surrogates, which is no text";
