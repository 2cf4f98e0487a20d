//! What a decoder is made of: the numbers of `config.json`, checked.

use std::path::Path;

use minicache_config::{python_json, shown};
use minicache_core::ModelShape;
use serde_json::{Map, Value};

use crate::rope::{RopeConfig, RopeScaling};
use crate::{Error, Result, Safetensors, weights};

/// What says that weights are not what they seem.
const QUANTISED: [(&str, &str); 2] = [
    ("quantization_config", "quantised safetensors are not read; use the unquantised weights or a GGUF file"),
    ("compression_config", "compressed safetensors are not read; use the unquantised weights or a GGUF file"),
];

/// Keys of other models' arithmetic, and the values (besides null, false, 0 and nothing) with which they change nothing:
/// a file with another one asks for what none of the families computes.
const FOREIGN: [(&str, Option<f64>); 34] = [
    ("add_cross_attention", None),
    ("alibi", None),
    ("attention_chunk_size", None),
    ("attention_multiplier", None),
    ("attention_out_bias", None),
    ("attn_logit_softcapping", None),
    ("attn_output_gate", None),
    ("clip_qkv", None),
    ("embedding_multiplier", Some(1.0)),
    ("final_logit_softcapping", None),
    ("first_k_dense_replace", None),
    ("head_dim_v", None),
    ("kv_lora_rank", None),
    ("logit_scale", Some(1.0)),
    ("logit_softcapping", None),
    ("logits_scaling", Some(1.0)),
    ("n_shared_experts", None),
    ("no_rope_layers", None),
    ("num_nextn_predict_layers", None),
    ("parallel_residual", None),
    ("q_lora_rank", None),
    ("qk_layernorm", None),
    ("qk_norm", None),
    ("query_pre_attn_scalar", None),
    ("residual_multiplier", Some(1.0)),
    ("router_logit_softcapping", None),
    ("scale_depth", None),
    ("scale_emb", Some(1.0)),
    ("text_config", None),
    ("use_alibi", None),
    ("use_mrope", None),
    ("use_parallel_residual", None),
    ("use_qk_norm", None),
    ("v_head_dim", None),
];

/// Bounds on a configuration, several times the largest model's: beyond them it is damaged, and what is computed from it
/// before its weights are looked at could not be held.
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 16;
const MOST_WIDTH: usize = 1 << 24;
const MOST_VOCAB: usize = 1 << 28;
const MOST_CONTEXT: usize = 1 << 32;
const MOST_EXPERTS: usize = 1 << 12;

/// A model family, as far as file forms differ; the arithmetic is driven by [`ModelConfig`]'s other fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3 and everything of its form (SmolLM2, ...).
    Llama,
    /// Mistral 7B.
    Mistral,
    /// Mixtral 8x7B, 8x22B.
    Mixtral,
    /// Phi-3 and Phi-4 with fused projections.
    Phi3,
    /// Qwen2 and Qwen2.5, dense.
    Qwen2,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 5] =
        [Family::Llama, Family::Mistral, Family::Mixtral, Family::Phi3, Family::Qwen2];

    /// The name in `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Mixtral => "mixtral",
            Family::Phi3 => "phi3",
            Family::Qwen2 => "qwen2",
        }
    }

    /// The family of a `model_type`.
    ///
    /// # Errors
    /// A type that is not supported; the message lists those that are.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|f| f.name()).collect();
            let (name, known) = (shown(name), known.join(", "));
            Error::Config(format!("model_type \"{name}\" is not supported; supported are {known}"))
        })
    }
}

/// A sparse mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts that each token is sent to.
    pub used: usize,
}

/// Everything a decoder has to know besides its weights. Filled from a Hugging Face `config.json` by
/// [`ModelConfig::from_json`], or from GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Size of the residual stream.
    pub hidden: usize,
    /// Inner size of the feed-forward block (of one expert).
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of one head; need not be `hidden / heads`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Epsilon of RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Sliding window in tokens.
    pub window: Option<usize>,
    /// Whether the weights hold `qkv_proj` and `gate_up_proj` instead of their parts.
    pub fused_projections: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases in the feed-forward block.
    pub mlp_bias: bool,
    /// Mixture of experts; absent: a dense feed-forward block.
    pub experts: Option<Experts>,
    /// Beginning-of-sequence token.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`, with `rope_theta` and `rope_scaling` or with `rope_parameters`.
    ///
    /// # Errors
    /// Not JSON; an unsupported model type, activation or quantisation; a key that is missing or of the wrong kind
    /// (named); numbers that do not fit together.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_value(&python_json::from_str(text).map_err(|e| Error::Config(e.to_string()))?)
    }

    /// Reads the `config.json` of a model directory, and holds it against the weights where they are there.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`], with the file's name; weights of another configuration.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let mut config = Self::from_file(dir)?;
        if let Ok(mut weights) = Safetensors::open(dir) {
            weights.tie(&mut config)?;
            weights::check(&config, &weights)?;
        }
        Ok(config)
    }

    /// Reads the `config.json` of a model directory.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`], with the file's name.
    pub(crate) fn from_file(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.is_file() {
            let message = format!(
                "has no config.json; give a directory with config.json and safetensors, or a .gguf file{}",
                weights::other_weights(dir)
            );
            return Err(Error::file(dir, message));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let value = python_json::from_slice(&bytes).map_err(|e| Error::file(&path, e.to_string()))?;
        Self::from_value(&value).map_err(|e| Error::file(&path, e.to_string()))
    }

    fn from_value(value: &Value) -> Result<Self> {
        let Value::Object(map) = value else {
            return Err(Error::Config("expected a JSON object".into()));
        };
        let keys = Keys { map, of: "" };

        let family = Family::by_name(keys.text("model_type")?.ok_or_else(|| keys.missing("model_type"))?)?;
        for (key, mend) in QUANTISED {
            if keys.get(key).is_some() {
                return Err(Error::Config(format!("{key} is set, but {mend}")));
            }
        }
        for key in ["hidden_act", "hidden_activation"] {
            if let Some(act) = keys.text(key)?
                && !matches!(act, "silu" | "swish")
            {
                let act = shown(act);
                return Err(Error::Config(format!(
                    "{key} \"{act}\" is not supported; supported is \"silu\""
                )));
            }
        }
        keys.check_foreign()?;

        let hidden = keys.need_size("hidden_size")?;
        let layers = keys.need_size("num_hidden_layers")?;
        let heads = keys.need_size("num_attention_heads")?;
        let kv_heads = match keys.size("num_key_value_heads")? {
            Some(n) => n,
            // Older files of these families leave it out and mean multi-head attention; the others' default differs.
            None if matches!(family, Family::Llama | Family::Phi3) => heads,
            None => return Err(keys.missing("num_key_value_heads")),
        };
        let head_dim = match keys.size("head_dim")? {
            Some(n) => n,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(Error::Config(format!(
                    "hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is not given"
                )));
            }
        };
        let max_position = keys.need_size("max_position_embeddings")?;
        let rope = rope_from_json(&keys, family, head_dim, max_position)?;
        let experts = match family {
            Family::Mixtral => Some(Experts {
                count: keys.need_size("num_local_experts")?,
                used: keys.need_size("num_experts_per_tok")?,
            }),
            _ => None,
        };
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let config = Self {
            family,
            hidden,
            intermediate: keys.need_size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: keys.need_size("vocab_size")?,
            context: rope.context(),
            rms_eps: keys.number("rms_norm_eps")?.ok_or_else(|| keys.missing("rms_norm_eps"))? as f32,
            rope,
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            window: window_from_json(&keys, family, layers)?,
            fused_projections: family == Family::Phi3,
            qkv_bias: family == Family::Qwen2 || (family == Family::Llama && attention_bias),
            out_bias: family == Family::Llama && attention_bias,
            mlp_bias: family == Family::Llama && keys.flag("mlp_bias")?.unwrap_or(false),
            experts,
            bos: keys.token_ids("bos_token_id")?.first().copied(),
            eos: keys.token_ids("eos_token_id")?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the numbers fit together; whoever fills the struct by hand calls it.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab),
            ("max_position_embeddings", self.context),
        ];
        if let Some((key, _)) = sizes.into_iter().find(|(_, n)| *n == 0) {
            return Err(Error::Config(format!("{key} must be at least 1")));
        }
        let most = [
            MOST_WIDTH,
            MOST_WIDTH,
            MOST_LAYERS,
            MOST_HEADS,
            MOST_HEADS,
            MOST_WIDTH,
            MOST_VOCAB,
            MOST_CONTEXT,
        ];
        if let Some(((key, n), most)) = sizes.into_iter().zip(most).find(|((_, n), most)| n > most) {
            return Err(Error::Config(format!("{key} is {n}; more than {most} is no model that can be run")));
        }
        if self.q_dim() > MOST_WIDTH {
            return Err(Error::Config(format!(
                "num_attention_heads {} of head_dim {} are more than {MOST_WIDTH} numbers",
                self.heads, self.head_dim
            )));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(Error::Config(format!("rms_norm_eps {} must be 0 or above", self.rms_eps)));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::Config(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.heads, self.kv_heads
            )));
        }
        if self.window == Some(0) {
            return Err(Error::Config("sliding_window must be at least 1".into()));
        }
        if let Some(e) = self.experts
            && e.count > MOST_EXPERTS
        {
            return Err(Error::Config(format!(
                "num_local_experts is {}; more than {MOST_EXPERTS} is no model that can be run",
                e.count
            )));
        }
        if let Some(e) = self.experts
            && (e.count == 0 || e.used == 0 || e.used > e.count)
        {
            return Err(Error::Config(format!(
                "num_experts_per_tok {} must be between 1 and num_local_experts {}",
                e.used, e.count
            )));
        }
        if self.experts.is_some() && (self.mlp_bias || self.fused_projections) {
            return Err(Error::Config("experts with biases or fused projections are not supported".into()));
        }
        self.rope.validate(self.head_dim)
    }

    /// What a cache has to know.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: (1.0 / (self.head_dim as f64).sqrt()) as f32,
        }
    }

    /// Numbers of one token's queries: `heads * head_dim`.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of one token's keys (or values): `kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Every tensor that the weights have to hold, by Hugging Face name, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            all.extend(self.layer_tensors(layer));
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        all
    }

    /// A number of tensors that the weights have to hold at the least, found without naming them.
    pub(crate) fn least_tensors(&self) -> usize {
        let experts = self.experts.map_or(0, |e| e.count.saturating_mul(3));
        self.layers.saturating_mul(experts.saturating_add(5))
    }

    /// The tensors of one layer, by Hugging Face name, with their shapes.
    pub fn layer_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner, q, kv) = (self.hidden, self.intermediate, self.q_dim(), self.kv_dim());
        let mut all = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        add("input_layernorm.weight".into(), &[hidden]);
        let projections: &[(&str, usize)] = if self.fused_projections {
            &[("qkv_proj", q + 2 * kv)]
        } else {
            &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
        };
        for (name, out) in projections {
            add(format!("self_attn.{name}.weight"), &[*out, hidden]);
            if self.qkv_bias {
                add(format!("self_attn.{name}.bias"), &[*out]);
            }
        }
        add("self_attn.o_proj.weight".into(), &[hidden, q]);
        if self.out_bias {
            add("self_attn.o_proj.bias".into(), &[hidden]);
        }
        add("post_attention_layernorm.weight".into(), &[hidden]);
        if let Some(experts) = self.experts {
            add("block_sparse_moe.gate.weight".into(), &[experts.count, hidden]);
            for e in 0..experts.count {
                for (name, out, input) in
                    [("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)]
                {
                    add(format!("block_sparse_moe.experts.{e}.{name}.weight"), &[out, input]);
                }
            }
            return all;
        }
        let projections: &[(&str, usize, usize)] = if self.fused_projections {
            &[("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)]
        } else {
            &[("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)]
        };
        for (name, out, input) in projections {
            add(format!("mlp.{name}.weight"), &[*out, *input]);
            if self.mlp_bias {
                add(format!("mlp.{name}.bias"), &[*out]);
            }
        }
        all
    }

    /// Weights of the model, in numbers.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// The window that all layers share.
fn window_from_json(keys: &Keys<'_>, family: Family, layers: usize) -> Result<Option<usize>> {
    let window = match keys.map.get("sliding_window") {
        None if family == Family::Mistral => return Err(keys.missing("sliding_window")),
        _ => keys.size("sliding_window")?,
    };
    let sliding = match keys.get("layer_types") {
        None => None,
        Some(types) => Some(sliding_layers(types, layers)?),
    };
    let enabled = match family {
        Family::Llama => false,
        Family::Qwen2 => keys.flag("use_sliding_window")?.unwrap_or(false),
        Family::Mistral | Family::Mixtral | Family::Phi3 => true,
    };
    let Some(window) = window.filter(|_| enabled) else {
        return match sliding {
            None | Some(0) => Ok(None),
            Some(n) => {
                Err(Error::Config(format!("layer_types names {n} layers with a sliding window without one")))
            }
        };
    };
    // Qwen2 lets only the layers from `max_window_layers` on slide; newer files list every layer.
    let sliding = match sliding {
        Some(n) => n,
        None if family == Family::Qwen2 => {
            layers.saturating_sub(keys.size("max_window_layers")?.unwrap_or(layers))
        }
        None => layers,
    };
    match sliding {
        0 => Ok(None),
        n if n == layers => Ok(Some(window)),
        n => Err(Error::Config(format!(
            "{n} of {layers} layers have a sliding window; models that mix both kinds of layers are not supported"
        ))),
    }
}

/// How many layers of `layer_types` have a sliding window.
fn sliding_layers(types: &Value, layers: usize) -> Result<usize> {
    let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(|| {
        Error::Config(format!("layer_types must be a list of {layers} words, one for each layer"))
    })?;
    let mut sliding = 0;
    for kind in types {
        match kind.as_str() {
            Some("full_attention") => {}
            Some("sliding_attention") => sliding += 1,
            _ => {
                let kind = shown(&kind.to_string());
                return Err(Error::Config(format!(
                    "layer_types: {kind} is not supported; supported are full_attention and sliding_attention"
                )));
            }
        }
    }
    Ok(sliding)
}

/// RoPE in either form.
fn rope_from_json(
    keys: &Keys<'_>,
    family: Family,
    head_dim: usize,
    max_position: usize,
) -> Result<RopeConfig> {
    let empty = Map::new();
    let section = |name: &'static str| -> Result<Option<Keys<'_>>> {
        match keys.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { map, of: name })),
            Some(other) => {
                let other = shown(&other.to_string());
                Err(Error::Config(format!("{name} must be an object, got {other}")))
            }
        }
    };
    let rope = match (section("rope_parameters")?, section("rope_scaling")?) {
        (Some(new), Some(old)) if new.map != old.map && !old.map.is_empty() => {
            return Err(Error::Config("rope_parameters and rope_scaling are both given and differ".into()));
        }
        (Some(new), _) => new,
        (None, Some(old)) => old,
        (None, None) => Keys { map: &empty, of: "rope_parameters" },
    };
    rope.check_rope()?;
    let theta = match rope.number("rope_theta")? {
        Some(theta) => theta,
        None => keys.number("rope_theta")?.unwrap_or(match family {
            Family::Mixtral => 1e6,
            _ => 1e4,
        }),
    };
    let partial = match rope.number("partial_rotary_factor")? {
        Some(p) => Some(p),
        None => keys.number("partial_rotary_factor")?,
    };
    let rotary_dim = partial.map_or(head_dim, |p| (head_dim as f64 * p) as usize);
    // `original_max_position_embeddings` beside the section wins over the one in it, as in transformers.
    let original = match keys.size("original_max_position_embeddings")? {
        Some(n) => n,
        None => rope.size("original_max_position_embeddings")?.unwrap_or(max_position),
    };
    if original == 0 {
        return Err(Error::Config("original_max_position_embeddings must be at least 1".into()));
    }
    let kind = match rope.text("rope_type")? {
        Some(kind) => kind,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let factor = || rope.number("factor")?.ok_or_else(|| rope.missing("factor"));
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()? },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low: rope.number("low_freq_factor")?.ok_or_else(|| rope.missing("low_freq_factor"))?,
            high: rope.number("high_freq_factor")?.ok_or_else(|| rope.missing("high_freq_factor"))?,
            original,
        },
        // The first Phi-3 files say "su", and "yarn" with the two factor lists.
        "longrope" | "su" | "yarn" if kind != "yarn" || rope.map.contains_key("short_factor") => {
            let ratio = rope.number("factor")?.unwrap_or(max_position as f64 / original as f64);
            let attention = rope.number("attention_factor")?;
            RopeScaling::LongRope {
                short: rope.numbers("short_factor")?,
                long: rope.numbers("long_factor")?,
                original,
                attention: attention.unwrap_or_else(|| RopeScaling::longrope_attention(ratio, original)),
            }
        }
        "yarn" => {
            let factor = match rope.number("factor")? {
                Some(factor) => factor,
                None => max_position as f64 / original as f64,
            };
            let attention = match rope.number("attention_factor")? {
                Some(attention) => attention,
                None => RopeScaling::yarn_attention(
                    factor,
                    rope.number("mscale")?.unwrap_or(0.0),
                    rope.number("mscale_all_dim")?.unwrap_or(0.0),
                ),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: rope.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: rope.number("beta_slow")?.unwrap_or(1.0),
                truncate: rope.flag("truncate")?.unwrap_or(true),
                attention,
            }
        }
        other => {
            return Err(Error::Config(format!(
                "{}: rope_type \"{}\" is not supported; supported are default, linear, dynamic, yarn, longrope (su), llama3",
                rope.of,
                shown(other)
            )));
        }
    };
    Ok(RopeConfig { theta, rotary_dim, max_position, scaling })
}

/// Typed access to a JSON object with errors that name the key.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// The object's own name, empty at the top.
    of: &'static str,
}

impl<'a> Keys<'a> {
    fn path(&self, key: &str) -> String {
        if self.of.is_empty() { key.to_owned() } else { format!("{}.{key}", self.of) }
    }

    fn missing(&self, key: &str) -> Error {
        Error::Config(format!("key {:?} is missing", self.path(key)))
    }

    /// # Errors
    /// Names a key of a rotary section that is not understood.
    fn check_rope(&self) -> Result<()> {
        const KNOWN: [&str; 18] = [
            "attention_factor",
            "attn_factor",
            "beta_fast",
            "beta_slow",
            "factor",
            "finetuned",
            "high_freq_factor",
            "long_factor",
            "low_freq_factor",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "partial_rotary_factor",
            "rope_theta",
            "rope_type",
            "short_factor",
            "truncate",
            "type",
        ];
        match self.map.iter().find(|(key, value)| !value.is_null() && !KNOWN.contains(&key.as_str())) {
            None => Ok(()),
            Some((key, value)) => {
                let (key, value) = (shown(&self.path(key)), shown(&value.to_string()));
                Err(Error::Config(format!("key \"{key}\" is {value}; it is not understood")))
            }
        }
    }

    /// # Errors
    /// Names a key of [`FOREIGN`] that is not off.
    fn check_foreign(&self) -> Result<()> {
        for (key, neutral) in FOREIGN {
            let Some(value) = self.get(key) else { continue };
            let off = match value {
                Value::Bool(on) => !on,
                Value::Array(values) => values.is_empty(),
                value => python_json::as_f64(value).is_some_and(|x| x == 0.0 || Some(x) == neutral),
            };
            // What these say of heads they may say of heads as they are.
            let head_dim =
                || Some(self.size("hidden_size").ok()?? / self.size("num_attention_heads").ok()??.max(1));
            let plain = |key: &str| {
                matches!(key, "head_dim_v" | "v_head_dim" | "query_pre_attn_scalar")
                    && value.as_u64().map(|n| n as usize)
                        == self.size("head_dim").ok().flatten().or_else(head_dim)
            };
            if !off && !plain(key) {
                let value = shown(&value.to_string());
                return Err(Error::Config(format!(
                    "key {key:?} is {value}; models that compute with it are not supported"
                )));
            }
        }
        Ok(())
    }

    /// The value of `key`; `null` counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let value = shown(&value.to_string());
                Err(Error::Config(format!("key {:?} must be {wanted}, got {value}", self.path(key))))
            }
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| python_json::as_f64(v).filter(|x| x.is_finite()))
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let read = |v: &Value| v.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<_>>>();
        self.typed(key, "a list of numbers", read)?.ok_or_else(|| self.missing(key))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        // Bounded so that products of sizes cannot overflow.
        let read = |v: &Value| v.as_u64().filter(|n| *n <= u64::from(u32::MAX)).map(|n| n as usize);
        self.typed(key, "a whole number", read)
    }

    fn need_size(&self, key: &str) -> Result<usize> {
        match self.size(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(Error::Config(format!("key {:?} must be at least 1", self.path(key)))),
            Some(n) => Ok(n),
        }
    }

    /// One token id, a list of them, or none.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let read = |v: &Value| match v {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<_>>>(),
            // -1 is used for "none".
            v if v.as_i64() == Some(-1) => Some(Vec::new()),
            v => one(v).map(|id| vec![id]),
        };
        Ok(self.typed(key, "a token id or a list of token ids", read)?.unwrap_or_default())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
            (
                "num_key_value_heads",
                json!(3),
                "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
            ),
            (
                "model_type",
                json!("gpt2"),
                "model_type \"gpt2\" is not supported; supported are llama, mistral",
            ),
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
        map.insert("model_type".into(), json!("qwen2"));
        assert_eq!(read(&map).unwrap().window, None);
        map.insert("use_sliding_window".into(), json!(true));
        map.insert("max_window_layers".into(), json!(1));
        let message = read(&map).unwrap_err().to_string();
        assert!(message.contains("1 of 2 layers have a sliding window"), "{message}");
        map.insert("max_window_layers".into(), json!(0));
        assert_eq!(read(&map).unwrap().window, Some(32));
    }
}
