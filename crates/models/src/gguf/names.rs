//! GGUF tensor names in Hugging Face terms.
//!
//! Source of the table: `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py` of llama.cpp.

use std::collections::{BTreeSet, HashMap};

use minicache_config::shown;

use super::Gguf;
use crate::families::{Bias, Role, Row, WHOLE, expert_module, in_layer, layer_module};
use crate::{Family, Result};

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
        let row = name.rsplit('.').nth(1).and_then(|part| row(arch, part, false));
        let interleaved_heads = match row.filter(|_| gguf.interleaved()) {
            Some((Role::Queries, ..)) => heads,
            Some((Role::Keys, ..)) => kv_heads,
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
            Some(Translated::Stacked { layer, pattern }) => {
                if stored.dims.len() != 3 || stored.dims[0] != experts {
                    let message = format!(
                        "tensor {} has shape {:?}, its metadata says {experts} experts",
                        shown(name),
                        stored.dims
                    );
                    return Err(gguf.error(message));
                }
                for expert in 0..experts {
                    put(expert_name(layer, expert, pattern), Some(expert))?;
                }
            }
            None => put(name.clone(), None)?,
        }
    }
    add_zeros(gguf, &mut places);
    Ok(places)
}

/// The tensor of an architecture's layers that is called `part` there.
fn row(arch: &str, part: &str, of_expert: bool) -> Option<&'static Row> {
    let mut rows = Family::in_gguf(arch).flat_map(|family| family.layer);
    rows.find(|(role, _, own)| *own == part && role.of_expert() == of_expert)
}

/// The modules of an architecture's layers whose biases the decoder takes together.
pub(super) fn biased(arch: &str, group: Bias) -> BTreeSet<&'static str> {
    let rows = Family::in_gguf(arch).flat_map(|family| family.layer);
    rows.filter(|(role, ..)| role.bias() == Some(group)).map(|(_, module, _)| *module).collect()
}

/// llama.cpp takes each bias of each layer where there is one; the decoder those of all layers or of none.
fn add_zeros(gguf: &Gguf, places: &mut HashMap<String, Place>) {
    let layers: BTreeSet<usize> = places.keys().filter_map(|name| Some(in_layer(name)?.0)).collect();
    for group in Bias::ALL.map(|group| biased(gguf.architecture(), group)) {
        let has = |module: &str, kind: &str| {
            layers
                .iter()
                .any(|layer| places.contains_key(&format!("{}.{kind}", layer_module(*layer, module))))
        };
        if !group.iter().any(|module| has(module, "bias")) {
            continue;
        }
        for (layer, module) in layers.iter().flat_map(|layer| group.iter().map(move |module| (layer, module)))
        {
            let name = |kind: &str| format!("{}.{kind}", layer_module(*layer, module));
            if let Some(Place::Stored(weight)) = places.get(&name("weight"))
                && let Some(rows) = gguf.tensors.get(&weight.tensor).and_then(|t| t.dims.first())
            {
                places.entry(name("bias")).or_insert(Place::Zeros(*rows));
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Translated {
    One(String),
    /// All experts of a layer in one tensor, by the pattern of their names.
    Stacked {
        layer: usize,
        pattern: &'static str,
    },
}

fn expert_name(layer: usize, expert: usize, pattern: &str) -> String {
    format!("{}.weight", expert_module(layer, pattern, expert))
}

fn translate(arch: &str, name: &str) -> Option<Translated> {
    if let Some((hf, _)) = WHOLE.iter().find(|(_, gguf)| *gguf == name) {
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
        && let Some((_, pattern, _)) = part.strip_suffix("_exps").and_then(|base| row(arch, base, true))
    {
        return Some(Translated::Stacked { layer, pattern });
    }
    // Older files hold one tensor per expert: ffn_gate.0.weight.
    if kind == "weight"
        && let Some((base, expert)) = part.split_once('.')
    {
        let expert: usize = expert.parse().ok()?;
        let (_, pattern, _) = row(arch, base, true)?;
        return Some(Translated::One(expert_name(layer, expert, pattern)));
    }
    let (_, module, _) = row(arch, part, false)?;
    Some(Translated::One(format!("{}.{kind}", layer_module(layer, module))))
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
        assert_eq!(
            translate("qwen3", "blk.2.attn_q_norm.weight"),
            one("model.layers.2.self_attn.q_norm.weight")
        );
        assert_eq!(translate("qwen2", "blk.2.attn_q_norm.weight"), None);
        assert_eq!(translate("phi3", "blk.3.ffn_up.weight"), one("model.layers.3.mlp.gate_up_proj.weight"));
        assert_eq!(translate("llama", "blk.3.ffn_up.weight"), one("model.layers.3.mlp.up_proj.weight"));
        let expert = "model.layers.1.block_sparse_moe.experts.7.w3.weight";
        assert_eq!(translate("llama", "blk.1.ffn_up.7.weight"), one(expert));
        let stacked = Translated::Stacked { layer: 1, pattern: "block_sparse_moe.experts.{}.w2" };
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
