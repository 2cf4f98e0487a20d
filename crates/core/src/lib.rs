#![doc = include_str!("../README.md")]
//!
//! Layouts: slices are f32, contiguous and token-major, `(tokens, heads, head_dim)`, as a linear layer writes them.

mod account;
mod angles;
pub mod archive;
mod attend;
mod backend;
mod batch;
mod cache;
mod dense;
mod eigen;
mod error;
mod evicting;
mod factored;
mod footprint;
mod kept;
pub mod kernels;
mod lane;
pub mod latent;
mod layered;
mod low_rank;
mod magnitudes;
pub mod merge;
mod merge_pair;
mod methods;
mod observed;
mod pair;
mod plain;
mod received;
mod resources;
mod retain;
mod scaled;
mod scratch;
mod sequence;
pub mod settings;
mod states;
mod steps;
pub mod store;
mod synthetic;
mod turned;
mod vectors;
mod view;

pub use account::{Nominal, footprint, nominal, shared_bytes};
pub use attend::on_one_thread;
pub use backend::{Backend, BackendStep, Host, shape_of_step};
pub use batch::Batch;
pub use cache::{KvCache, Restored};
pub use error::{Error, Result};
pub use evicting::DROPPED;
pub use footprint::Footprint;
pub use kernels::Precision;
pub use magnitudes::Magnitudes;
pub use merge_pair::{MergedPair, PairStates, merge_pair};
pub use methods::{
    CacheSpec, ExpectedAttention, Fp8, Full, H2o, Kivi, Latent, METHODS, MaxNorm, Mean, MethodInfo,
    MiniCache, Pairing, RankOne, Rotated, Rtn, Sinks, SmoothQuant, SnapKv, TurboQuant, Xkv, build,
};
pub use observed::{LayerStates, observed, observed_steps};
pub use pair::DECIDED;
pub use resources::{Resources, Rotary};
pub use sequence::Sequence;
pub use settings::ModelShape;
pub use states::GONE;
pub use states::States;
pub use steps::{StepTime, time_steps};
pub use store::{BlockLayout, CodeLayout, Scheme, SectionLayout, Side, Store, StoreBytes, StoreCount};
pub use synthetic::{LayerSimilarity, Synthetic};
pub use view::{HeadView, LayerView, Segment, SideView};
