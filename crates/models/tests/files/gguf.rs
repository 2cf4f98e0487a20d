//! GGUF files that llama.cpp's writer made of the golden models: the same logits as their safetensors.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use minicache_config::WeightMode;
use minicache_core::CacheSpec;
use minicache_models::{Gguf, LoadOptions, LogitsFor, Model, Safetensors, Step, WeightSource};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn full() -> CacheSpec {
    CacheSpec::parse(r#"{ method = "full", dtype = "f32" }"#).unwrap()
}

fn tensors(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap()
}

/// The golden tokens of a tiny model, their golden logits, and those that `model` gives.
fn logits(model: &Model, golden: &str) -> (Tensor, Tensor) {
    let golden = tensors(&format!("{golden}/golden.safetensors"));
    let tokens: Vec<u32> = golden["tokens"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    let mut sequence = model.sequence(&full(), tokens.len()).unwrap();
    let step = Step { tokens: &tokens, sequence: &mut sequence, logits: LogitsFor::All };
    let logits = model.decoder.forward(&mut [step]).unwrap();
    let shape = (tokens.len(), logits.vocab());
    (golden["logits"].clone(), Tensor::from_vec(logits.into_data(), shape, &Device::Cpu).unwrap())
}

/// Largest difference, as a part of the largest number.
fn worst(want: &Tensor, got: &Tensor) -> f32 {
    largest(&(got - want).unwrap()) / largest(want)
}

/// Mean difference, as a part of the largest number.
fn mean(want: &Tensor, got: &Tensor) -> f32 {
    let difference = (got - want).unwrap().abs().unwrap().mean_all().unwrap();
    difference.to_scalar::<f32>().unwrap() / largest(want)
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn load(name: &str, weights: WeightMode) -> Model {
    let options = LoadOptions { weights, ..LoadOptions::default() };
    Model::from_path(&fixture("gguf").join(name), name, &options).unwrap()
}

#[test]
fn logits_equal_golden() {
    for name in ["llama2", "llama3", "mistral", "phi3", "phi3-longrope", "qwen2", "qwen3", "mixtral"] {
        let model = load(&format!("{name}.f32.gguf"), WeightMode::Auto);
        let (want, got) = logits(&model, name);
        assert!(worst(&want, &got) <= 1e-4, "{name}: {}", worst(&want, &got));
        assert_eq!(model.stop_ids(), [2]);
        assert!(model.tokenizer.is_none() && model.chat.is_none());
        let message = model.need_tokenizer().unwrap_err().to_string();
        assert!(message.contains("has no tokenizer"), "{message}");
    }
}

/// The arithmetic of decoded Q8_0 weights is that of transformers with the same weights; computed with as blocks, they
/// stay near the original model. (Single logits of these touchy models move further than that whoever computes them.)
#[test]
fn quantised_logits() {
    let reference = tensors("gguf/q8_0-logits.safetensors");
    for name in [
        "llama2",
        "llama3",
        "llama-tied",
        "mistral",
        "phi3",
        "phi3-longrope",
        "qwen2",
        "qwen3",
        "mixtral",
        "mixtral-per-expert",
    ] {
        let golden = name.trim_end_matches("-per-expert");
        let model = |mode| load(&format!("{name}.q8_0.gguf"), mode);
        let (_, got) = logits(&model(WeightMode::F32), golden);
        let every_fourth = Tensor::arange_step(3u32, 48, 4, &Device::Cpu).unwrap();
        let got = got.index_select(&every_fourth, 0).unwrap();
        let difference = worst(&reference[golden], &got);
        assert!(difference <= 1e-4, "{name}: {difference}");
        for mode in [WeightMode::Quantized, WeightMode::Auto] {
            let (want, got) = logits(&model(mode), golden);
            let difference = mean(&want, &got);
            // A token that changes its experts changes altogether.
            let limit = if golden == "mixtral" { 0.04 } else { 0.02 };
            assert!(difference <= limit, "{name} {mode:?}: {difference}");
        }
    }
}

/// Both layouts of experts hold the same blocks.
#[test]
fn expert_layouts_hold_the_same() {
    let stacked = Gguf::open(&fixture("gguf/mixtral.q8_0.gguf")).unwrap();
    let apart = Gguf::open(&fixture("gguf/mixtral-per-expert.q8_0.gguf")).unwrap();
    for expert in 0..4 {
        for (weight, shape) in [("w1", [96, 32]), ("w2", [32, 96]), ("w3", [96, 32])] {
            let name = format!("model.layers.2.block_sparse_moe.experts.{expert}.{weight}.weight");
            let a = stacked.quantized(&name, &shape).unwrap().unwrap();
            let b = apart.quantized(&name, &shape).unwrap().unwrap();
            assert_eq!(a.data().unwrap(), b.data().unwrap(), "{name}");
        }
    }
    let mut names = (WeightSource::names(&stacked), WeightSource::names(&apart));
    names.0.sort();
    names.1.sort();
    assert_eq!(names.0, names.1);
}

#[test]
fn split_models_are_joined() {
    let whole = Gguf::open(&fixture("gguf/llama-tied.q8_0.gguf")).unwrap();
    let part = |n: usize| fixture("gguf").join(format!("llama-tied-split.q8_0-0000{n}-of-00003.gguf"));
    let split = Gguf::open(&part(1)).unwrap();
    assert_eq!(split.files(), [part(1), part(2), part(3)]);
    for name in whole.names() {
        let shape = whole.shape_of(&name).unwrap();
        let (a, b) = (whole.dense(&name, &shape).unwrap(), split.dense(&name, &shape).unwrap());
        assert_eq!(largest(&(a - b).unwrap()), 0.0, "{name}");
    }
    assert_eq!(whole.names().len(), split.names().len());
    let model = Model::from_path(&part(1), "split", &LoadOptions::default()).unwrap();
    assert_eq!(model.config.layers, 4);
    let message = Gguf::open(&part(2)).unwrap_err().to_string();
    assert!(message.contains("give the one whose name ends in -00001-of-00003.gguf"), "{message}");
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join(part(1).file_name().unwrap());
    std::fs::copy(part(1), &alone).unwrap();
    let message = Gguf::open(&alone).unwrap_err().to_string();
    assert!(message.contains("00002-of-00003.gguf: missing"), "{message}");
}

/// Row for row what the safetensors hold: the rotary permutation is undone.
#[test]
fn weights_equal_safetensors() {
    for name in ["llama3", "qwen2", "qwen3", "phi3"] {
        let gguf = Gguf::open(&fixture("gguf").join(format!("{name}.f32.gguf"))).unwrap();
        let source = Safetensors::open(fixture(name)).unwrap();
        for tensor in source.names() {
            let shape = source.shape_of(&tensor).unwrap();
            assert_eq!(gguf.shape_of(&tensor), Some(shape.clone()), "{tensor}");
            let difference =
                (gguf.dense(&tensor, &shape).unwrap() - source.dense(&tensor, &shape).unwrap()).unwrap();
            assert_eq!(largest(&difference), 0.0, "{name} {tensor}");
        }
    }
}

#[test]
fn every_weight_type_decodes_as_the_reference() {
    let gguf = Gguf::open(&fixture("gguf/types.gguf")).unwrap();
    let shape = [3, 512];
    let types = [
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    ];
    for kind in types {
        let got = gguf.dense(&format!("{kind}.blocks"), &shape).unwrap();
        let want = gguf.dense(&format!("{kind}.values"), &shape).unwrap();
        let difference = largest(&(got - &want).unwrap());
        assert!(difference <= 1e-6 * largest(&want), "{kind}: {difference}");
        let quantised = gguf.quantized(&format!("{kind}.blocks"), &shape).unwrap();
        assert_eq!(quantised.is_some(), kind.starts_with('Q'), "{kind}");
    }
}

#[test]
fn damaged_files_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    let whole = std::fs::read(fixture("gguf/llama2.q8_0.gguf")).unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    let mut nan = whole.clone();
    let last = nan.len() - 4;
    nan[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut version = whole.clone();
    version[4] = 9;
    let name = b"blk.0.attn_q.weight";
    // After the name: dimensions (4 bytes), two sizes of 8, the type.
    let kind = |number: u8| {
        let at = whole.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 20;
        let mut bytes = whole.clone();
        bytes[at] = number;
        bytes
    };
    let cases: [(Vec<u8>, &str); 10] = [
        (b"GGUF".to_vec(), "too short to be a GGUF file"),
        (b"<html>this is not the file you asked for</html>".to_vec(), "not a GGUF file"),
        (whole[..whole.len() - 5000].to_vec(), "truncated: tensor"),
        (whole[..200].to_vec(), "truncated or damaged"),
        (version, "GGUF version 9"),
        (replaced(b"llama.block_count", b"llama.block_coun_"), "llama.block_count is missing"),
        (replaced(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "model.layers.1.self_attn.q_proj.weight"),
        (
            replaced(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom"),
            "architecture \"bloom\" is not supported",
        ),
        (kind(16), "has the type IQ2_XXS"),
        (nan, "holds NaN or infinity"),
    ];
    for (bytes, wanted) in cases {
        std::fs::write(&path, bytes).unwrap();
        let message = Model::from_path(&path, "x", &LoadOptions::default()).unwrap_err().to_string();
        assert!(message.contains(wanted), "{wanted}: {message}");
        assert!(message.contains("x.gguf") && !message.contains('\n'), "{message}");
    }
    let missing = dir.path().join("none.gguf");
    assert!(Gguf::open(&missing).unwrap_err().to_string().contains("none.gguf: "));
}
