//! Model files that must be refused, by every command that reads them.

use std::fs;
use std::path::Path;

use crate::{Place, text};

const GGUF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/gguf/llama-tied.q8_0.gguf");

#[test]
fn damaged_models_are_refused_by_name() {
    let place = Place::new();
    let whole = fs::read(GGUF).unwrap();
    let after = |words: &[u8]| whole.windows(words.len()).position(|w| w == words).unwrap() + words.len();
    let changed = |at: usize, to: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    let layers = changed(after(b"llama.block_count") + 4, &u32::MAX.to_le_bytes());
    let embedding = after(b"token_embd.weight");
    for (bytes, wanted) in [
        (layers, "llama.block_count"),
        (changed(embedding, &0u32.to_le_bytes()), "0 dimensions"),
        (changed(embedding + 4, &0u64.to_le_bytes()), "is empty"),
        (changed(embedding + 4, &u64::MAX.to_le_bytes()), "token_embd.weight"),
        (whole[..whole.len() / 2].to_vec(), "truncated"),
        (Vec::new(), "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n".to_vec(), "Git LFS"),
    ] {
        fs::write(place.path("bad.gguf"), bytes).unwrap();
        refused(&place, "bad.gguf", &["bad.gguf", wanted]);
    }
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let at = config.find("\"num_hidden_layers\": ").unwrap() + 21;
    let (before, rest) = config.split_at(at);
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    for layers in ["2147483648", "4000", "1e9", "\"\\u001b[2J\""] {
        fs::write(place.path("model/config.json"), format!("{before}{layers}{rest}")).unwrap();
        refused(&place, "model", &["model"]);
    }
}

fn refused(place: &Place, model: &str, words: &[&str]) {
    place.fails(&["footprint", "--model", model, "--context", "16"], 2, words);
    place.fails(&["generate", "--model", model, "--prompt", "x"], 2, words);
}

/// The collection of hostile files, where it lies beside the repository.
#[test]
fn hostile_files_are_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases/hostile");
    let Ok(files) = fs::read_dir(folder) else { return };
    let place = Place::new();
    for path in files.map(|f| f.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".gguf") || path.join("config.json").is_file() {
            refused(&place, path.to_str().unwrap(), &[&name]);
        }
    }
}

#[test]
fn a_token_more_than_the_embedding_has_rows_is_warned_of() {
    let place = Place::new();
    let path = place.path("model/tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.push(serde_json::json!({
        "id": 200, "content": "<pad>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false
    }));
    fs::write(&path, tokenizer.to_string()).unwrap();
    let call =
        |prompt| ["generate", "--model", "model", "--raw", "--max-new-tokens", "1", "--prompt", prompt];
    let out = place.run(&call("a"));
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("warning: the tokenizer has 201 tokens but the model only 200"));
    let out = place.run(&call("a<pad>"));
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("token 200 is outside of the vocabulary of 200"), "{said}");
}
