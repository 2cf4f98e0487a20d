//! Golden values, and files to read them from.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// The development data beside the checkout, if there.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.exists().then_some(path)
}

pub(crate) fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(crate) fn fixture(key: &str) -> Vec<Value> {
    let fixtures: Value = serde_json::from_str(include_str!("../fixtures/metrics.json")).unwrap();
    fixtures[key].as_array().unwrap().clone()
}

pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap()
}

pub(crate) fn list(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

pub(crate) fn near(ours: f64, golden: &Value, what: impl std::fmt::Debug) {
    let golden = golden.as_f64().unwrap();
    assert!((ours - golden).abs() < 1e-9, "{what:?}: {ours} instead of {golden}");
}

pub(crate) fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}
