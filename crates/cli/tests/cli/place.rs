//! A folder in which the binary runs whole experiments, and what they leave there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use minicache_config::columns::{Role, role};
use tempfile::TempDir;

/// Folder of the tiny model in the fixtures of the models crate.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/llama3");
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer.json");

/// A folder with a model, an experiment and room for results.
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        let model = place.path("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(MODEL).join(name), model.join(name)).unwrap();
        }
        fs::copy(TOKENIZER, model.join("tokenizer.json")).unwrap();
        place.write("e.toml", EXPERIMENT);
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minicache"));
        command.args(args).current_dir(self.dir.path());
        command.env_remove("MINICACHE_DATA").env("HF_HUB_OFFLINE", "1").env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that has to succeed and gives its stdout.
    pub(crate) fn done(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    /// Runs a command that has to fail with `code`, with every one of `words` in its one or two lines on stderr.
    pub(crate) fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let out = self.run(args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!((1..=2).contains(&said.lines().count()), "{args:?}: {said}");
        assert!(said.starts_with("minicache: ") && !said.contains("panicked"), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `cells.csv` without the columns that hold times.
pub(crate) fn untimed(path: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(path).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers().unwrap().clone();
    let keep: Vec<usize> = (0..headers.len()).filter(|&i| role(&headers[i]) != Role::Timing).collect();
    let pick = |r: &csv::StringRecord| keep.iter().map(|&i| r[i].to_string()).collect();
    std::iter::once(pick(&headers)).chain(reader.records().map(|r| pick(&r.unwrap()))).collect()
}

pub(crate) fn walk(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries
        .flat_map(|p| if p.is_dir() { walk(&p) } else { vec![(p.clone(), fs::read(&p).unwrap())] })
        .collect()
}

pub(crate) const EXPERIMENT: &str = r#"id = "e"
title = "A small experiment"
kind = "fidelity"
models = ["model"]
tasks = ["coqa", "gsm8k"]
limit = 6

[fidelity]
prefill = 48
continuation = 24

[cache]
method = "minicache"
start_layer = 0

[[variants]]
cache = { method = "full" }

[[variants]]
cache = { method = "mean" }

[[variants]]
name = "slerp"
sweep = { "cache.start_layer" = [0, 2], "cache.retention.gamma" = [0.0, 0.1] }

[profiles.small]
limit = 1

[[plots]]
name = "kl"
x = "ratio"
y = "kl"
series = ["variant"]
kind = "scatter"
"#;
