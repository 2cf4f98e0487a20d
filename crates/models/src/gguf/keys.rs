//! Metadata of the architecture, typed; and that nothing which changes the arithmetic is passed over.
//!
//! Meanings and defaults are those of llama.cpp (`llama-model.cpp`, `gguf-py/gguf/constants.py`).

use candle_core::quantized::gguf_file::Value;
use minicache_config::shown;

use super::{Gguf, as_u64};
use crate::{Error, Result};

/// Keys that the configuration is made from, or that say nothing about the arithmetic.
const KNOWN: [&str; 23] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    // The embedding has as many rows as it has.
    "vocab_size",
];

/// Keys that are off at 0, false or, for lists, at nothing but these.
const OFF_AT_ZERO: [&str; 26] = [
    "activation_sparsity_scale",
    "attention.clamp_kqv",
    "attention.kv_lora_rank",
    "attention.max_alibi_bias",
    "attention.output_scale",
    "attention.q_lora_rank",
    "attention.relative_buckets_count",
    "attention.scale",
    "attention.shared_kv_layers",
    "attention.temperature_length",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "n_deepstack_layers",
    "nextn_predict_layers",
    "pooling_type",
    "rescale_every_n_layers",
    "rope.dimension_sections",
    "rope.scaling.yarn_log_multiplier",
    "router_logit_softcapping",
    "swin_norm",
    "token_shift_count",
    "use_parallel_residual",
];

/// Keys that multiply with or count what there is one of: off at 0 and at 1.
const OFF_AT_ONE: [&str; 13] = [
    "embedding_scale",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_scale",
    "expert_group_used_count",
    "expert_weights_scale",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "logit_scale",
    "moe_every_n_layers",
    "residual_scale",
    "rope.scaling.alpha",
    "rope.scaling.yarn_attn_factor",
];

/// Keys that have to say what is done anyway.
const AS_COMPUTED: [&str; 2] = ["attention.causal", "expert_weights_norm"];

impl Gguf {
    /// The key of the architecture that `name` stands for.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture())
    }

    fn typed<T>(
        &self,
        name: &str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let key = self.key(name);
        match self.value(&key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.error(format!("metadata {key} must be {wanted}, it is {}", words(value)))),
            },
        }
    }

    /// A whole number of the architecture.
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>> {
        self.typed(name, "a whole number", size)
    }

    /// One that has to be there.
    pub(super) fn need(&self, name: &str) -> Result<usize> {
        self.size(name)?.ok_or_else(|| self.absent(name))
    }

    /// A whole number of every layer, the same for all: one, or a list of them.
    pub(super) fn per_layer(&self, name: &str) -> Result<Option<usize>> {
        self.typed(name, "a whole number, or a list of one for each layer", |value| match value {
            Value::Array(values) => values.iter().map(size).collect::<Option<Vec<_>>>(),
            value => Some(vec![size(value)?]),
        })?
        .map(|values| match values[..] {
            [first, ..] if values.iter().all(|n| *n == first) => Ok(first),
            _ => Err(self.error(format!(
                "metadata {} is not the same for all layers; such models are not supported",
                self.key(name)
            ))),
        })
        .transpose()
    }

    /// A number of the architecture.
    pub(super) fn real(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number", |value| real(value).filter(|x| x.is_finite()))
    }

    /// A word of the architecture.
    pub(super) fn word(&self, name: &str) -> Result<Option<&str>> {
        let key = self.key(name);
        match self.value(&key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(format!("metadata {key} must be a word, it is {}", words(value)))),
        }
    }

    pub(super) fn absent(&self, name: &str) -> Error {
        self.error(format!("metadata {} is missing; convert the model again", self.key(name)))
    }

    /// Checks that every key of the architecture is understood, or has a value with which it changes nothing.
    ///
    /// # Errors
    /// Names one that is not.
    pub(super) fn check_keys(&self, head_dim: usize) -> Result<()> {
        let prefix = self.key("");
        // The first by name, so that the message does not change from run to run.
        let mut names: Vec<&str> =
            self.parts[0].metadata.keys().filter_map(|key| key.strip_prefix(&prefix)).collect();
        names.sort_unstable();
        for name in names {
            let Some(value) = self.value(&self.key(name)) else { continue };
            if !KNOWN.contains(&name) && !self.is_off(name, value, head_dim)? {
                return Err(self.error(format!(
                    "metadata {} = {} is not understood; the model would compute something else without it",
                    shown(&self.key(name)),
                    words(value)
                )));
            }
        }
        Ok(())
    }

    /// Whether a key that is not computed with changes nothing.
    fn is_off(&self, name: &str, value: &Value, head_dim: usize) -> Result<bool> {
        let is = |x: f64| real(value) == Some(x);
        let flat = |value: &Value| matches!(value, Value::Bool(false)) || real(value) == Some(0.0);
        let zero = match value {
            Value::Array(values) => values.iter().all(flat),
            value => flat(value),
        };
        let yarn = self.word("rope.scaling.type")? == Some("yarn");
        Ok(match name {
            _ if OFF_AT_ZERO.contains(&name) && zero => true,
            _ if OFF_AT_ONE.contains(&name) => zero || is(1.0),
            _ if AS_COMPUTED.contains(&name) => matches!(value, Value::Bool(true)),
            "attention.scale" => {
                real(value).is_some_and(|scale| (scale * (head_dim as f64).sqrt() - 1.0).abs() < 1e-6)
            }
            "attention.layer_norm_epsilon" => real(value) == self.real("attention.layer_norm_rms_epsilon")?,
            "embedding_length_out" => size(value) == self.size("embedding_length")?,
            "expert_feed_forward_length" => zero || size(value) == self.per_layer("feed_forward_length")?,
            "hidden_activation" => {
                matches!(value, Value::String(text) if matches!(text.as_str(), "silu" | "swish"))
            }
            // The share of YaRN, negative where it is not set.
            "rope.scaling.yarn_ext_factor" => {
                real(value).is_some_and(|x| x < 0.0 || x == if yarn { 1.0 } else { 0.0 })
            }
            // LLaMA's own rows, which all files of that architecture have.
            "tensor_data_layout" => {
                matches!(value, Value::String(text) if text == "Meta AI original pth") && self.interleaved()
            }
            _ => false,
        })
    }
}

fn size(value: &Value) -> Option<usize> {
    as_u64(value).and_then(|n| usize::try_from(n).ok())
}

fn real(value: &Value) -> Option<f64> {
    match value {
        Value::F32(x) => Some(f64::from(*x)),
        Value::F64(x) => Some(*x),
        Value::I8(x) => Some(f64::from(*x)),
        Value::I16(x) => Some(f64::from(*x)),
        Value::I32(x) => Some(f64::from(*x)),
        Value::I64(x) => Some(*x as f64),
        other => as_u64(other).map(|x| x as f64),
    }
}

/// A value for a message.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => format!("\"{}\"", shown(text)),
        Value::Bool(truth) => truth.to_string(),
        Value::Array(values) => format!("a list of {} values", values.len()),
        other => real(other).map_or_else(|| "of another type".to_string(), |x| (x as f32).to_string()),
    }
}
