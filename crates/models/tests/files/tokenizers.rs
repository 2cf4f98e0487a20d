//! Vocabularies out of GGUF metadata and `tokenizer.json` against the libraries that made them.

use std::path::PathBuf;

use minicache_models::{ChatTemplate, Gguf, LoadOptions, Message, Model, Tokenizer};
use serde_json::Value;

use super::gguf::fixture;

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::open(&fixture("gguf").join(name)).unwrap()).unwrap().unwrap()
}

fn cases(name: &str) -> Vec<(String, Vec<u32>, String)> {
    let text = std::fs::read_to_string(fixture("gguf/vocabularies.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let read = |case: &Value| {
        let ids = case["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        (case["text"].as_str().unwrap().to_string(), ids, case["decoded"].as_str().unwrap().to_string())
    };
    all[name].as_array().unwrap().iter().map(read).collect()
}

/// Pieces that a stream gives for `ids`, joined.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream(false);
    let mut text = String::new();
    for &id in ids {
        let piece = stream.push(id).unwrap();
        assert!(!piece.ends_with('\u{fffd}'));
        text += &piece;
    }
    text + &stream.finish().unwrap()
}

#[test]
fn sentencepiece_ids() {
    let tokenizer = tokenizer("sentencepiece.gguf");
    let (bos, eos) = (tokenizer.bos().unwrap(), tokenizer.eos().unwrap());
    for (text, ids, decoded) in cases("sentencepiece") {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        let with_bos = tokenizer.encode(&text, true).unwrap();
        assert_eq!((with_bos[0], &with_bos[1..]), (bos, &ids[..]));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), decoded, "{text:?}");
        assert_eq!(tokenizer.decode(&with_bos, true).unwrap(), decoded, "{text:?}");
        assert_eq!(streamed(&tokenizer, &ids), decoded, "{text:?}");
    }
    let ids = tokenizer.encode("<s>a<mark>b</s>", false).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (bos, eos));
    assert!(ids.contains(&tokenizer.token_to_id("<mark>").unwrap()));
    assert_eq!(tokenizer.stop_ids(), [eos]);
}

#[test]
fn a_space_is_put_first_only_where_the_file_says_so() {
    let (with, without) = (tokenizer("sentencepiece.gguf"), tokenizer("sentencepiece-no-prefix.gguf"));
    for text in ["The cache", "a", "  b", "é"] {
        let spaced = without.encode(&format!(" {text}"), false).unwrap();
        assert_eq!(with.encode(text, false).unwrap(), spaced);
        assert_eq!(without.decode(&spaced, false).unwrap(), format!(" {text}"));
        assert_eq!(with.decode(&spaced, false).unwrap(), text);
    }
}

#[test]
fn byte_level_ids() {
    for name in ["llama-bpe", "qwen2"] {
        let tokenizer = tokenizer(&format!("{name}.gguf"));
        for (text, ids, decoded) in cases(name) {
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{name} {text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), decoded);
            assert_eq!(streamed(&tokenizer, &ids), decoded);
            // LLaMA-3 begins texts with a token even where the file does not say so; Qwen2 does not.
            let begun = tokenizer.encode(&text, true).unwrap();
            let bos = tokenizer.bos().filter(|_| name == "llama-bpe");
            assert_eq!(begun, bos.into_iter().chain(ids).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_tokenizer_json_gives_the_same_ids() {
    let config =
        serde_json::json!({"eos_token": {"content": "<|end_of_text|>"}, "bos_token": "<|begin_of_text|>"});
    let from_json = Tokenizer::from_file(&fixture("gguf/tokenizer.json"), &config).unwrap();
    let from_gguf = tokenizer("llama-bpe.gguf");
    assert_eq!(from_json.vocab_size(), from_gguf.vocab_size());
    assert_eq!((from_json.bos(), from_json.eos()), (from_gguf.bos(), from_gguf.eos()));
    assert_eq!(from_json.stop_ids(), from_gguf.stop_ids());
    for (text, ids, _) in cases("llama-bpe") {
        assert_eq!(from_json.encode(&text, true).unwrap(), ids);
    }
}

#[test]
fn a_stream_holds_back_what_is_not_whole() {
    let tokenizer = tokenizer("sentencepiece.gguf");
    let ids = tokenizer.encode("a🙂", false).unwrap();
    let mut stream = tokenizer.stream(false);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.concat(), "a🙂");
    assert!(pieces.iter().any(String::is_empty), "{pieces:?}");
    // Cut in the middle of the emoji.
    let mut stream = tokenizer.stream(false);
    let text: String = ids[..ids.len() - 1].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, "a");
    assert!(stream.finish().unwrap().contains('\u{fffd}'));
}

#[test]
fn chat_templates_of_files_write_their_tokens() {
    let gguf = Gguf::open(&fixture("gguf/sentencepiece.gguf")).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let chat = ChatTemplate::from_gguf(&gguf, tokenizer.as_ref()).unwrap().unwrap();
    assert_eq!(chat.render(&[Message::new("user", "hi")], true).unwrap(), "<s>hi</s>");
}

/// A model directory made of a fixture and further files.
fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("llama2").join(name), dir.path().join(name)).unwrap();
    }
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let path = dir.path().to_path_buf();
    (dir, path)
}

#[test]
fn directories_with_all_that_belongs_to_a_model() {
    let json = std::fs::read_to_string(fixture("gguf/tokenizer.json")).unwrap();
    // The fixture has more tokens than the tiny model has embedding rows: that is warned of, and an error where one of
    // them is used.
    let (_kept, path) = directory(&[("tokenizer.json", &json)]);
    let loaded = Model::from_path(&path, "m", &LoadOptions::default()).map(|m| m.config.vocab);
    assert_eq!(loaded.map_err(|e| e.to_string()), Ok(200));

    let (_kept, path) = directory(&[
        ("generation_config.json", r#"{"eos_token_id": [5, 3]}"#),
        (
            "tokenizer_config.json",
            r#"{"bos_token": "<b>", "chat_template": [{"name": "default", "template": "old"}]}"#,
        ),
        ("chat_template.jinja", "{{ bos_token }}{% if add_generation_prompt %}>{% endif %}"),
    ]);
    let model = Model::load(&path.display().to_string(), &LoadOptions::default()).unwrap();
    assert_eq!(model.stop_ids(), [2, 3, 5]);
    assert_eq!(model.chat.unwrap().render(&[], true).unwrap(), "<b>>");
    assert_eq!(model.name, path.file_name().unwrap().to_string_lossy());

    let (_kept, path) = directory(&[("tokenizer.json", "{\"version\": \"1.0\"}")]);
    let message = Model::from_path(&path, "m", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.contains("not a tokenizer that can be read"), "{message}");

    let (_kept, path) = directory(&[("config.json", "{\"model_type\": \"llama\"}")]);
    let message = Model::from_path(&path, "m", &LoadOptions::default()).unwrap_err().to_string();
    assert!(message.contains("config.json: ") && message.contains("is missing"), "{message}");
}

#[test]
fn vocabularies_that_differ_are_warned_of() {
    let tokenizer = tokenizer("sentencepiece.gguf");
    let size = tokenizer.vocab_size();
    assert_eq!((tokenizer.vocabulary_warning(size), tokenizer.vocabulary_warning(size + 12)), (None, None));
    for other in [size - 1, size + 200, 32_000] {
        assert!(tokenizer.vocabulary_warning(other).unwrap().contains(&other.to_string()));
    }
}
