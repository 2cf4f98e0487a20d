//! TOML of bounded depth. Its reader goes down on the stack, without a bound of its own where a table is not closed, and
//! so does whoever walks what it has read.

use serde::de::{DeserializeOwned, Error as _};
use toml_parser::Source;
use toml_parser::lexer::TokenKind;

/// Lists and tables inside of each other, and parts of a dotted key, at most.
const MAX_DEPTH: usize = 64;

/// Reads a TOML document.
///
/// # Errors
/// As the reader's, and a document that nests too deeply.
pub fn toml_from_str<T: DeserializeOwned>(text: &str) -> Result<T, toml::de::Error> {
    if is_deep(text) {
        return Err(toml::de::Error::custom(format!("nested more than {MAX_DEPTH} deep")));
    }
    toml::from_str(text)
}

/// Whether the text nests too deeply to be read.
pub fn is_deep(text: &str) -> bool {
    // Each kind for itself: a bracket of the wrong kind closes nothing.
    let (mut lists, mut tables, mut dots) = (0usize, 0usize, 0usize);
    for token in Source::new(text).lex() {
        match token.kind() {
            TokenKind::LeftSquareBracket => lists += 1,
            TokenKind::RightSquareBracket => lists = lists.saturating_sub(1),
            TokenKind::LeftCurlyBracket => tables += 1,
            TokenKind::RightCurlyBracket => tables = tables.saturating_sub(1),
            TokenKind::Dot => dots += 1,
            TokenKind::Newline | TokenKind::Equals | TokenKind::Comma => dots = 0,
            _ => {}
        }
        if lists + tables > MAX_DEPTH || dots > MAX_DEPTH {
            return true;
        }
    }
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_bounded_however_it_comes_about() {
        let open = |text: &str| format!("a = {}", text.repeat(100_000));
        for text in [
            open("{ a = "),
            open("{"),
            open("["),
            open("{ m = \"x\n"),
            open("{ ]"),
            open("[ }"),
            open("{ [ }"),
            open("{ \"}\" "),
            open("{ #}\n"),
            format!("{}a = 1", "a.".repeat(100_000)),
            format!("[{}a]\n", "a . ".repeat(100_000)),
            format!("[[{}a]]\n", "\"a\".".repeat(100_000)),
            format!("a = {}1{}", "[".repeat(100), "]".repeat(100)),
        ] {
            let error = toml_from_str::<toml::Table>(&text).unwrap_err().to_string();
            assert!(error.contains("nested more than 64 deep"), "{text:.20}: {error}");
        }
        let good = format!("a = {}1{}\n[[x.y]]\nb = [1.5, 2.5]\n", "[".repeat(40), "]".repeat(40));
        assert!(toml_from_str::<toml::Table>(&good).is_ok());
        let many = "[[x]]\na = { b = [[1.5, 2.5], []] }\n# [[[[{{{{\nc = '[[[['\n".repeat(1000);
        assert!(toml_from_str::<toml::Table>(&many).is_ok());
    }
}
