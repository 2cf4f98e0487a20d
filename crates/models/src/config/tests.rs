//! Configurations as people write them.
#![allow(clippy::unwrap_used)]

use serde_json::{Map, Value};

use super::*;

fn base() -> Map<String, Value> {
    let text = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": [2, 7], "bos_token_id": 1}"#;
    serde_json::from_str(text).unwrap()
}

fn read(map: &Map<String, Value>) -> Result<ModelConfig> {
    ModelConfig::from_json(&Value::Object(map.clone()).to_string())
}

fn with(key: &str, value: Value) -> Map<String, Value> {
    let mut map = base();
    map.insert(key.into(), value);
    map
}

#[test]
fn a_llama_config() {
    let c = read(&base()).unwrap();
    assert_eq!((c.head_dim, c.kv_heads, c.bos, &c.eos[..]), (16, 2, Some(1), &[2, 7][..]));
    assert_eq!(c.shape().scale, 0.25);
    assert_eq!(c.rope.theta, 1e4);
    let per_layer = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64;
    assert_eq!(c.parameters(), 2 * 100 * 64 + 64 + 2 * per_layer);
}

#[test]
fn every_needed_key_is_named_when_it_is_missing() {
    for key in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ] {
        let mut map = base();
        map.remove(key);
        let message = read(&map).unwrap_err().to_string();
        assert_eq!(message, format!("model configuration: key {key:?} is missing"));
    }
}

#[test]
fn bad_values_are_named() {
    use serde_json::json;
    let cases = [
        ("hidden_size", json!("64"), "key \"hidden_size\" must be a whole number, got \"64\""),
        ("num_key_value_heads", json!(3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("model_type", json!("gpt2"), "model_type \"gpt2\" is not supported; supported are llama, mistral"),
        ("hidden_act", json!("gelu"), "hidden_act \"gelu\" is not supported"),
        ("quantization_config", json!({"quant_method": "gptq"}), "use the unquantised weights or a GGUF"),
        ("rope_scaling", json!({"type": "linear"}), "key \"rope_scaling.factor\" is missing"),
        ("rope_scaling", json!({"type": "mrope"}), "rope_type \"mrope\" is not supported"),
        (
            "rope_scaling",
            json!({"type": "su", "short_factor": [1.0], "long_factor": [1.0]}),
            "8 factors are needed, short_factor has 1",
        ),
        ("eos_token_id", json!("</s>"), "must be a token id or a list"),
        ("head_dim", json!(7), "rotary dimension 7 must be even"),
    ];
    for (key, value, wanted) in cases {
        let message = read(&with(key, value)).unwrap_err().to_string();
        assert!(message.contains(wanted), "{key}: {message}");
    }
    assert!(ModelConfig::from_json("{").unwrap_err().to_string().contains("not valid JSON"));
}

#[test]
fn both_rope_forms_read_alike() {
    use serde_json::json;
    let mut old = with("rope_scaling", json!({"type": "linear", "factor": 4.0}));
    old.insert("rope_theta".into(), json!(5e5));
    let new = with("rope_parameters", json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}));
    let (old, new) = (read(&old).unwrap(), read(&new).unwrap());
    assert_eq!(old, new);
    assert_eq!(old.context, 512);
}

#[test]
fn windows_follow_the_family() {
    use serde_json::json;
    let mut map = with("sliding_window", json!(32));
    assert_eq!(read(&map).unwrap().window, None);
    map.insert("model_type".into(), json!("mistral"));
    assert_eq!(read(&map).unwrap().window, Some(32));
    map.insert("model_type".into(), json!("qwen3"));
    assert_eq!(read(&map).unwrap().window, None);
    map.insert("model_type".into(), json!("qwen2"));
    assert_eq!(read(&map).unwrap().window, None);
    map.insert("use_sliding_window".into(), json!(true));
    map.insert("max_window_layers".into(), json!(1));
    let message = read(&map).unwrap_err().to_string();
    assert!(message.contains("1 of 2 layers have a sliding window"), "{message}");
    map.insert("max_window_layers".into(), json!(0));
    assert_eq!(read(&map).unwrap().window, Some(32));
}

#[test]
fn qwen3_as_published() {
    use serde_json::json;
    let mut map = with("model_type", json!("qwen3"));
    let c = read(&map).unwrap();
    // As transformers has it; published files give it.
    assert_eq!((c.head_dim, c.q_dim(), c.kv_dim()), (128, 512, 256));
    assert!(c.qk_norm && !c.qkv_bias && !c.out_bias && !c.tied);
    let norms = c.layer_tensors(1).into_iter().filter(|(name, _)| name.ends_with("_norm.weight"));
    let norm = |side| (format!("model.layers.1.self_attn.{side}_norm.weight"), vec![128]);
    assert_eq!(norms.collect::<Vec<_>>(), [norm("q"), norm("k")]);
    map.insert("attention_bias".into(), json!(true));
    map.insert("head_dim".into(), json!(24));
    let c = read(&map).unwrap();
    assert_eq!((c.head_dim, c.qkv_bias, c.out_bias, c.mlp_bias), (24, true, true, false));
    map.insert("sliding_window".into(), json!(32));
    assert_eq!(read(&map).unwrap().window, None);
    // What other models say of such norms is not what is computed here.
    map.insert("use_qk_norm".into(), json!(true));
    let message = read(&map).unwrap_err().to_string();
    assert!(message.contains("key \"use_qk_norm\" is true; models that compute with it"), "{message}");
    let mut c = read(&base()).unwrap();
    c.qk_norm = true;
    let message = c.validate().unwrap_err().to_string();
    assert!(message.ends_with("models of the family llama have no norms of queries and keys"), "{message}");
}
