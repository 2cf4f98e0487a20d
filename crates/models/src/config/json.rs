//! Reading `config.json`.

use std::path::Path;

use minicache_config::{python_json, shown};
use serde_json::Value;

use super::keys::Keys;
use super::{Experts, ModelConfig, rope};
use crate::families::{KvHeads, Role, Sliding, Switch};
use crate::{Error, Family, Result, Safetensors, weights};

/// What says that weights are not what they seem.
const QUANTISED: [(&str, &str); 2] = [
    ("quantization_config", "quantised safetensors are not read; use the unquantised weights or a GGUF file"),
    ("compression_config", "compressed safetensors are not read; use the unquantised weights or a GGUF file"),
];

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
            None if family.kv_heads == KvHeads::AsHeads => heads,
            None => return Err(keys.missing("num_key_value_heads")),
        };
        let head_dim = match keys.size("head_dim")?.or(family.head_dim) {
            Some(n) => n,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(Error::Config(format!(
                    "hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is not given"
                )));
            }
        };
        let max_position = keys.need_size("max_position_embeddings")?;
        let rope = rope::from_json(&keys, family, head_dim, max_position)?;
        let experts = match family.experts {
            Some(of) => Some(Experts { count: keys.need_size(of.count)?, used: keys.need_size(of.used)? }),
            None => None,
        };
        let on = |switch| match switch {
            Switch::On => Ok(true),
            Switch::Off => Ok(false),
            Switch::Key(key) => Ok::<_, Error>(keys.flag(key)?.unwrap_or(false)),
        };
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
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(family.tied),
            window: window_from_json(&keys, family, layers)?,
            qkv_bias: on(family.qkv_bias)?,
            out_bias: on(family.out_bias)?,
            mlp_bias: on(family.mlp_bias)?,
            qk_norm: family.has(Role::QueryNorm),
            experts,
            bos: keys.token_ids("bos_token_id")?.first().copied(),
            eos: keys.token_ids("eos_token_id")?,
        };
        config.validate()?;
        Ok(config)
    }
}

/// The window that all layers share.
fn window_from_json(keys: &Keys<'_>, family: &Family, layers: usize) -> Result<Option<usize>> {
    let window = match keys.map.get("sliding_window") {
        None if family.window == Sliding::Given => return Err(keys.missing("sliding_window")),
        _ => keys.size("sliding_window")?,
    };
    let sliding = match keys.get("layer_types") {
        None => None,
        Some(types) => Some(sliding_layers(types, layers)?),
    };
    let enabled = match family.window {
        Sliding::Never => false,
        Sliding::Upper => keys.flag("use_sliding_window")?.unwrap_or(false),
        Sliding::All | Sliding::Given => true,
    };
    let Some(window) = window.filter(|_| enabled) else {
        return match sliding {
            None | Some(0) => Ok(None),
            Some(n) => {
                Err(Error::Config(format!("layer_types names {n} layers with a sliding window without one")))
            }
        };
    };
    // Newer files list every layer.
    let sliding = match sliding {
        Some(n) => n,
        None if family.window == Sliding::Upper => {
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
