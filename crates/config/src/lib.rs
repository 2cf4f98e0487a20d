//! The one configuration format: caches, models, tasks, experiments and sweeps.
//!
//! The same types are read from `experiments/*.toml`, from `--cache` and `--set` on the command line, and are
//! written into result rows. Every error names the file, the line and the key, and says what is allowed.

pub mod atomic;
pub mod bounds;
mod claim;
pub mod columns;
mod error;
mod experiment;
mod foreign;
pub mod guard;
mod plan;
pub mod python_json;
mod run_info;
mod slurm;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use claim::{Claim, Needs, Which};
pub use error::{ConfigError, Result};
pub use experiment::{
    ALIGN_LEVEL, Accuracy, Align, Bench, Experiment, Fidelity, Kind, ModelSettings, Paper, Plot, PlotKind,
    Profile, Similarity, Variant, WeightMode, parse_value,
};
pub use foreign::{lfs_pointer, not_text, read_text, utf8};
pub use guard::guard;
pub use minicache_core::settings::{escaped, shown, toml_from_str};
pub use plan::{Cell, cells};
pub use run_info::{ModelInfo, RunInfo};
pub use slurm::{Gpus, Slurm};
