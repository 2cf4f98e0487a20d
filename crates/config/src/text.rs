//! Reading a text file that a user wrote, or believes to have written.

use std::path::Path;

use crate::{ConfigError, Result};

/// Beginning of a Git LFS pointer file.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The text of a file, without a byte order mark.
///
/// # Errors
/// Files that cannot be read, and what is no UTF-8 text: UTF-16, a Git LFS pointer in place of a file, a folder, binary
/// data. The error names the file and what it is.
pub fn read_text(path: &Path) -> Result<String> {
    let fail = |message: String| {
        let file = Some(path.to_path_buf());
        Err(ConfigError { file, line: None, key: String::new(), message })
    };
    if path.is_dir() {
        return fail("is a folder; give a file".to_string());
    }
    match std::fs::read(path) {
        Ok(bytes) => text_of(bytes).or_else(fail),
        Err(e) => fail(format!("cannot read the file: {e}")),
    }
}

/// The text of a file's bytes, or what is wrong with them.
fn text_of(bytes: Vec<u8>) -> std::result::Result<String, String> {
    // Of ASCII text in UTF-16 every other byte is zero.
    let zeros = |from: usize| {
        let half = || bytes.iter().skip(from).step_by(2).take(64);
        bytes.len() >= 4 && half().all(|b| *b == 0)
    };
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || zeros(0) || zeros(1) {
        return Err("is UTF-16 text; save it as UTF-8".to_string());
    }
    if bytes.starts_with(LFS) {
        return Err("is a Git LFS pointer, not the file itself; run `git lfs pull`".to_string());
    }
    if bytes.contains(&0) {
        return Err("is binary data, not text".to_string());
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text)),
        Err(e) => {
            let line =
                1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
            Err(format!("is not UTF-8 text (line {line}); save it as UTF-8"))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_said() {
        let error = |bytes: &[u8]| text_of(bytes.to_vec()).unwrap_err();
        let utf16 = |text: &str, le: bool| -> Vec<u8> {
            text.encode_utf16().flat_map(|u| if le { u.to_le_bytes() } else { u.to_be_bytes() }).collect()
        };
        for le in [true, false] {
            assert!(error(&utf16("\u{feff}id = \"a\"\n", le)).contains("UTF-16"));
            assert!(error(&utf16("id = \"a\"\n", le)).contains("UTF-16"));
        }
        assert!(error(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n").contains("LFS"));
        assert!(error(b"PK\x03\x04 binary \x00\xff").contains("binary"));
        assert!(error(b"a = 1\nb = \"\xe9\"\n").contains("line 2"));
        assert_eq!(text_of(b"\xef\xbb\xbfid = 1\r\n".to_vec()).unwrap(), "id = 1\r\n");
        assert_eq!(text_of(Vec::new()).unwrap(), "");
        let folder = read_text(&std::env::temp_dir()).unwrap_err().to_string();
        assert!(folder.contains("is a folder"), "{folder}");
        assert!(read_text(Path::new("no/such.toml")).unwrap_err().to_string().starts_with("no/such.toml: "));
    }
}
