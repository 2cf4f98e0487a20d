//! GGUF tensor names in Hugging Face terms.
//!
//! Source of the table: `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py` of llama.cpp.

use std::collections::HashMap;

use super::Gguf;

/// How a Hugging Face tensor is found in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    /// The GGUF tensor.
    pub(super) tensor: String,
    /// The expert inside a tensor that stacks all of them.
    pub(super) expert: Option<usize>,
    /// Heads whose rows are stored interleaved (rotary pairs side by side).
    pub(super) interleaved_heads: Option<usize>,
}

/// Every tensor of `gguf` by its Hugging Face name; names without one keep their own.
pub(super) fn places(gguf: &Gguf) -> HashMap<String, Place> {
    let arch = &gguf.architecture;
    let heads = gguf.integer(&format!("{arch}.attention.head_count")).map(|h| h as usize);
    let kv_heads = gguf.integer(&format!("{arch}.attention.head_count_kv")).map(|h| h as usize).or(heads);
    let mut places = HashMap::new();
    for (name, stored) in &gguf.tensors {
        let mut put = |hf: String, expert: Option<usize>| {
            // Only the llama converter permutes: its RoPE turns neighbouring numbers, the others' turns halves.
            let interleaved_heads = match name.rsplit('.').nth(1) {
                Some("attn_q") if arch == "llama" => heads,
                Some("attn_k") if arch == "llama" => kv_heads,
                _ => None,
            };
            places.insert(hf, Place { tensor: name.clone(), expert, interleaved_heads });
        };
        match translate(arch, name) {
            Some(Translated::One(hf)) => put(hf, None),
            Some(Translated::Stacked { layer, weight }) => {
                for expert in 0..stored.dims.first().copied().unwrap_or(0) {
                    put(expert_name(layer, expert, weight), Some(expert));
                }
            }
            None => put(name.clone(), None),
        }
    }
    places
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
    if let Some(weight) = part.strip_suffix("_exps").and_then(expert_weight) {
        return Some(Translated::Stacked { layer, weight });
    }
    // Older files hold one tensor per expert: ffn_gate.0.weight.
    if let Some((base, expert)) = part.split_once('.') {
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
        assert_eq!(translate("llama", "rope_freqs.weight"), None);
    }
}
