//! A folder in which the binary runs single commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::text;

pub(crate) const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures");

/// An empty folder to work in.
pub(crate) struct Room(TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minicache"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command.env_remove("MINICACHE_DATA").env_remove("MINICACHE_MODELS").env("HF_HUB_OFFLINE", "1");
        command.env("RUST_BACKTRACE", "1");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// A call that has to succeed: its stdout.
    pub(crate) fn done(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.done(args)).unwrap()
    }

    /// A call that has to fail as wrong, saying every one of `words` in one or two lines.
    pub(crate) fn wrong(&self, args: &[&str], words: &[&str]) {
        let out = self.run(args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!((1..=2).contains(&said.lines().count()), "{args:?}: {said}");
        assert!(said.starts_with("minicache: ") && out.stdout.is_empty(), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
    }

    /// The tiny LLaMA-3 model with a tokenizer of words `w0`, `w1`, ... and, if asked, a chat template.
    pub(crate) fn model(&self, chat: bool) -> String {
        let dir = self.path("model");
        fs::create_dir_all(&dir).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(MODELS).join("llama3").join(name), dir.join(name)).unwrap();
        }
        let config: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        let size = config["vocab_size"].as_u64().unwrap();
        let vocab: serde_json::Map<String, Value> =
            (0..size).map(|i| (if i == 0 { "?".to_string() } else { format!("w{i}") }, i.into())).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "?" },
        });
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        if chat {
            let template = "{% for m in messages %}w1 {{ m.role == 'system' and 'w2' or 'w3' }} {{ m.content }} {% endfor %}w4";
            let config = serde_json::json!({ "chat_template": template });
            fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        }
        dir.display().to_string()
    }
}
