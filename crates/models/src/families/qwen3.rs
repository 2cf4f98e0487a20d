//! Qwen3, dense: each head of queries and keys is normalised before it is rotated.

use super::{Family, GgufForm, Role, Sliding, Switch};

pub(super) const QWEN3: Family = Family {
    class: "Qwen3ForCausalLM",
    gguf: GgufForm::of("qwen3"),
    head_dim: Some(128),
    window: Sliding::Upper,
    qkv_bias: Switch::Key("attention_bias"),
    out_bias: Switch::Key("attention_bias"),
    layer: &[
        (Role::InputNorm, "input_layernorm", "attn_norm"),
        (Role::Queries, "self_attn.q_proj", "attn_q"),
        (Role::Keys, "self_attn.k_proj", "attn_k"),
        (Role::Values, "self_attn.v_proj", "attn_v"),
        (Role::QueryNorm, "self_attn.q_norm", "attn_q_norm"),
        (Role::KeyNorm, "self_attn.k_norm", "attn_k_norm"),
        (Role::Output, "self_attn.o_proj", "attn_output"),
        (Role::MlpNorm, "post_attention_layernorm", "ffn_norm"),
        (Role::Gate, "mlp.gate_proj", "ffn_gate"),
        (Role::Up, "mlp.up_proj", "ffn_up"),
        (Role::Down, "mlp.down_proj", "ffn_down"),
    ],
    ..Family::PLAIN
};
