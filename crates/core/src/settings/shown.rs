//! Text from files as it is shown to people: what would steer a terminal is escaped, what is long is cut.

/// Characters of a name or value that [`shown`] keeps.
const LONGEST: usize = 80;

/// A name or value from a file for a message: control characters, line ends and marks that turn or hide text are
/// escaped, and of a long text only the beginning is kept.
///
/// ```
/// assert_eq!(minicache_core::settings::shown("blk.0\u{1b}[2J\n"), "blk.0\\u{1b}[2J\\n");
/// assert!(minicache_core::settings::shown(&"x".repeat(1000)).ends_with("x…"));
/// ```
pub fn shown(text: &str) -> String {
    within(text, LONGEST)
}

/// [`escaped`], of a long text only the beginning: `longest` characters.
pub fn within(text: &str, longest: usize) -> String {
    // No character takes fewer characters when escaped, so that the rest need not be looked at.
    let cut = text.char_indices().nth(longest).map_or(text.len(), |(at, _)| at);
    let mut out = String::new();
    let mut length = 0;
    for c in text[..cut].chars() {
        let width = if steers(c) { c.escape_default().count() } else { 1 };
        if length + width > longest {
            return out + "…";
        }
        length += width;
        push(&mut out, c);
    }
    if cut < text.len() { out + "…" } else { out }
}

/// Whole text with everything escaped that steers a terminal.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push(&mut out, c));
    out
}

fn push(out: &mut String, c: char) {
    if steers(c) { out.extend(c.escape_default()) } else { out.push(c) }
}

/// Whether a terminal acts on the character, or hides it, rather than showing it.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped() {
        assert_eq!(shown("a\u{202e}b\u{9b}2Jc\u{7f}\r"), "a\\u{202e}b\\u{9b}2Jc\\u{7f}\\r");
        assert_eq!(shown("größe ▁the 模型"), "größe ▁the 模型");
        assert_eq!(escaped("\u{1b}]0;x\u{7}"), "\\u{1b}]0;x\\u{7}");
    }

    #[test]
    fn what_is_long_is_cut() {
        let exact = "é".repeat(LONGEST);
        assert_eq!(shown(&exact), exact);
        assert_eq!(shown(&(exact.clone() + "x")), exact + "…");
        assert!(shown(&"\u{1b}".repeat(1 << 20)).chars().count() <= LONGEST + 1);
    }
}
