//! GGUF tensor names in Hugging Face terms.
//!
//! Source of the table: `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py` of llama.cpp.

use std::collections::{BTreeSet, HashMap};

use minicache_config::shown;

use super::Gguf;
use crate::Result;

/// Names of experts' tensors that a file may have, several times those of the largest models.
const MOST_NAMES: usize = 1 << 18;

/// How a Hugging Face tensor is found.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Place {
    /// In the file.
    Stored(Location),
    /// A bias that a layer does not have while others do: so many zeros.
    Zeros(usize),
}

/// Where in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Location {
    /// The GGUF tensor.
    pub(super) tensor: String,
    /// The expert inside a tensor that stacks all of them.
    pub(super) expert: Option<usize>,
    /// Heads whose rows are stored interleaved (rotary pairs side by side).
    pub(super) interleaved_heads: Option<usize>,
}

/// Every tensor of `gguf` by its Hugging Face name; names without one keep their own.
///
/// # Errors
/// Two tensors of one name; stacked experts that are not as many as the metadata says.
pub(super) fn places(gguf: &Gguf) -> Result<HashMap<String, Place>> {
    let arch = &gguf.architecture;
    let heads = gguf.per_layer("attention.head_count")?;
    let kv_heads = gguf.per_layer("attention.head_count_kv")?.or(heads);
    let experts = gguf.size("expert_count")?.unwrap_or(0);
    let mut places = HashMap::new();
    for (name, stored) in &gguf.tensors {
        // Only the llama converter permutes: its RoPE turns neighbouring numbers, the others' turns halves.
        let interleaved_heads = match name.rsplit('.').nth(1) {
            Some("attn_q") if arch == "llama" => heads,
            Some("attn_k") if arch == "llama" => kv_heads,
            _ => None,
        };
        let mut put = |hf: String, expert: Option<usize>| {
            let place = Place::Stored(Location { tensor: name.clone(), expert, interleaved_heads });
            match places.insert(hf, place) {
                Some(Place::Stored(other)) => {
                    let (a, b) = (shown(name), shown(&other.tensor));
                    Err(gguf.error(format!("tensors {a} and {b} are the same weights; the file is damaged")))
                }
                _ if places.len() > MOST_NAMES => {
                    Err(gguf.error(format!("names more than {MOST_NAMES} tensors, more than any model has")))
                }
                _ => Ok(()),
            }
        };
        match translate(arch, name) {
            Some(Translated::One(hf)) => put(hf, None)?,
            Some(Translated::Stacked { layer, weight }) => {
                if stored.dims.len() != 3 || stored.dims[0] != experts {
                    let message = format!(
                        "tensor {} has shape {:?}, its metadata says {experts} experts",
                        shown(name),
                        stored.dims
                    );
                    return Err(gguf.error(message));
                }
                for expert in 0..experts {
                    put(expert_name(layer, expert, weight), Some(expert))?;
                }
            }
            None => put(name.clone(), None)?,
        }
    }
    add_zeros(gguf, &mut places);
    Ok(places)
}

/// Projections whose biases the decoder takes together.
pub(super) const BIASED: [&[&str]; 3] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"],
    &["self_attn.o_proj"],
    &["mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"],
];

/// llama.cpp takes each bias of each layer where there is one; the decoder those of all layers or of none.
fn add_zeros(gguf: &Gguf, places: &mut HashMap<String, Place>) {
    let layers: BTreeSet<usize> = places.keys().filter_map(|name| layer_of(name)).collect();
    for group in BIASED {
        let has = |module: &&str, kind: &str| {
            layers.iter().any(|layer| places.contains_key(&format!("model.layers.{layer}.{module}.{kind}")))
        };
        if !group.iter().any(|module| has(module, "bias")) {
            continue;
        }
        for (layer, module) in layers.iter().flat_map(|layer| group.iter().map(move |module| (layer, module)))
        {
            let name = |kind: &str| format!("model.layers.{layer}.{module}.{kind}");
            if let Some(Place::Stored(weight)) = places.get(&name("weight"))
                && let Some(rows) = gguf.tensors.get(&weight.tensor).and_then(|t| t.dims.first())
            {
                places.entry(name("bias")).or_insert(Place::Zeros(*rows));
            }
        }
    }
}

/// The layer that a Hugging Face name belongs to.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}

#[derive(Debug, PartialEq)]
enum Translated {
    One(String),
    Stacked { layer: usize, weight: &'static str },
}

fn expert_name(layer: usize, expert: usize, weight: &str) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight")
}

fn translate(arch: &str, name: &str) -> Option<Translated> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(hf) = whole {
        return Some(Translated::One(hf.to_string()));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (part, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    // Experts have no biases in these architectures: those are left with names that nothing asks for.
    if kind == "weight"
        && let Some(weight) = part.strip_suffix("_exps").and_then(expert_weight)
    {
        return Some(Translated::Stacked { layer, weight });
    }
    // Older files hold one tensor per expert: ffn_gate.0.weight.
    if kind == "weight"
        && let Some((base, expert)) = part.split_once('.')
    {
        let expert: usize = expert.parse().ok()?;
        return Some(Translated::One(expert_name(layer, expert, expert_weight(base)?)));
    }
    let module = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate_inp" => "block_sparse_moe.gate",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" if arch == "phi3" => "mlp.gate_up_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(Translated::One(format!("model.layers.{layer}.{module}.{kind}")))
}

fn expert_weight(base: &str) -> Option<&'static str> {
    match base {
        "ffn_gate" => Some("w1"),
        "ffn_down" => Some("w2"),
        "ffn_up" => Some("w3"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str) -> Option<Translated> {
        Some(Translated::One(name.to_string()))
    }

    #[test]
    fn names_of_all_families() {
        assert_eq!(translate("llama", "token_embd.weight"), one("model.embed_tokens.weight"));
        assert_eq!(
            translate("llama", "blk.12.attn_q.weight"),
            one("model.layers.12.self_attn.q_proj.weight")
        );
        assert_eq!(translate("qwen2", "blk.0.attn_k.bias"), one("model.layers.0.self_attn.k_proj.bias"));
        assert_eq!(translate("phi3", "blk.3.ffn_up.weight"), one("model.layers.3.mlp.gate_up_proj.weight"));
        assert_eq!(translate("llama", "blk.3.ffn_up.weight"), one("model.layers.3.mlp.up_proj.weight"));
        let expert = "model.layers.1.block_sparse_moe.experts.7.w3.weight";
        assert_eq!(translate("llama", "blk.1.ffn_up.7.weight"), one(expert));
        let stacked = Translated::Stacked { layer: 1, weight: "w2" };
        assert_eq!(translate("llama", "blk.1.ffn_down_exps.weight"), Some(stacked));
        assert_eq!(
            translate("llama", "blk.0.ffn_gate_inp.weight"),
            one("model.layers.0.block_sparse_moe.gate.weight")
        );
        for other in
            ["rope_freqs.weight", "blk.0.ffn_up_exps.bias", "blk.0.ffn_up.1.bias", "blk.0.attn_q.scale"]
        {
            assert_eq!(translate("llama", other), None);
        }
    }
}
