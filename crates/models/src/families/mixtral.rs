//! Mixtral 8x7B, 8x22B: Mistral with experts.

use super::{ExpertKeys, Family, GgufForm, Role, Sliding, When, llama};

pub(super) const MIXTRAL: Family = Family {
    class: "MixtralForCausalLM",
    gguf: GgufForm { when: When::Experts, ..llama::LLAMA.gguf },
    theta: 1e6,
    window: Sliding::All,
    experts: Some(ExpertKeys { count: "num_local_experts", used: "num_experts_per_tok" }),
    layer: &[
        (Role::InputNorm, "input_layernorm", "attn_norm"),
        (Role::Queries, "self_attn.q_proj", "attn_q"),
        (Role::Keys, "self_attn.k_proj", "attn_k"),
        (Role::Values, "self_attn.v_proj", "attn_v"),
        (Role::Output, "self_attn.o_proj", "attn_output"),
        (Role::MlpNorm, "post_attention_layernorm", "ffn_norm"),
        (Role::Router, "block_sparse_moe.gate", "ffn_gate_inp"),
        (Role::ExpertGate, "block_sparse_moe.experts.{}.w1", "ffn_gate"),
        (Role::ExpertDown, "block_sparse_moe.experts.{}.w2", "ffn_down"),
        (Role::ExpertUp, "block_sparse_moe.experts.{}.w3", "ffn_up"),
    ],
    ..Family::PLAIN
};
