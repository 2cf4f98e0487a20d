//! Qwen2 and Qwen2.5, dense: Llama with biases on queries, keys and values.

use super::{Family, GgufForm, Sliding, Switch, llama};

pub(super) const QWEN2: Family = Family {
    class: "Qwen2ForCausalLM",
    gguf: GgufForm::of("qwen2"),
    window: Sliding::Upper,
    qkv_bias: Switch::On,
    layer: llama::LAYER,
    ..Family::PLAIN
};
