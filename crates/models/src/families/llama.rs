//! Llama 1 to 3 and everything of its form (SmolLM2, ...).

use super::{Family, GgufForm, KvHeads, Role, Row, Switch};

pub(super) const LLAMA: Family = Family {
    class: "LlamaForCausalLM",
    gguf: GgufForm { interleaved: true, ..GgufForm::of("llama") },
    kv_heads: KvHeads::AsHeads,
    qkv_bias: Switch::Key("attention_bias"),
    out_bias: Switch::Key("attention_bias"),
    mlp_bias: Switch::Key("mlp_bias"),
    layer: LAYER,
    ..Family::PLAIN
};

/// The layer that others took over.
pub(super) const LAYER: &[Row] = &[
    (Role::InputNorm, "input_layernorm", "attn_norm"),
    (Role::Queries, "self_attn.q_proj", "attn_q"),
    (Role::Keys, "self_attn.k_proj", "attn_k"),
    (Role::Values, "self_attn.v_proj", "attn_v"),
    (Role::Output, "self_attn.o_proj", "attn_output"),
    (Role::MlpNorm, "post_attention_layernorm", "ffn_norm"),
    (Role::Gate, "mlp.gate_proj", "ffn_gate"),
    (Role::Up, "mlp.up_proj", "ffn_up"),
    (Role::Down, "mlp.down_proj", "ffn_down"),
];
