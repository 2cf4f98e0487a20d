//! Model files: a model that still loads also takes a step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minicache_core::latent::{Grouping, LatentPlan};
use minicache_core::settings::{Group, LatentSide};
use minicache_core::{CacheSpec, Latent, Resources, Sequence, build};
use minicache_models::calibrate::{self, BasisOptions, CalibrationInfo};
use minicache_models::{
    Gguf, LoadOptions, LogitsFor, Model, Registry, Safetensors, Step, Tokenizer, WeightSource,
};

use crate::mutate::{Seeds, Shape};
use crate::tokenizers::{speak, talk};
use crate::{Format, Outcome, line};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures");

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(FIXTURES).join(name)
}

fn load(path: &Path) -> Result<Model, String> {
    Model::from_path(path, "m", &LoadOptions::default()).map_err(line)
}

/// The model that caches are tried on.
pub(crate) fn tiny() -> Model {
    load(&fixture("llama3")).unwrap()
}

/// Runs two tokens of a sequence.
pub(crate) fn step(model: &Model, sequence: &mut Sequence) -> Outcome {
    let step = Step { tokens: &[1, 2], sequence, logits: LogitsFor::Last };
    model.decoder.forward(&mut [step]).map(drop).map_err(line)
}

fn whole(path: &Path) -> Outcome {
    let model = load(path)?;
    // As long as the model lets it.
    let full = CacheSpec::parse("full").map_err(line)?;
    step(&model, &mut model.sequence(&full, model.config.context).map_err(line)?)?;
    if let Some(tokenizer) = &model.tokenizer {
        speak(tokenizer)?;
    }
    model.chat.as_ref().map_or(Ok(()), talk)
}

/// Keys and names in GGUF files.
const GGUF_WORDS: &[&str] = &[
    "general.architecture",
    "general.alignment",
    "split.count",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.rope.freq_base",
    "llama.rope.dimension_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.key_length",
    "llama.vocab_size",
    "llama.expert_count",
    "llama.expert_used_count",
    "qwen2.block_count",
    "qwen2.attention.head_count",
    "qwen2.rope.freq_base",
    "qwen3.block_count",
    "qwen3.attention.head_count",
    "qwen3.attention.key_length",
    "phi3.attention.sliding_window",
    "phi3.rope.scaling.original_context_length",
    "phi3.context_length",
    "phi3.rope.scaling.attn_factor",
    "phi3.attention.head_count_kv",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
    "token_embd.weight",
    "output.weight",
    "output_norm.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_k.weight",
    "blk.0.attn_v.bias",
    "blk.0.attn_q_norm.weight",
    "blk.1.attn_k_norm.weight",
    "blk.0.attn_qkv.weight",
    "blk.1.attn_output.weight",
    "blk.0.ffn_up.weight",
    "blk.0.ffn_down.weight",
    "blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_gate.1.weight",
    "blk.0.ffn_gate_inp.weight",
    "blk.0.attn_norm.weight",
    "blk.1.ffn_norm.weight",
];

pub(crate) fn gguf(dir: &Path) -> Format {
    let names = [
        "gguf/llama-tied.q8_0.gguf",
        "gguf/llama3.q8_0.gguf",
        "gguf/qwen2.q8_0.gguf",
        "gguf/qwen3.q8_0.gguf",
        "gguf/phi3-longrope.q8_0.gguf",
        "gguf/mixtral.q8_0.gguf",
        "gguf/mixtral-per-expert.q8_0.gguf",
        "gguf/llama-bpe.gguf",
        "gguf/qwen2.gguf",
        "gguf/sentencepiece.gguf",
        "gguf/types.gguf",
        "cases/rope_scale_linear.gguf",
    ];
    let files = names.map(|name| fs::read(fixture(name)).unwrap()).to_vec();
    let path = dir.join("m.gguf");
    let read = move |_, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let gguf = Gguf::open(&path).map_err(line)?;
        let spoken = Tokenizer::from_gguf(&gguf).map_err(line)?.map_or(Ok(()), |tokenizer| speak(&tokenizer));
        whole(&path).and(spoken)
    };
    Format::new(Seeds { shape: Shape::Gguf, files, words: GGUF_WORDS }, read)
}

const FOLDERS: [&str; 8] =
    ["llama-tied", "llama3", "qwen2", "qwen3", "phi3", "phi3-longrope", "mistral-sliding", "mixtral"];

/// Copies of the tiny models in folders of their own.
fn folders(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    let copy = |name: &&str| {
        let folder = dir.join(name);
        fs::create_dir(&folder).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(fixture(name).join(file), folder.join(file)).unwrap();
        }
        folder
    };
    names.iter().map(copy).collect()
}

/// `file` of every folder is what is damaged.
fn in_folders(
    folders: Vec<PathBuf>,
    file: &'static str,
    shape: Shape,
    words: &'static [&'static str],
) -> Format {
    let files = folders.iter().map(|folder| fs::read(folder.join(file)).unwrap()).collect();
    let read = move |seed: usize, bytes: &[u8]| {
        fs::write(folders[seed].join(file), bytes).unwrap();
        whole(&folders[seed])
    };
    Format::new(Seeds { shape, files, words }, read)
}

pub(crate) fn config(dir: &Path) -> Format {
    const WORDS: &[&str] = &[
        "\"num_hidden_layers\":",
        "\"num_attention_heads\":",
        "\"num_key_value_heads\":",
        "\"head_dim\":",
        "\"sliding_window\":",
        "\"rope_scaling\": {\"rope_type\": \"dynamic\", \"factor\": 1e30},",
        "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 0},",
        "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0},",
        "\"partial_rotary_factor\":",
        "\"llama3\"",
        "\"dynamic\"",
        "\"longrope\"",
        "\"tie_word_embeddings\":",
        "\"num_local_experts\":",
        "\"num_experts_per_tok\":",
        "\"max_position_embeddings\":",
        "\"original_max_position_embeddings\":",
        "\"rms_norm_eps\":",
        "\"rope_theta\":",
        "\"vocab_size\":",
        "\"quantization_config\": {},",
        "\"attention_bias\": true,",
        "\"eos_token_id\": [1, -1],",
    ];
    in_folders(folders(dir, &FOLDERS), "config.json", Shape::Text, WORDS)
}

pub(crate) fn weights(dir: &Path) -> Format {
    const WORDS: &[&str] = &[
        "\"dtype\":\"F32\"",
        "\"dtype\":\"F16\"",
        "\"dtype\":\"BF16\"",
        "\"dtype\":\"F64\"",
        "\"dtype\":\"I8\"",
        "\"dtype\":\"F8_E4M3\"",
        "\"dtype\":\"F4\"",
        "\"shape\":[]",
        "\"shape\":[0]",
        "\"shape\":[0,18446744073709551615]",
        "\"data_offsets\":[0,0]",
        "\"data_offsets\":",
        "\"__metadata__\":{\"format\":\"pt\"},",
        "\"lm_head.weight\":",
        "\"model.norm.weight\":",
        "model.",
        ".weight",
    ];
    in_folders(
        folders(dir, &["llama-tied", "qwen2", "qwen3", "phi3-longrope"]),
        "model.safetensors",
        Shape::Safetensors,
        WORDS,
    )
}

/// The files beside: an index of shards and generation defaults.
pub(crate) fn index(dir: &Path) -> Format {
    let indexed = folders(&dir.join("."), &["qwen2"]).remove(0);
    let shard = "model-00001-of-00001.safetensors";
    fs::rename(indexed.join("model.safetensors"), indexed.join(shard)).unwrap();
    let weights = Safetensors::open(indexed.join(shard)).unwrap();
    let mut names = weights.names();
    names.sort_unstable();
    let map: serde_json::Map<_, _> = names.into_iter().map(|name| (name, shard.into())).collect();
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    let other = folders(dir, &["llama-tied"]).remove(0);
    let files = vec![
        serde_json::to_vec(&index).unwrap(),
        b"{\"eos_token_id\": [128001, 2], \"bos_token_id\": 1, \"temperature\": 0.6}".to_vec(),
    ];
    let paths = [indexed.join("model.safetensors.index.json"), other.join("generation_config.json")];
    let read = move |seed: usize, bytes: &[u8]| {
        fs::write(&paths[seed], bytes).unwrap();
        whole(paths[seed].parent().unwrap())
    };
    let words =
        &["\"../qwen2/model.safetensors\"", "\"/dev/zero\"", "\"config.json\"", "\"weight_map\":", "\".\""];
    Format::new(Seeds { shape: Shape::Text, files, words }, read)
}

pub(crate) fn registry(dir: &Path) -> Format {
    let files = vec![
        fs::read(Path::new(FIXTURES).join("../../registry.toml")).unwrap(),
        b"[[model]]\nname = \"m\"\nfamily = \"llama\"\nfile = \"m.gguf\"\nlayers = 4\nheads = 4\nkv_heads = 2\nhead_dim = 8\nhidden = 32\ncontext = 64\n".to_vec(),
    ];
    let path = dir.join("models.toml");
    let read = move |_, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let mut registry = Registry::built_in().map_err(line)?;
        registry.extend_from(&path).map_err(line)?;
        registry.entries().iter().for_each(|entry| drop((entry.shape(), entry.local())));
        Ok(())
    };
    let words = &[
        "[[model]]\n",
        "[model]\n",
        "window = ",
        "layers = ",
        "head_dim = ",
        "kv_heads = ",
        "aliases = ",
        "file = ",
    ];
    Format::new(Seeds { shape: Shape::Text, files, words }, read)
}

pub(crate) fn basis(dir: &Path) -> Format {
    let model = tiny();
    let tokens: Vec<u32> = (0..200).collect();
    let side = LatentSide { group: Group::Layers(2), rate: Some(2.0), ..LatentSide::default() };
    let latent = Latent { k: side.clone(), v: side, ..Latent::default() };
    let spec = CacheSpec::Latent(latent.clone());
    let groupings = [1, 2].map(|heads| Grouping { layers: 2, heads });
    let path = dir.join("basis.safetensors");
    let file = |groupings: &[Grouping], centre| {
        let options = BasisOptions { centre, ..BasisOptions::default() };
        let (basis, tokens) =
            model.calibrate([&tokens[..]].into_iter(), groupings, groupings, 4, options).unwrap();
        let info = CalibrationInfo {
            model: model.fingerprint.clone(),
            text: "text".into(),
            tokens,
            sinks: 4,
            options,
        };
        calibrate::save(&basis, &info, &path).unwrap();
        fs::read(&path).unwrap()
    };
    let files = vec![file(&groupings[1..], true), file(&groupings, false)];
    let read = move |_, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let (basis, _) = calibrate::load(&path, &model.fingerprint, model.decoder.shape()).map_err(line)?;
        let (shape, rotary) = (model.decoder.shape(), model.decoder.rotary(0));
        let plan = LatentPlan::new(&latent, shape, &basis, rotary.clone()).map_err(line)?;
        let resources = Resources { rotary: Some(rotary), latent: Some(Arc::new(plan)) };
        let cache = build(&spec, shape, &resources).map_err(line)?;
        step(&model, &mut model.decoder.sequence(cache, 0))
    };
    let words = &[
        "key.",
        "value.",
        ".mean",
        ".weights",
        ".vectors",
        ".variances",
        ".inverse",
        "\"dtype\":\"F16\"",
        "\"shape\":[0]",
        "\"shape\":[",
        "\"data_offsets\":[0,0]",
        "\"calibration\":",
        "\\\"tokens\\\":",
        "\\\"sinks\\\":",
    ];
    Format::new(Seeds { shape: Shape::Safetensors, files, words }, read)
}
