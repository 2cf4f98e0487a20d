//! GGUF metadata as the `config.json` of a Hugging Face model.

use serde_json::{Map, Value, json};

use super::Gguf;
use crate::{Result, WeightSource};

const ARCHITECTURES: [&str; 3] = ["llama", "phi3", "qwen2"];

/// # Errors
/// An architecture that the decoder does not compute.
pub(super) fn check_architecture(gguf: &Gguf) -> Result<()> {
    let arch = gguf.architecture();
    if ARCHITECTURES.contains(&arch) {
        return Ok(());
    }
    let known = ARCHITECTURES.join(", ");
    let message = format!(
        "architecture {arch:?} is not supported; supported are {known} (llama: Mistral and Mixtral too)"
    );
    Err(gguf.error(message))
}

impl Gguf {
    /// The model's configuration in the form of a Hugging Face `config.json`, from metadata and tensor shapes.
    ///
    /// # Errors
    /// Metadata that is missing or of the wrong type.
    pub fn hf_config(&self) -> Result<Value> {
        let arch = self.architecture();
        let key = |name: &str| format!("{arch}.{name}");
        let need = |name: &str| {
            self.integer(&key(name)).ok_or_else(|| {
                self.error(format!(
                    "metadata {} is missing or not a number; convert the model again",
                    key(name)
                ))
            })
        };
        let hidden = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        if heads == 0 {
            return Err(self.error(format!("metadata {} is 0", key("attention.head_count"))));
        }
        let head_dim = self.integer(&key("attention.key_length")).unwrap_or(hidden / heads);
        let embedding = self.shape_of("model.embed_tokens.weight").ok_or_else(|| {
            self.error("tensor token_embd.weight is missing; the file does not hold a whole model")
        })?;
        let experts = self.integer(&key("expert_count")).unwrap_or(0);
        let window = self.integer(&key("attention.sliding_window")).filter(|&w| w > 0);
        let model_type = match arch {
            "llama" if experts > 0 => "mixtral",
            "llama" if window.is_some() => "mistral",
            other => other,
        };
        let eps = self.number(&key("attention.layer_norm_rms_epsilon")).ok_or_else(|| {
            let name = key("attention.layer_norm_rms_epsilon");
            self.error(format!("metadata {name} is missing or not a number; convert the model again"))
        })?;
        let mut config = Map::new();
        let mut set = |name: &str, value: Value| config.insert(name.to_string(), value);
        set("model_type", json!(model_type));
        set("vocab_size", json!(embedding[0]));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(need("feed_forward_length")?));
        set("num_hidden_layers", json!(need("block_count")?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(self.integer(&key("attention.head_count_kv")).unwrap_or(heads)));
        set("head_dim", json!(head_dim));
        set("rms_norm_eps", json!(tidy(eps)));
        set("max_position_embeddings", json!(need("context_length")?));
        set("rope_theta", json!(self.number(&key("rope.freq_base")).unwrap_or(10_000.0)));
        set("tie_word_embeddings", json!(self.shape_of("lm_head.weight").is_none()));
        set("hidden_act", json!("silu"));
        if let Some(window) = window {
            set("sliding_window", json!(window));
        }
        if experts > 0 {
            set("num_local_experts", json!(experts));
            set("num_experts_per_tok", json!(need("expert_used_count")?));
        }
        if self.shape_of("model.layers.0.self_attn.q_proj.bias").is_some() {
            set("attention_bias", json!(true));
        }
        if let Some(rotary) = self.integer(&key("rope.dimension_count")).filter(|&r| r > 0 && r < head_dim) {
            set("partial_rotary_factor", json!(rotary as f64 / head_dim as f64));
        }
        for (name, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            if let Some(id) = self.integer(&format!("tokenizer.ggml.{id}_token_id")) {
                set(name, json!(id));
            }
        }
        if let Some((scaling, original)) = self.rope_scaling()? {
            set("rope_scaling", scaling);
            if let Some(original) = original {
                set("original_max_position_embeddings", json!(original));
            }
        }
        Ok(Value::Object(config))
    }

    /// `rope_scaling` and the context that the model was trained on first.
    fn rope_scaling(&self) -> Result<Option<(Value, Option<u64>)>> {
        let arch = self.architecture();
        let scaling = |name: &str| format!("{arch}.rope.scaling.{name}");
        let original = self.integer(&scaling("original_context_length"));
        let factor = self.number(&scaling("factor"));
        let attention = self.number(&scaling("attn_factor"));
        let factors = |tensor: &str| -> Result<Option<Vec<f32>>> {
            let Some(shape) = self.shape_of(tensor) else { return Ok(None) };
            let tensor = self.dense(tensor, &shape)?;
            Ok(Some(tensor.flatten_all()?.to_vec1()?))
        };
        let (long, short) = (factors("rope_factors_long.weight")?, factors("rope_factors_short.weight")?);
        if let (Some(long), Some(short)) = (long, short) {
            let mut value = json!({"rope_type": "longrope", "long_factor": long, "short_factor": short});
            if let Some(attention) = attention {
                value["attention_factor"] = json!(attention);
            }
            return Ok(Some((value, original)));
        }
        // The converter writes LLaMA-3's scaling as divisors of the frequencies, which hold at every length.
        if let Some(freqs) = factors("rope_freqs.weight")? {
            let value = json!({
                "rope_type": "longrope", "long_factor": freqs, "short_factor": freqs, "attention_factor": 1.0,
            });
            let context = self.integer(&format!("{arch}.context_length"));
            return Ok(Some((value, original.or(context))));
        }
        let kind = self.text(&scaling("type")).unwrap_or("none");
        let need_factor =
            || factor.ok_or_else(|| self.error(format!("metadata {} is missing", scaling("factor"))));
        match kind {
            "none" | "" => Ok(None),
            "linear" => Ok(Some((json!({"rope_type": "linear", "factor": need_factor()?}), None))),
            "yarn" => {
                let mut value = json!({"rope_type": "yarn", "factor": need_factor()?});
                if let Some(original) = original {
                    value["original_max_position_embeddings"] = json!(original);
                }
                if let Some(attention) = attention {
                    // llama.cpp multiplies this with YaRN's own magnitude, 0.1 ln(factor) + 1.
                    value["attention_factor"] = json!(attention * (0.1 * need_factor()?.ln() + 1.0));
                }
                Ok(Some((value, None)))
            }
            other => {
                let message = format!(
                    "{} is {other:?}; none, linear, yarn and longrope are supported",
                    scaling("type")
                );
                Err(self.error(message))
            }
        }
    }
}

/// The shortest decimal that rounds to the f32 in the file: 1e-5, not 9.999999747378752e-6.
fn tidy(x: f64) -> f64 {
    let short = x as f32;
    if f64::from(short) == x { short.to_string().parse().unwrap_or(x) } else { x }
}
