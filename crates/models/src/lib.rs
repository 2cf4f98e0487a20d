//! Model files to one configuration-driven decoder, with tokenizers, chat templates and the hub.

pub mod align;
pub mod calibrate;
pub mod chat;
mod config;
mod decoder;
mod devices;
mod error;
mod families;
pub mod gguf;
pub mod hub;
mod latents;
mod linear;
mod model;
mod moe;
mod own_text;
pub mod packed;
mod prefix;
pub mod registry;
mod rope;
mod save;
pub mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::{Experts, ModelConfig};
pub use decoder::{Decoder, LoadOptions, Logits, LogitsFor, Progress, Score, Step};
pub use devices::{DeviceMap, Target, describe_gpus, parse_devices, split_layers};
pub use error::{Error, Result};
pub use families::Family;
pub use gguf::Gguf;
pub use hub::{Hub, HubId};
pub use model::{Description, Model, PromptFormat, describe};
pub use registry::{Entry, Registry};
pub use rope::{Frequencies, RopeConfig, RopeScaling};
pub use save::save_tensors;
pub use tokenizer::{DecodeStream, Tokenizer};
pub use weights::{Safetensors, WeightSource, check};
