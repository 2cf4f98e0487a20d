//! What needs no weights: footprints, and the lists of models and methods.

use std::fs;
use std::path::Path;

use crate::room::{MODELS, Room};

#[test]
fn footprints_need_no_weights() {
    let room = Room::new();
    let said = room.json(&[
        "footprint",
        "--model",
        "llama-2-7b",
        "--context",
        "512",
        "--batch",
        "3",
        "--json",
        "--cache",
        "{ method = \"minicache\", quant = { bits = 4, group = 128 } }",
    ]);
    let keys: Vec<&str> = said.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["model", "context", "batch", "full_bytes", "bytes", "ratio", "parts"]);
    assert_eq!(said["full_bytes"].as_u64(), Some(3 * 512 * 32 * 2 * 4096 * 2));
    let parts: u64 = said["parts"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(said["bytes"].as_u64(), Some(parts));
    let ratio = said["full_bytes"].as_f64().unwrap() / parts as f64;
    assert!((said["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9 && ratio > 2.0 && ratio < 5.02, "{ratio}");

    let human = room.done(&[
        "footprint",
        "--model",
        "llama-2-7b",
        "--context",
        "64",
        "--cache",
        "{ method = \"minicache\", quant = { bits = 4, group = 128 } }",
    ]);
    assert!(human.contains("16 / 4.25 x 32/24 = 5.02x"), "{human}");

    // A folder of which only the configuration is there, and a file.
    let dir = room.path("bare");
    fs::create_dir(&dir).unwrap();
    fs::copy(Path::new(MODELS).join("mistral/config.json"), dir.join("config.json")).unwrap();
    let bare = room.json(&["footprint", "--model", "bare", "--context", "10", "--json"]);
    assert_eq!(bare["model"], "bare");
    let gguf = format!("{MODELS}/gguf/llama2.q8_0.gguf");
    assert_eq!(room.json(&["footprint", "--model", &gguf, "--context", "10", "--json"])["batch"], 1);

    let models = room.json(&["models", "--json"]);
    for entry in models["models"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let said =
            room.json(&["footprint", "--model", name, "--context", "40", "--cache", "kivi-2", "--json"]);
        let numbers = ["layers", "kv_heads", "head_dim"].map(|k| entry[k].as_u64().unwrap());
        assert_eq!(said["full_bytes"].as_u64(), Some(4 * 40 * numbers.iter().product::<u64>()), "{name}");
    }

    room.wrong(&["footprint", "--model", "llama-2-8b", "--context", "10"], &["did you mean", "llama-2-7b"]);
    room.wrong(&["footprint", "--model", "llama-2-7b", "--context", "0"], &["--context", "at least 1"]);
    let late = "{ method = \"mean\", start_layer = 32 }";
    let args = ["footprint", "--model", "llama-2-7b", "--context", "9", "--cache", late];
    room.wrong(&args, &["start_layer", "32 layers"]);
    room.wrong(&["footprint", "--model", "x", "--context", "9", "--similarity", "3"], &["--similarity"]);
}

#[test]
fn lists_say_what_there_is() {
    let room = Room::new();
    let human = room.done(&["models"]);
    for name in ["smollm2-135m", "llama-3-70b", "phi-3-mini-4k", "mixtral-8x7b"] {
        assert!(human.contains(name), "{human}");
    }
    let methods = room.json(&["methods", "--json"]);
    let methods = methods["methods"].as_array().unwrap();
    assert_eq!(methods.len(), minicache_core::METHODS.len());
    for m in methods {
        assert!(m["about"].as_str().unwrap().len() > 20 && !m["reads"].as_array().unwrap().is_empty(), "{m}");
    }
    let human = room.done(&["methods"]);
    assert!(human.contains("minicache") && human.contains("reads start_layer"), "{human}");
}
