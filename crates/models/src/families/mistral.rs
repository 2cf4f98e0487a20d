//! Mistral 7B: Llama with a sliding window.

use super::{Family, GgufForm, Sliding, When, llama};

pub(super) const MISTRAL: Family = Family {
    class: "MistralForCausalLM",
    gguf: GgufForm { when: When::Windowed, ..llama::LLAMA.gguf },
    window: Sliding::Given,
    layer: llama::LAYER,
    ..Family::PLAIN
};
