//! GGUF metadata as the `config.json` of a Hugging Face model.

use std::collections::BTreeSet;

use minicache_config::shown;
use serde_json::{Map, Value, json};

use super::{Gguf, names};
use crate::families::{Bias, EMBEDDING, HEAD, Sliding, in_layer};
use crate::{Error, Family, ModelConfig, Result, WeightSource, weights};

/// # Errors
/// A file that holds something else than a model, or an architecture that the decoder does not compute.
pub(super) fn check_architecture(gguf: &Gguf) -> Result<()> {
    if let Some(kind) = gguf.text("general.type").filter(|kind| *kind != "model") {
        let message = format!("holds no model but something of type \"{}\" (general.type)", shown(kind));
        return Err(gguf.error(message));
    }
    if gguf.families().next().is_some() {
        return Ok(());
    }
    Err(unsupported(gguf))
}

fn unsupported(gguf: &Gguf) -> Error {
    let (arch, known) = (shown(gguf.architecture()), Family::gguf_architectures());
    gguf.error(format!("architecture \"{arch}\" is not supported; supported are {known}"))
}

impl Gguf {
    /// The model's configuration, which its tensors have been held against.
    ///
    /// # Errors
    /// Metadata that is missing, of the wrong type, not understood, or does not fit the tensors.
    pub fn config(&self) -> Result<ModelConfig> {
        let in_file = |error: Error| match error {
            Error::Config(_) => self.error(error.to_string()),
            other => other,
        };
        let mut config = ModelConfig::from_json(&self.hf_config()?.to_string()).map_err(in_file)?;
        let [qkv, out, mlp] = Bias::ALL.map(|group| self.has_bias(group));
        (config.qkv_bias, config.out_bias, config.mlp_bias) = (qkv, out, mlp);
        if let Some(rotary) = self.size("rope.dimension_count")? {
            // The factor in a config.json may round to another number.
            config.rope.rotary_dim = rotary;
        }
        config.validate().map_err(in_file)?;
        weights::check(&config, self)?;
        Ok(config)
    }

    fn has_bias(&self, group: Bias) -> bool {
        let modules = names::biased(self.architecture(), group);
        let is = |name: &str| {
            let module = name.strip_suffix(".bias").and_then(in_layer);
            module.is_some_and(|(_, module)| modules.contains(module))
        };
        self.places.keys().any(|name| is(name))
    }

    /// The model's configuration in the form of a Hugging Face `config.json`, from metadata and tensor shapes.
    ///
    /// # Errors
    /// Metadata that is missing, of the wrong type, or not understood.
    pub fn hf_config(&self) -> Result<Value> {
        let arch = self.architecture();
        let hidden = self.need("embedding_length")?;
        let heads = self.per_layer("attention.head_count")?;
        let heads = heads.ok_or_else(|| self.absent("attention.head_count"))?;
        if heads == 0 {
            return Err(self.error(format!("metadata {} is 0", self.key("attention.head_count"))));
        }
        let head_dim = self.size("attention.key_length")?.unwrap_or(hidden / heads);
        let values = self.size("attention.value_length")?.unwrap_or(hidden / heads);
        if values != head_dim {
            return Err(self.error(format!(
                "heads of {head_dim} numbers for keys and {values} for values ({}) are not supported",
                self.key("attention.value_length")
            )));
        }
        let rows = match self.shape_of(EMBEDDING).as_deref() {
            Some([rows, _]) => *rows,
            Some(other) => {
                return Err(
                    self.error(format!("tensor token_embd.weight has shape {other:?}; it must be a matrix"))
                );
            }
            None => {
                return Err(
                    self.error("tensor token_embd.weight is missing; the file does not hold a whole model")
                );
            }
        };
        let experts = self.size("expert_count")?.unwrap_or(0);
        let context = self.need("context_length")?;
        let window = self.size("attention.sliding_window")?.filter(|&w| w > 0 && w < context);
        let family = Family::of_gguf(arch, experts > 0, window.is_some());
        let family = family.ok_or_else(|| unsupported(self))?;
        if window.is_some() && family.window == Sliding::Upper {
            let key = self.key("attention.sliding_window");
            return Err(self.error(format!(
                "metadata {key} does not say which layers of a {arch} model have a window; it is not supported"
            )));
        }
        let eps = self.real("attention.layer_norm_rms_epsilon")?;
        let eps = eps.ok_or_else(|| self.absent("attention.layer_norm_rms_epsilon"))?;
        let inner = self.per_layer("feed_forward_length")?;
        let layers = self.need("block_count")?;
        let held: BTreeSet<usize> = self.places.keys().filter_map(|name| Some(in_layer(name)?.0)).collect();
        if layers > held.len() {
            return Err(self.error(format!(
                "metadata {} is {layers}, but it holds {} layers; it is damaged, or not a whole model",
                self.key("block_count"),
                held.len()
            )));
        }
        self.check_keys(head_dim)?;
        let mut config = Map::new();
        let mut set = |name: &str, value: Value| config.insert(name.to_string(), value);
        set("model_type", json!(family.name()));
        set("vocab_size", json!(rows));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(inner.ok_or_else(|| self.absent("feed_forward_length"))?));
        set("num_hidden_layers", json!(layers));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(self.per_layer("attention.head_count_kv")?.unwrap_or(heads)));
        set("head_dim", json!(head_dim));
        set("rms_norm_eps", json!(tidy(eps)));
        set("max_position_embeddings", json!(context));
        set("rope_theta", json!(self.real("rope.freq_base")?.map_or(10_000.0, tidy)));
        set("tie_word_embeddings", json!(self.shape_of(HEAD).is_none()));
        set("hidden_act", json!("silu"));
        if let Some(window) = window {
            set("sliding_window", json!(window));
        }
        if let Some(of) = family.experts {
            set(of.count, json!(experts));
            set(of.used, json!(self.need("expert_used_count")?));
        }
        let [qkv, out, mlp] = Bias::ALL.map(|group| self.has_bias(group));
        set("attention_bias", json!(qkv || out));
        set("mlp_bias", json!(mlp));
        let rotary = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary == 0 || rotary > head_dim || (self.interleaved() && rotary != head_dim) {
            return Err(self.error(format!(
                "metadata {} is {rotary} where heads have {head_dim} numbers",
                self.key("rope.dimension_count")
            )));
        }
        if rotary < head_dim {
            set("partial_rotary_factor", json!(rotary as f64 / head_dim as f64));
        }
        for (name, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            if let Some(id) = self.integer(&format!("tokenizer.ggml.{id}_token_id")) {
                set(name, json!(id));
            }
        }
        if let Some((scaling, original)) = self.rope_scaling(rotary, context)? {
            set("rope_scaling", scaling);
            if let Some(original) = original {
                set("original_max_position_embeddings", json!(original));
            }
        }
        Ok(Value::Object(config))
    }

    /// `rope_scaling` and the context that the model was trained on first.
    ///
    /// llama.cpp divides every angle by the tensor of factors, where there is one, and by the factor of the metadata,
    /// which YaRN does for some of them; and multiplies cosines and sines with `attn_factor`.
    fn rope_scaling(&self, rotary: usize, context: usize) -> Result<Option<(Value, Option<usize>)>> {
        let original = self.size("rope.scaling.original_context_length")?.filter(|&n| n > 0);
        let attention = self.real("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let factor = match self.real("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.real("rope.scale_linear")?,
        };
        // 0 stands for none.
        let factor = factor.filter(|&f| f != 0.0).unwrap_or(1.0);
        let kind = self.word("rope.scaling.type")?.unwrap_or("linear");
        let factors = |tensor: &str| -> Result<Option<Vec<f32>>> {
            let Some(shape) = self.shape_of(tensor) else { return Ok(None) };
            let tensor = self.dense(tensor, &shape)?;
            Ok(Some(tensor.flatten_all()?.to_vec1()?))
        };
        let (long, short) = (factors("rope_factors_long.weight")?, factors("rope_factors_short.weight")?);
        // The converter writes LLaMA-3's scaling as divisors of the frequencies, which hold at every length.
        let fixed = factors("rope_freqs.weight")?;
        let refuse = |what: &str| Err(self.error(format!("{what} is not supported")));
        let stretch = match kind {
            "none" => 1.0,
            "linear" => factor,
            "longrope" if long.is_some() => factor,
            "yarn" if factor == 1.0 => 1.0,
            "yarn" => {
                if long.is_some() || short.is_some() || fixed.is_some() {
                    return refuse("YaRN together with a tensor of rotary factors");
                }
                let beta = |name: &str, default: f64| {
                    Ok::<_, Error>(self.real(name)?.filter(|&b| b > 0.0).map_or(default, tidy))
                };
                let value = json!({
                    "rope_type": "yarn",
                    "factor": tidy(factor),
                    "original_max_position_embeddings": original.unwrap_or(context),
                    // llama.cpp multiplies attn_factor with YaRN's own magnitude.
                    "attention_factor": tidy(attention) * (0.1 * tidy(factor).ln() + 1.0),
                    "beta_fast": beta("rope.scaling.yarn_beta_fast", 32.0)?,
                    "beta_slow": beta("rope.scaling.yarn_beta_slow", 1.0)?,
                });
                return Ok(Some((value, None)));
            }
            other => {
                return Err(self.error(format!(
                    "{} is \"{}\"; none, linear, yarn and longrope (with its tensors of factors) are supported",
                    self.key("rope.scaling.type"),
                    shown(other)
                )));
            }
        };
        let stretched = |factors: Vec<f32>| -> Vec<f64> {
            factors.into_iter().map(|f| tidy(f64::from(f)) * tidy(stretch)).collect()
        };
        let divided = |short: Vec<f32>, long: Vec<f32>, original: Option<usize>| {
            let value = json!({
                "rope_type": "longrope",
                "short_factor": stretched(short),
                "long_factor": stretched(long),
                "attention_factor": tidy(attention),
            });
            Ok(Some((value, original)))
        };
        match (short, long, fixed) {
            (None, None, None) if attention == 1.0 && stretch == 1.0 => Ok(None),
            (None, None, None) if attention == 1.0 => {
                Ok(Some((json!({"rope_type": "linear", "factor": tidy(stretch)}), None)))
            }
            (None, None, None) => divided(vec![1.0; rotary / 2], vec![1.0; rotary / 2], Some(context)),
            (None, None, Some(fixed)) => divided(fixed.clone(), fixed, original.or(Some(context))),
            (Some(short), Some(long), None) => divided(short, long, original),
            _ => refuse("one tensor of rotary factors without the other, or of two kinds,"),
        }
    }
}

/// The shortest decimal that rounds to the f32 in the file: 1e-5, not 9.999999747378752e-6.
fn tidy(x: f64) -> f64 {
    let short = x as f32;
    if f64::from(short) == x { short.to_string().parse().unwrap_or(x) } else { x }
}
