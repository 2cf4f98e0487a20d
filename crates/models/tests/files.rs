//! Model files end to end: GGUF, tokenizers, chat templates, the registry and the hub.
#![allow(clippy::unwrap_used, missing_docs)]

mod files {
    pub(crate) mod cases;
    pub(crate) mod chat;
    pub(crate) mod default_model;
    pub(crate) mod gguf;
    pub(crate) mod hub;
    pub(crate) mod own_text;
    pub(crate) mod tokenizers;
}
