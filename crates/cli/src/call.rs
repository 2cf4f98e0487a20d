//! The call of this process: as it can be typed again, and with options taken out of it.

use std::ffi::OsString;

/// The call as it can be typed again.
pub(crate) fn command_line(args: impl IntoIterator<Item = OsString>) -> String {
    let name = std::iter::once("minicache".to_string());
    name.chain(args.into_iter().map(|arg| quoted(&arg.to_string_lossy()))).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// `args` without the `flags` and without the options `valued` and their values, however these are given.
pub(crate) fn without(
    args: impl Iterator<Item = OsString>,
    flags: &[&str],
    valued: &[&str],
) -> Vec<OsString> {
    let mut left = Vec::new();
    let mut is_value = false;
    for arg in args {
        let text = arg.to_string_lossy();
        let with_value = |option: &&str| text.strip_prefix(*option).is_some_and(|rest| rest.starts_with('='));
        if std::mem::take(&mut is_value) || flags.contains(&&*text) || valued.iter().any(with_value) {
            continue;
        }
        is_value = valued.contains(&&*text);
        if !is_value {
            left.push(arg);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = OsString> + use<> {
        text.split(' ').map(OsString::from).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn the_command_can_be_typed_again() {
        let args = ["run", "e.toml", "--set", "tasks=[\"a\"]", "it's"].map(OsString::from);
        assert_eq!(command_line(args), r#"minicache run e.toml --set 'tasks=["a"]' 'it'\''s'"#);
    }

    #[test]
    fn options_are_taken_out_with_their_values() {
        let left = without(
            words("run e.toml --shard 1/2 --limit 3 --shards=x --shares=f --fresh"),
            &["--fresh"],
            &["--shard", "--shares"],
        );
        assert_eq!(left, words("run e.toml --limit 3 --shards=x").collect::<Vec<_>>());
    }
}
