//! Model files to one configuration-driven decoder, with tokenizers, chat templates and the hub.

pub mod packed;
