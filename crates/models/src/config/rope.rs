//! The rotary embedding of a `config.json`.

use minicache_config::shown;
use serde_json::{Map, Value};

use super::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling};
use crate::{Error, Family, Result};

/// Reads it in either form.
pub(super) fn from_json(
    keys: &Keys<'_>,
    family: &Family,
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
        None => keys.number("rope_theta")?.unwrap_or(family.theta),
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
