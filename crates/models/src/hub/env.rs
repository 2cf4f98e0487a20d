//! The environment, read as `huggingface_hub` reads it (its `constants.py`). An empty variable counts as absent.

use std::path::PathBuf;
use std::time::Duration;

use super::Hub;

/// Seconds that the hub has for its answer, or for the next part of it, where the environment says nothing.
const PATIENCE: u64 = 10;

/// The hub's settings from `variable` (name to value) and the user's home folder.
pub(super) fn hub(variable: impl Fn(&str) -> Option<String>, user: Option<PathBuf>) -> Hub {
    let variable = |name: &str| variable(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
    let path = |name: &str| variable(name).map(|v| PathBuf::from(expand(&v, user.as_ref(), variable)));
    let is_on = |v: String| ["1", "ON", "YES", "TRUE"].contains(&v.to_ascii_uppercase().as_str());

    let home = path("HF_HOME").unwrap_or_else(|| {
        let base = path("XDG_CACHE_HOME").or_else(|| Some(user.as_ref()?.join(".cache")));
        base.unwrap_or_default().join("huggingface")
    });
    let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
    let saved_token = || {
        let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let text = std::fs::read_to_string(file).ok()?;
        Some(text.trim().to_string()).filter(|t| !t.is_empty())
    };
    let token = || variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(saved_token);
    let anonymous = variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_on);
    Hub {
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
        cache: cache.unwrap_or_else(|| home.join("hub")),
        token: if anonymous { None } else { token() },
        offline: variable("HF_HUB_OFFLINE").or_else(|| variable("TRANSFORMERS_OFFLINE")).is_some_and(is_on),
        progress: true,
    }
}

/// How long to wait for the head of an answer and for each further part of its body: `HF_HUB_ETAG_TIMEOUT` and
/// `HF_HUB_DOWNLOAD_TIMEOUT`, in seconds.
pub(super) fn patience() -> (Duration, Duration) {
    let seconds = |name: &str| {
        let set = std::env::var(name).ok().and_then(|v| v.trim().parse::<u64>().ok()).filter(|s| *s > 0);
        Duration::from_secs(set.unwrap_or(PATIENCE))
    };
    (seconds("HF_HUB_ETAG_TIMEOUT"), seconds("HF_HUB_DOWNLOAD_TIMEOUT"))
}

/// `text` with the home folder for a `~` in front and values for `$NAME` and `${NAME}`. What is not set stays as it
/// is, as in Python's `expanduser` and `expandvars`.
fn expand(text: &str, user: Option<&PathBuf>, variable: impl Fn(&str) -> Option<String>) -> String {
    let mut rest = text;
    let mut out = String::new();
    if let (Some(tail), Some(home)) = (text.strip_prefix('~'), user)
        && (tail.is_empty() || tail.starts_with('/'))
    {
        out.push_str(home.to_string_lossy().trim_end_matches('/'));
        rest = tail;
    }
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, next) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            Some(braced) => braced,
            None => {
                let end = after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                after.split_at(end.unwrap_or(after.len()))
            }
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[before.len()..rest.len() - next.len()]),
        }
        rest = next;
    }
    out + rest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn with(set: &[(&str, &str)]) -> Hub {
        let value = |name: &str| set.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_string());
        hub(value, Some(PathBuf::from("/home/me")))
    }

    #[test]
    fn the_environment_says_where_and_how() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_saved\n").unwrap();
        let home = dir.path().display().to_string();
        let plain = with(&[]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert!(!plain.offline && plain.token.is_none());
        let set = with(&[("HF_HOME", &home), ("HF_HUB_OFFLINE", "True"), ("HF_ENDPOINT", "http://mirror")]);
        assert_eq!((set.cache, set.endpoint), (dir.path().join("hub"), "http://mirror".to_string()));
        assert_eq!((set.offline, set.token.as_deref()), (true, Some("hf_saved")));
        let set = with(&[
            ("HF_HOME", &home),
            ("HF_TOKEN", " hf_own\n"),
            ("HF_HUB_CACHE", "/c"),
            ("HF_HUB_OFFLINE", "0"),
        ]);
        assert_eq!(
            (set.cache, set.offline, set.token.as_deref()),
            (PathBuf::from("/c"), false, Some("hf_own"))
        );
        assert_eq!(with(&[("HUGGING_FACE_HUB_TOKEN", "hf_old")]).token.as_deref(), Some("hf_old"));
        let token = dir.path().join("token").display().to_string();
        assert_eq!(with(&[("HF_TOKEN_PATH", &token)]).token.as_deref(), Some("hf_saved"));
        let anonymous =
            with(&[("HF_HOME", &home), ("HF_TOKEN", "hf_own"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]);
        assert_eq!(anonymous.token, None);
    }

    #[test]
    fn paths_are_expanded() {
        let cache = |set: &[(&str, &str)]| with(set).cache.display().to_string();
        assert_eq!(cache(&[("HF_HOME", "~/hf")]), "/home/me/hf/hub");
        assert_eq!(cache(&[("HF_HOME", "~")]), "/home/me/hub");
        assert_eq!(cache(&[("HF_HUB_CACHE", "$SCRATCH/hf"), ("SCRATCH", "/big")]), "/big/hf");
        assert_eq!(cache(&[("HF_HUB_CACHE", "/a/${SCRATCH}x/$B"), ("SCRATCH", "s"), ("B", "b")]), "/a/sx/b");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "~/.c")]), "/home/me/.c/huggingface/hub");
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "~/old")]), "/home/me/old");
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), "/new");
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "")]), "/old");
        // As Python leaves them.
        assert_eq!(cache(&[("HF_HUB_CACHE", "/a/$NONE/${NONE}/$/~/x$")]), "/a/$NONE/${NONE}/$/~/x$");
        assert_eq!(cache(&[("HF_HUB_CACHE", "/a/${B"), ("B", "b")]), "/a/${B");
    }

    #[test]
    fn offline_has_two_names_and_many_values() {
        for on in ["1", "ON", "yes", "True"] {
            assert!(with(&[("HF_HUB_OFFLINE", on)]).offline && with(&[("TRANSFORMERS_OFFLINE", on)]).offline);
        }
        for off in ["0", "no", "", "2"] {
            assert!(
                !with(&[("HF_HUB_OFFLINE", off)]).offline && !with(&[("TRANSFORMERS_OFFLINE", off)]).offline
            );
        }
        assert!(
            !with(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]).offline,
            "the newer name decides"
        );
    }
}
