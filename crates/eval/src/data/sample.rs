//! The sample data sets that ship inside the program: small, written for this project, in the original formats.

use super::dataset::{Dataset, Part};
use super::read::{Blob, Source};

/// Path below `sample/` and content of every file there, listed by `build.rs`.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/sample_files.rs"));

/// Texts that ship with the program to calibrate on, by name: they are in no task, so that nothing is measured on them.
pub(crate) fn calibration_texts() -> impl Iterator<Item = (&'static str, &'static str)> {
    FILES
        .iter()
        .filter(|(path, _)| path.starts_with("calibration/") && path.ends_with(".txt"))
        .filter_map(|(path, bytes)| Some((path.strip_suffix(".txt")?, std::str::from_utf8(bytes).ok()?)))
}

/// The sample's file for `part`, found under the same names as in a data folder.
pub(crate) fn find(dataset: &Dataset, part: &Part) -> Vec<Source> {
    let file = |pattern: &&str| {
        let wanted = pattern.replace("{}", dataset.name);
        FILES.iter().find(|(path, _)| *path == wanted)
    };
    let found = part.local.iter().find_map(file);
    let source = |(path, bytes): &(&str, &'static [u8])| Source {
        name: format!("bundled sample {path}"),
        blob: Blob::Embedded(bytes),
    };
    found.map(source).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_more_calibration_text_than_latents_ask_for() {
        let texts: Vec<_> = calibration_texts().collect();
        assert!(texts.len() >= 16);
        // English has more tokens than words, whatever the tokenizer.
        let words: usize = texts.iter().map(|(_, text)| text.split_whitespace().count()).sum();
        let asked = minicache_core::settings::Calibration::default().tokens;
        assert!(words > asked, "{words}");
        for (name, text) in texts {
            assert!(text.len() > 2000 && text.ends_with('\n') && !text.contains('\r'), "{name}");
        }
    }
}
