//! SmolLM2-135M-Instruct against transformers. Runs where the model file and the golden files are.

use std::path::{Path, PathBuf};

use minicache_models::{ChatTemplate, Gguf, Message, Tokenizer};
use serde_json::Value;

/// The default model's file and the golden files of it.
fn files() -> Option<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let model = root.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let golden = root.join("../shared/golden/smollm2");
    let golden = if golden.is_dir() {
        golden
    } else {
        PathBuf::from(std::env::var_os("MINICACHE_GOLDEN")?).join("smollm2")
    };
    (model.is_file() && golden.is_dir()).then_some((model, golden))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_and_chats_equal_transformers() {
    let Some((model, golden)) = files() else { return };
    let gguf = Gguf::open(&model).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    let golden = json(&golden.join("tokenizer.json"));
    for case in golden["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["ids"]), "{text:?}");
        let with_special = ids(&case["ids_with_special"]);
        assert_eq!(tokenizer.encode(text, true).unwrap(), with_special, "{text:?}");
        let decoded = case["decoded"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&with_special, false).unwrap(), decoded);
        let mut stream = tokenizer.stream(false);
        let mut streamed = String::new();
        for id in with_special {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{fffd}'), "{text:?}: {piece:?}");
            streamed += &piece;
        }
        assert_eq!(streamed + &stream.finish().unwrap(), decoded);
    }
    assert_eq!(
        tokenizer.decode(&tokenizer.encode("<|im_start|>user\nhi<|im_end|>", false).unwrap(), true).unwrap(),
        "user\nhi"
    );
    assert!(tokenizer.stop_ids().contains(&tokenizer.token_to_id("<|im_end|>").unwrap()));

    let chat = ChatTemplate::from_gguf(&gguf, Some(&tokenizer)).unwrap().unwrap();
    let talks = [
        vec![Message::new("user", "What is the capital of France?")],
        vec![
            Message::new("system", "Be brief."),
            Message::new("user", "Name three colours."),
            Message::new("assistant", "Red, green, blue."),
            Message::new("user", "One more."),
        ],
    ];
    for (talk, case) in talks.iter().zip(golden["chat"].as_array().unwrap()) {
        assert_eq!(chat.render(talk, true).unwrap(), case["rendered"].as_str().unwrap());
    }
}
