//! Phi-3 and Phi-4: fused projections.

use super::{Family, GgufForm, KvHeads, Role, Sliding};

pub(super) const PHI3: Family = Family {
    class: "Phi3ForCausalLM",
    gguf: GgufForm { tokens_strip: true, ..GgufForm::of("phi3") },
    kv_heads: KvHeads::AsHeads,
    window: Sliding::All,
    layer: &[
        (Role::InputNorm, "input_layernorm", "attn_norm"),
        (Role::Qkv, "self_attn.qkv_proj", "attn_qkv"),
        (Role::Output, "self_attn.o_proj", "attn_output"),
        (Role::MlpNorm, "post_attention_layernorm", "ffn_norm"),
        (Role::GateUp, "mlp.gate_up_proj", "ffn_up"),
        (Role::Down, "mlp.down_proj", "ffn_down"),
    ],
    ..Family::PLAIN
};
