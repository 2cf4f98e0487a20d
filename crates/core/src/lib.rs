#![doc = include_str!("../README.md")]
//!
//! Layouts: slices are f32, contiguous and token-major, `(tokens, heads, head_dim)`, as a linear layer writes them.

mod account;
mod attend;
mod cache;
mod dense;
mod error;
mod evicting;
mod footprint;
pub mod kernels;
mod lane;
pub mod latent;
mod layered;
mod magnitudes;
pub mod merge;
mod merge_pair;
mod methods;
mod pair;
mod plain;
mod resources;
mod retain;
mod scratch;
pub mod settings;
mod softmax;
mod steps;
pub mod store;
mod synthetic;

pub use account::{Nominal, footprint, nominal, shared_bytes};
pub use attend::on_one_thread;
pub use cache::{KvCache, Restored};
pub use error::{Error, Result};
pub use footprint::Footprint;
pub use kernels::Precision;
pub use merge_pair::{MergedPair, PairStates, merge_pair};
pub use methods::{
    CacheSpec, Fp8, Full, H2o, Kivi, Latent, METHODS, MaxNorm, Mean, MethodInfo, MiniCache, Pairing, RankOne,
    Rtn, Sinks, SmoothQuant, build,
};
pub use resources::{Resources, Rotary};
pub use settings::ModelShape;
pub use steps::{StepTime, time_steps};
pub use store::{Scheme, Side, Store, StoreBytes};
pub use synthetic::{LayerSimilarity, Synthetic};
