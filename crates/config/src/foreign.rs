//! Files that are something else than their name says, told by their first bytes.

use std::path::Path;

use crate::{ConfigError, Result};
use minicache_core::settings::shown;

/// First bytes of formats that people put where text is expected, and what to do about it.
const MAGIC: [(&[u8], &str); 14] = [
    (b"version https://git-lfs.github.com/spec/", LFS),
    (b"\xff\xfe\0\0", "is UTF-32 text; save it as UTF-8"),
    (b"\0\0\xfe\xff", "is UTF-32 text; save it as UTF-8"),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first (gunzip)"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it first (unzip)"),
    (b"PK\x05\x06", "is an empty ZIP archive"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first (unzstd)"),
    (b"BZh91AY&SY", "is compressed with bzip2; unpack it first (bunzip2)"),
    (b"\xfd7zXZ\0", "is compressed with xz; unpack it first (unxz)"),
    (b"PAR1\x15", "is a Parquet file and not text"),
    (b"GGUF\x03\0", "is a GGUF file and not text"),
    (b"\x80\x04\x95", "is a Python pickle, which is not read"),
];

const LFS: &str = "is a Git LFS pointer and not the file itself; fetch that with `git lfs pull`";
const UTF_16: &str = "is UTF-16 text; save it as UTF-8";

/// Says that a file which begins with `head` is a Git LFS pointer, where it is one: any format may find one in its
/// place.
pub fn lfs_pointer(head: &[u8]) -> Option<&'static str> {
    head.starts_with(MAGIC[0].0).then_some(LFS)
}

/// What a file that begins with `head` (16 bytes or more tell all) is instead of UTF-8 text, with what to do about it;
/// `None` where it may be text.
pub fn not_text(head: &[u8]) -> Option<&'static str> {
    let magic = MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, what)| *what);
    // Without a byte order mark every other byte of ASCII is zero.
    let half = |first: usize| head.len() >= 4 && head[..4].iter().skip(first).step_by(2).all(|&b| b == 0);
    let plain = |first: usize| head[..4].iter().skip(first).step_by(2).all(|&b| b != 0);
    magic.or_else(|| ((half(1) && plain(0)) || (half(0) && plain(1))).then_some(UTF_16))
}

/// A file's bytes as text, without a byte order mark.
///
/// # Errors
/// Says what the bytes are instead, or the line of the first one that is not UTF-8.
pub fn utf8(bytes: &[u8]) -> std::result::Result<&str, String> {
    if let Some(what) = not_text(bytes) {
        return Err(what.to_string());
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        let start = before.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let near = shown(&String::from_utf8_lossy(&before[start.max(before.len().saturating_sub(20))..]));
        format!("is not UTF-8 text (line {line}, after `{near}`)")
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// The text of a file that a user wrote, or believes to have written, without a byte order mark.
///
/// # Errors
/// Files that cannot be read, and what is no UTF-8 text. The error names the file and what it is.
pub fn read_text(path: &Path) -> Result<String> {
    let fail = |message: String| {
        let file = Some(path.to_path_buf());
        ConfigError { file, line: None, key: String::new(), message }
    };
    if path.is_dir() {
        return Err(fail("is a folder; give a file".to_string()));
    }
    let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot read the file: {e}")))?;
    let text = utf8(&bytes).map_err(fail)?;
    if text.contains('\0') {
        return Err(fail("is binary data, not text".to_string()));
    }
    Ok(text.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_with_what_it_is() {
        let folder = read_text(&std::env::temp_dir()).unwrap_err().to_string();
        assert!(folder.contains("is a folder"), "{folder}");
        assert!(read_text(Path::new("no/such.toml")).unwrap_err().to_string().starts_with("no/such.toml: "));
    }

    #[test]
    fn what_is_not_text_is_named() {
        let utf16: Vec<u8> = "{\"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let big: Vec<u8> = "{\"a\"}".encode_utf16().flat_map(u16::to_be_bytes).collect();
        let marked = [b"\xff\xfe".as_slice(), &utf16].concat();
        for bytes in [&utf16, &big, &marked] {
            assert!(utf8(bytes).unwrap_err().contains("UTF-16"));
        }
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n";
        assert!(lfs_pointer(pointer).is_some() && utf8(pointer).unwrap_err().contains("Git LFS"));
        assert!(utf8(b"\x1f\x8b\x08\0").unwrap_err().contains("gzip"));
        assert!(utf8(b"PK\x03\x04..").unwrap_err().contains("ZIP"));
        assert_eq!(utf8(b"a\nb \xe9").unwrap_err(), "is not UTF-8 text (line 2, after `b `)");
        for text in ["", "{", "{}", "\u{feff}{}", "ab\0\0", "größe"] {
            assert_eq!(utf8(text.as_bytes()), Ok(text.trim_start_matches('\u{feff}')), "{text:?}");
        }
    }
}
