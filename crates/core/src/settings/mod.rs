//! Settings of caches: what they are called, what they may be, and how they are written.
//!
//! The settings of a method stand in the method's own file; here is what several methods share.

pub mod bounds;
mod calibration;
#[cfg(feature = "toml")]
mod depth;
mod error;
#[cfg(feature = "serde")]
pub(crate) mod fields;
mod latent;
mod pairs;
mod quant;
mod shape;
mod shown;
#[cfg(feature = "toml")]
mod text;
pub(crate) mod word;

pub use calibration::Calibration;
#[cfg(feature = "toml")]
pub use depth::{is_deep, toml_from_str};
pub use error::SettingError;
pub use latent::{Group, Heads, LatentSide, Rank};
pub use pairs::{
    ChosenPairs, Granularity, KeySpace, MergeSides, Pairs, Retention, RetentionRule, StartLayer,
};
pub use quant::{Axis, Budget, Quant, StoreType};
pub use shape::{LayerSet, ModelShape};
pub use shown::{escaped, shown, within};
#[cfg(feature = "toml")]
pub use text::Unread;

/// What a check comes to.
pub type Checked = std::result::Result<(), SettingError>;
