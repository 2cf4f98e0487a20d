//! Which names may become parts of paths and addresses. Whoever gave them, the user, the registry or the network.

/// Longest name of an owner or a repository, as on the hub.
const REPO: usize = 96;
/// Longest other name: with a suffix it still fits every file system.
const LONGEST: usize = 200;

/// A plain word: letters, digits, `.`, `_` and `-`, not hidden, no option, no way up, not too long for a file's name.
pub(super) fn is_word(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && !text.contains("..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Plain words with slashes between them: a branch, a tag, a commit, or a file in a repository.
pub(super) fn is_path(text: &str) -> bool {
    text.len() <= 4 * LONGEST && text.split('/').all(is_word)
}

/// `owner/name`.
pub(super) fn is_repo(text: &str) -> bool {
    text.split('/').count() == 2 && text.split('/').all(|word| word.len() <= REPO && is_word(word))
}

/// The name of a blob by its `ETag` header, as `huggingface_hub` has it: without quotes and the mark of a weak tag.
/// `None` for what is no plain word.
pub(super) fn blob(etag: &str) -> Option<&str> {
    let etag = etag.trim();
    let name = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    is_word(name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_words_become_parts_of_paths() {
        for good in ["config.json", "model-00001-of-00002.safetensors", "0123abcd", "_x", "Q4_K_M.gguf"] {
            assert!(is_word(good) && is_path(good), "{good}");
        }
        let long = "x".repeat(LONGEST + 1);
        let bad = [
            "", ".", "..", "a/../b", "/a", "a/", "a//b", "./a", ".hidden", "-f", "a b", "a\\b", "C:", "a\0",
            "a\n", "~", "$HOME", "a%2Fb", "ä", "a..b", &long,
        ];
        for bad in bad {
            assert!(!is_word(bad) && !is_path(bad), "{bad:?}");
        }
        assert!(is_path("refs/convert/parquet") && !is_word("refs/convert/parquet"));
        assert!(is_repo("org/a-b.c") && !is_repo("org") && !is_repo("a/b/c") && !is_repo("../b"));
    }

    #[test]
    fn etags_lose_their_quotes() {
        assert_eq!(blob("\"abc-1\""), Some("abc-1"));
        assert_eq!(blob("W/\"abc\""), Some("abc"));
        assert_eq!(blob("abc"), Some("abc"));
        for bad in ["\"../../x\"", "\"\"", "W/\"/etc/x\"", "\"a/b\"", "\"..\""] {
            assert_eq!(blob(bad), None, "{bad}");
        }
    }
}
