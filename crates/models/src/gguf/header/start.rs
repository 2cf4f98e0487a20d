//! The first bytes of a file: whether it is a GGUF file, and what it is instead.

use minicache_config::{lfs_pointer, not_text};

use super::Result;

const BIG_ENDIAN: &str =
    "is a big-endian GGUF file, which is not read; convert the model again for little-endian machines";

/// Magic and version, and what a file is instead.
pub(super) fn check_start(file: &[u8]) -> Result<()> {
    if file.is_empty() {
        return Err("is empty; download it again".to_string());
    }
    if let Some(what) = lfs_pointer(file) {
        return Err(what.to_string());
    }
    let Some(head) = file.first_chunk::<8>() else {
        return Err(too_short(file.len()));
    };
    let (magic, version) = head.split_at(4);
    let version = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
    match magic {
        b"GGUF" => {}
        b"FUGG" => return Err(BIG_ENDIAN.to_string()),
        b"lmgg" | b"tjgg" | b"fmgg" | b"algg" => {
            return Err("is of a GGML format from before GGUF; convert the model again".to_string());
        }
        _ => {
            let what = not_text(&file[..file.len().min(16)]).map(|what| format!(" ({what})"));
            let what = what.unwrap_or_default();
            return Err(format!(
                "not a GGUF file: it does not start with GGUF{what}; give a .gguf file or a directory"
            ));
        }
    }
    match version {
        2 | 3 => {}
        // 3 with its bytes the other way round; no version is that high.
        version if version.swap_bytes() <= 0xffff && version > 0xffff => return Err(BIG_ENDIAN.to_string()),
        version => {
            return Err(format!(
                "is of GGUF version {version}; versions 2 and 3 are read: convert the model again"
            ));
        }
    }
    if file.len() < 24 { Err(too_short(file.len())) } else { Ok(()) }
}

fn too_short(length: usize) -> String {
    format!("too short to be a GGUF file ({length} bytes); download it again")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {

    use crate::gguf::header::read;

    #[test]
    fn what_a_file_is_instead_is_said() {
        for (bytes, wanted) in [
            (&b""[..], "is empty"),
            (b"GGUF", "too short"),
            (b"GGUF\x03\0\0\0\0", "too short"),
            (b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "big-endian"),
            (b"GGUF\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "GGUF version 1"),
            (b"tjgg\x03\0\0\0", "before GGUF"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
            (b"\xff\xfeG\0G\0U\0F\0", "UTF-16"),
            (b"<html>this is not the file you asked for</html>", "not a GGUF file"),
        ] {
            assert!(read(bytes).unwrap_err().contains(wanted), "{wanted}: {}", read(bytes).unwrap_err());
        }
    }
}
