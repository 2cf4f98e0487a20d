//! Chinese word segmentation, word for word as `jieba.cut` of jieba 0.42.1 (Python).
//!
//! Dictionary and hidden Markov model are those of the crate `jieba-rs`. That crate keeps `C-69450` and
//! `www.example.com` whole and takes rarer ideographs for Han characters, which the Python original does not, so the
//! text is cut into blocks here as the original does, and joined ASCII words are taken apart again.

use std::sync::LazyLock;

use jieba_rs::Jieba;

/// The words of `text` in order; together they are `text`.
pub fn words_zh(text: &str) -> Vec<&str> {
    static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if in_block(first) {
            let (block, tail) = rest.split_at(rest.find(|c| !in_block(c)).unwrap_or(rest.len()));
            for token in JIEBA.cut(block, true) {
                ascii_words(token.word, &mut words);
            }
            rest = tail;
        } else {
            // White space and everything else stands alone, but for a line end of two characters.
            let end = if rest.starts_with("\r\n") { 2 } else { first.len_utf8() };
            words.push(&rest[..end]);
            rest = &rest[end..];
        }
    }
    words
}

/// `re_han_default` of the original.
fn in_block(c: char) -> bool {
    matches!(c, '\u{4E00}'..='\u{9FD5}' | '+' | '#' | '&' | '.' | '_' | '%' | '-')
        || c.is_ascii_alphanumeric()
}

/// A joined ASCII word, taken apart as `re_skip` of the original's `finalseg` does: runs of letters and digits, each
/// with a decimal fraction and a percent sign behind it, and what stands between them.
fn ascii_words<'a>(word: &'a str, words: &mut Vec<&'a str>) {
    let bytes = word.as_bytes();
    let joined =
        word.is_ascii() && bytes[0].is_ascii_alphanumeric() && bytes.iter().any(|b| b"._-".contains(b));
    if !joined {
        words.push(word);
        return;
    }
    let run =
        |from: usize, fits: fn(&u8) -> bool| from + bytes[from..].iter().take_while(|b| fits(b)).count();
    let mut start = 0;
    while start < bytes.len() {
        let mut end = run(start, u8::is_ascii_alphanumeric);
        if end == start {
            end = run(start, |b| !b.is_ascii_alphanumeric());
        } else {
            if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
                end = run(end + 1, u8::is_ascii_digit);
            }
            end += usize::from(bytes.get(end) == Some(&b'%'));
        }
        words.push(&word[start..end]);
        start = end;
    }
}
