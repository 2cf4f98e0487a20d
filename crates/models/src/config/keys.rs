//! The keys of a `config.json`: typed access, and those of other models.

use minicache_config::{python_json, shown};
use serde_json::{Map, Value};

use crate::{Error, Result};

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

/// Typed access to a JSON object with errors that name the key.
pub(super) struct Keys<'a> {
    pub(super) map: &'a Map<String, Value>,
    /// The object's own name, empty at the top.
    pub(super) of: &'static str,
}

impl<'a> Keys<'a> {
    fn path(&self, key: &str) -> String {
        if self.of.is_empty() { key.to_owned() } else { format!("{}.{key}", self.of) }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::Config(format!("key {:?} is missing", self.path(key)))
    }

    /// # Errors
    /// Names a key of a rotary section that is not understood.
    pub(super) fn check_rope(&self) -> Result<()> {
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
    pub(super) fn check_foreign(&self) -> Result<()> {
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
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
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

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| python_json::as_f64(v).filter(|x| x.is_finite()))
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let read = |v: &Value| v.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<_>>>();
        self.typed(key, "a list of numbers", read)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        // Bounded so that products of sizes cannot overflow.
        let read = |v: &Value| v.as_u64().filter(|n| *n <= u64::from(u32::MAX)).map(|n| n as usize);
        self.typed(key, "a whole number", read)
    }

    pub(super) fn need_size(&self, key: &str) -> Result<usize> {
        match self.size(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(Error::Config(format!("key {:?} must be at least 1", self.path(key)))),
            Some(n) => Ok(n),
        }
    }

    /// One token id, a list of them, or none.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
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
