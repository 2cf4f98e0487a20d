//! SmolLM2-135M-Instruct against transformers. Runs where the model file and the golden files are.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use minicache_config::WeightMode;
use minicache_core::{CacheSpec, Sequence};
use minicache_models::{
    ChatTemplate, Gguf, LoadOptions, LogitsFor, Message, Model, Registry, Step, Tokenizer,
};
use serde_json::Value;

/// The default model's file and the golden files of it.
fn files() -> Option<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let model = root.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let golden = root.join("../shared/golden/smollm2");
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

fn load() -> Option<(Model, PathBuf)> {
    let (path, golden) = files()?;
    let options = LoadOptions { weights: WeightMode::F32, ..LoadOptions::default() };
    Some((Model::from_path(&path, "smollm2-135m", &options).unwrap(), golden))
}

fn full(model: &Model) -> Sequence {
    model.sequence(&CacheSpec::parse(r#"{ method = "full", dtype = "f32" }"#).unwrap(), 0).unwrap()
}

fn forward(model: &Model, sequence: &mut Sequence, tokens: &[u32], logits: LogitsFor) -> Tensor {
    let logits = model.decoder.forward(&mut [Step { tokens, sequence, logits }]).unwrap();
    let vocab = logits.vocab();
    let data = logits.into_data();
    let shape = (data.len() / vocab, vocab);
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

#[test]
fn logits_states_and_texts_equal_transformers() {
    let Some((model, golden)) = load() else { return };
    let tensors = candle_core::safetensors::load(golden.join("forward.safetensors"), &Device::Cpu).unwrap();
    let ints = |name: &str| tensors[name].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let tokens = ints("tokens");
    let mut cache = full(&model);
    let logits = forward(&model, &mut cache, &tokens, LogitsFor::All);
    assert_eq!(logits.argmax(1).unwrap().to_vec1::<u32>().unwrap(), ints("argmax"));
    let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let last = logits.narrow(0, tokens.len() - 8, 8).unwrap();
    let worst = largest((last - &tensors["logits_last8"]).unwrap());
    assert!(worst <= 2e-3, "logits differ by {worst}");
    for layer in [0, 14, 15, 16, 29] {
        let restored = cache.restored(layer).unwrap();
        for (side, got) in [("key", restored.keys), ("value", restored.values)] {
            let want = tensors[&format!("layer.{layer}.{side}")].transpose(0, 1).unwrap();
            let got = Tensor::from_vec(got, want.dims(), &Device::Cpu).unwrap();
            let worst = largest((got - want).unwrap());
            assert!(worst <= 2e-3, "{side}s of layer {layer} differ by {worst}");
        }
    }

    let tokenizer = model.need_tokenizer().unwrap();
    for case in json(&golden.join("greedy.json")).as_array().unwrap() {
        let mut cache = full(&model);
        let mut next = tokenizer.encode(case["prompt"].as_str().unwrap(), false).unwrap();
        let (mut generated, mut text, mut stream) = (Vec::new(), String::new(), tokenizer.stream(false));
        while generated.len() < 48 {
            let logits = forward(&model, &mut cache, &next, LogitsFor::Last);
            let id = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
            generated.push(id);
            text += &stream.push(id).unwrap();
            if model.stop_ids().contains(&id) {
                break;
            }
            next = vec![id];
        }
        assert_eq!(generated, ids(&case["ids"]));
        assert_eq!(text + &stream.finish().unwrap(), case["text"].as_str().unwrap());
    }
}

#[test]
fn the_default_model_has_a_name() {
    if files().is_none() {
        return;
    }
    let model = Model::load("smollm2", &LoadOptions::default()).unwrap();
    assert_eq!(model.name, "smollm2-135m");
    let registered = Registry::built_in().unwrap().get("smollm2-135m").unwrap().shape();
    assert_eq!(*model.decoder.shape(), registered);
}
