//! Model files as people report them: old keys, keys that nobody understands, biases, weights under other names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use minicache_config::WeightMode;
use minicache_core::CacheSpec;
use minicache_models::{Gguf, LoadOptions, LogitsFor, Model, RopeScaling, Step};

use crate::files::gguf::fixture;

fn load(path: &Path) -> Result<Model, String> {
    let options = LoadOptions { weights: WeightMode::F32, ..LoadOptions::default() };
    Model::from_path(path, "m", &options).map_err(|e| e.to_string())
}

fn logits(model: &Model, tokens: &[u32]) -> Tensor {
    let spec = CacheSpec::parse(r#"{ method = "full", dtype = "f32" }"#).unwrap();
    let mut sequence = model.sequence(&spec, tokens.len()).unwrap();
    let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::All };
    let logits = model.decoder.forward(&mut [step]).unwrap();
    let shape = (tokens.len(), logits.vocab());
    Tensor::from_vec(logits.into_data(), shape, &Device::Cpu).unwrap()
}

/// Largest difference, as a part of the largest number.
fn worst(want: &Tensor, got: &Tensor) -> f32 {
    let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest(&(got - want).unwrap()) / largest(want)
}

fn compare(name: &str) {
    let path = |ending: &str| fixture("cases").join(format!("{name}{ending}"));
    let text = std::fs::read_to_string(fixture("cases").join("tokens.txt")).unwrap();
    let tokens: Vec<u32> =
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let want = Tensor::read_npy(path(".expected.npy")).unwrap();
    let got = logits(&load(&path(".gguf")).unwrap(), &tokens);
    let want = want.reshape(got.shape()).unwrap();
    assert!(worst(&want, &got) <= 1e-6, "{name}: {}", worst(&want, &got));
}

#[test]
fn the_old_key_of_linear_scaling() {
    compare("rope_scale_linear");
}

#[test]
fn biases_of_all_projections() {
    compare("llama_qkvo_mlp_bias");
}

fn bytes_of(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// The file with a pair of metadata more, in front of the others.
fn with(whole: &[u8], key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let mut added = [bytes_of(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat();
    // Another pair keeps the tensors where they are aligned.
    let filler = [bytes_of(&format!("filler.of.{key}")), 8u32.to_le_bytes().to_vec()].concat();
    let length = added.len() + filler.len() + 8;
    added.extend(filler);
    added.extend(bytes_of(&"x".repeat(length.next_multiple_of(32) - length)));
    let mut out = whole.to_vec();
    let pairs = u64::from_le_bytes(whole[16..24].try_into().unwrap()) + 2;
    out[16..24].copy_from_slice(&pairs.to_le_bytes());
    out.splice(24..24, added);
    out
}

fn replaced(whole: &[u8], from: &str, to: &str) -> Vec<u8> {
    let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    let mut out = whole.to_vec();
    out[at..at + to.len()].copy_from_slice(to.as_bytes());
    out
}

/// A folder for changed files.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn gguf(&self, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join("x.gguf");
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn f32(x: f32) -> Vec<u8> {
    x.to_le_bytes().to_vec()
}

fn u32(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

#[test]
fn keys_that_change_the_arithmetic_are_refused_and_neutral_ones_are_not() {
    let place = Place::new();
    let whole = std::fs::read(fixture("gguf/llama-tied.q8_0.gguf")).unwrap();
    for (key, kind, value) in [
        ("attention.scale", 6, f32(0.1)),
        ("logit_scale", 6, f32(0.5)),
        ("residual_scale", 6, f32(0.5)),
        ("embedding_scale", 6, f32(12.0)),
        ("attn_logit_softcapping", 6, f32(50.0)),
        ("final_logit_softcapping", 6, f32(30.0)),
        ("expert_weights_scale", 6, f32(2.5)),
        ("expert_weights_norm", 7, vec![0]),
        ("expert_gating_func", 4, u32(2)),
        ("rope.scaling.yarn_log_multiplier", 6, f32(0.1)),
        ("rope.scaling.yarn_ext_factor", 6, f32(0.5)),
        ("rope.freq_base_swa", 6, f32(1e4)),
        ("attention.causal", 7, vec![0]),
        ("attention.sliding_window_pattern", 4, u32(2)),
        ("pooling_type", 4, u32(3)),
        ("use_parallel_residual", 7, vec![1]),
        ("attention.value_length", 4, u32(16)),
        ("rope.scaling.type", 8, bytes_of("dynamic")),
        ("rope.scaling.factor", 8, bytes_of("4")),
        ("rope.scale_linear", 6, f32(f32::NAN)),
        ("what.nobody.knows", 4, u32(1)),
    ] {
        let path = place.gguf(&with(&whole, &format!("llama.{key}"), kind, &value));
        let message = load(&path).unwrap_err();
        assert!(message.contains(&format!("llama.{key}")) && message.contains("x.gguf"), "{key}: {message}");
    }
    for (key, kind, value) in [
        ("llama.attention.scale", 6, f32(0.0)),
        ("llama.attention.scale", 6, f32(1.0 / 8f32.sqrt())),
        ("llama.attention.value_length", 4, u32(8)),
        ("llama.logit_scale", 6, f32(1.0)),
        ("llama.expert_count", 4, u32(0)),
        ("llama.expert_weights_norm", 7, vec![1]),
        ("llama.attention.causal", 7, vec![1]),
        ("llama.attention.sliding_window", 4, u32(512)),
        ("llama.rope.scaling.type", 8, bytes_of("none")),
        ("llama.rope.scaling.factor", 6, f32(1.0)),
        ("llama.rope.scaling.finetuned", 7, vec![1]),
        ("qwen2.attention.scale", 6, f32(0.1)),
        ("general.what.nobody.knows", 4, u32(1)),
    ] {
        let path = place.gguf(&with(&whole, key, kind, &value));
        let model = load(&path).unwrap_or_else(|e| panic!("{key}: {e}"));
        assert_eq!(model.config.rope.scaling, RopeScaling::None, "{key}");
    }
}

#[test]
fn rotary_scaling_is_llama_cpps() {
    let place = Place::new();
    let whole = std::fs::read(fixture("gguf/llama-tied.q8_0.gguf")).unwrap();
    let scaling = |pairs: &[(&str, u32, Vec<u8>)]| {
        let bytes = pairs.iter().fold(whole.clone(), |bytes, (key, kind, value)| {
            with(&bytes, &format!("llama.rope.{key}"), *kind, value)
        });
        load(&place.gguf(&bytes)).unwrap().config.rope.scaling
    };
    let factor = ("scaling.factor", 6, f32(4.0));
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(scaling(std::slice::from_ref(&factor)), linear);
    assert_eq!(scaling(&[("scale_linear", 6, f32(4.0))]), linear);
    assert_eq!(scaling(&[("scaling.type", 8, bytes_of("none")), factor.clone()]), RopeScaling::None);
    assert_eq!(scaling(&[("scaling.factor", 6, f32(0.0))]), RopeScaling::None);
    // Cosines and sines are multiplied whatever the kind of scaling.
    let RopeScaling::LongRope { short, long, attention, .. } =
        scaling(&[factor.clone(), ("scaling.attn_factor", 6, f32(1.5))])
    else {
        panic!("not by factors");
    };
    assert_eq!((short, long, attention), (vec![4.0; 4], vec![4.0; 4], 1.5));
    let RopeScaling::Yarn { factor, original, beta_fast, attention, .. } = scaling(&[
        ("scaling.type", 8, bytes_of("yarn")),
        factor,
        ("scaling.original_context_length", 4, u32(128)),
    ]) else {
        panic!("not YaRN");
    };
    assert_eq!((factor, original, beta_fast), (4.0, 128, 32.0));
    assert!((attention - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-9);
}

/// llama.cpp takes each bias of each layer for itself.
#[test]
fn a_bias_that_only_some_layers_have() {
    let place = Place::new();
    let whole = std::fs::read(fixture("cases/llama_qkvo_mlp_bias.gguf")).unwrap();
    let partial = replaced(&whole, "blk.0.attn_k.bias", "blk.0.attn_k.bia_");
    let message = load(&place.gguf(&partial)).unwrap_err();
    assert!(message.contains("unexpected: blk.0.attn_k.bia_"), "{message}");
    let gguf = Gguf::open(&place.gguf(&partial)).unwrap();
    let zeros = minicache_models::WeightSource::dense(&gguf, "model.layers.0.self_attn.k_proj.bias", &[32]);
    assert_eq!(zeros.unwrap().to_vec1::<f32>().unwrap(), [0.0; 32]);
}

#[test]
fn metadata_beyond_the_file_is_refused() {
    let place = Place::new();
    let whole = std::fs::read(fixture("gguf/llama-tied.q8_0.gguf")).unwrap();
    let set = |key: &str, n: u32| {
        let at = whole.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len() + 4;
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&n.to_le_bytes());
        place.gguf(&bytes)
    };
    for key in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.rope.dimension_count",
    ] {
        for n in [0, 3, 5, 1000, u32::MAX] {
            let message = load(&set(key, n)).unwrap_err();
            assert!(message.contains("x.gguf") && !message.contains('\n'), "{key} {n}: {message}");
        }
    }
    let message = load(&set("llama.block_count", u32::MAX)).unwrap_err();
    assert!(message.contains("it holds 4 layers"), "{message}");
    for n in [1, 1000, u32::MAX] {
        let path = place.gguf(&with(&whole, "llama.expert_count", 4, &u32(n)));
        assert!(load(&path).unwrap_err().contains("x.gguf"));
    }
    let path = place.gguf(&with(&whole, "general.type", 8, &bytes_of("adapter")));
    assert!(load(&path).unwrap_err().contains("holds no model but something of type \"adapter\""));
}

/// A folder with the tiny tied model, its tensors renamed.
fn renamed(place: &Place, rename: impl Fn(&str) -> String) -> PathBuf {
    let dir = place.0.path().join("model");
    std::fs::create_dir_all(&dir).unwrap();
    let from = fixture("llama-tied");
    std::fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    dir
}

#[test]
fn tied_weights_under_either_name_and_names_without_a_prefix() {
    let tokens: Vec<u32> = (3..40).collect();
    let want = logits(&load(&fixture("llama-tied")).unwrap(), &tokens);
    let head = |name: &str| match name {
        "model.embed_tokens.weight" => "lm_head.weight".to_string(),
        name => name.to_string(),
    };
    let bare = |name: &str| name.trim_start_matches("model.").to_string();
    let place = Place::new();
    for rename in [&head as &dyn Fn(&str) -> String, &bare] {
        let dir = renamed(&place, rename);
        assert_eq!(worst(&want, &logits(&load(&dir).unwrap(), &tokens)), 0.0);
    }
    // One matrix alone is no model whose two differ.
    let dir = renamed(&place, head);
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let untied = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(config, untied);
    std::fs::write(dir.join("config.json"), untied).unwrap();
    let message = load(&dir).unwrap_err();
    assert!(message.contains("missing: model.embed_tokens.weight"), "{message}");
}

#[test]
fn folders_say_what_they_hold_instead() {
    let place = Place::new();
    let dir = place.0.path();
    place.gguf(b"GGUF");
    let message = load(dir).unwrap_err();
    assert!(message.contains("it holds a GGUF file: give ") && message.contains("x.gguf"), "{message}");
    std::fs::remove_file(dir.join("x.gguf")).unwrap();
    std::fs::write(dir.join("pytorch_model.bin"), b"x").unwrap();
    assert!(load(dir).unwrap_err().contains("convert them to safetensors"));
    for (bytes, wanted) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"[..], "Git LFS pointer"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0\0\0\0\0", "gzip"),
    ] {
        std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
        let message = load(dir).unwrap_err();
        assert!(message.contains(wanted) && message.contains("model.safetensors"), "{message}");
    }
    let dir = renamed(&place, |name| name.to_string());
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let utf16: Vec<u8> = config.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (bytes, wanted) in [
        (utf16, "UTF-16"),
        (Vec::new(), "not valid JSON"),
        (
            config.replacen("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 2147483648", 1).into(),
            "num_hidden_layers",
        ),
        (config.replacen('{', "{\"final_logit_softcapping\": 30.0,", 1).into(), "final_logit_softcapping"),
    ] {
        std::fs::write(dir.join("config.json"), bytes).unwrap();
        let message = load(&dir).unwrap_err();
        assert!(message.contains(wanted) && message.contains("config.json"), "{message}");
    }
    std::fs::write(dir.join("config.json"), format!("\u{feff}{config}")).unwrap();
    load(&dir).unwrap();
}
