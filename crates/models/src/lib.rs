//! Model files to one configuration-driven decoder, with tokenizers, chat templates and the hub.

mod config;
mod decoder;
mod devices;
mod error;
mod linear;
mod moe;
pub mod packed;
mod rope;
mod weights;

pub use config::{Experts, Family, ModelConfig};
pub use decoder::{Decoder, LoadOptions, LogitsFor, Progress, Step};
pub use devices::{DeviceMap, parse_devices, split_layers};
pub use error::{Error, Result};
pub use rope::{Frequencies, RopeConfig, RopeScaling};
pub use weights::{Safetensors, WeightSource, check};
