//! Results on disk: `cells.csv` with an experiment's finished cells, `made.json` with who made each of them, and
//! per-sample files that let a stopped run go on. One process at a time owns a results folder (see [`Owner`]).
//!
//! Files that are written as a whole are replaced as a whole (see [`minicache_config::atomic`]), so that a reader or a
//! killed run sees either the old or the new file; per-sample files are appended to, every line with a check of its
//! own.

mod cells;
mod error;
mod files;
mod finished;
mod lock;
mod made;
mod samples;

use indexmap::IndexMap;

pub use cells::{Provenance, Reuse, Store};
pub use error::StoreError;
pub use finished::Finished;
pub use lock::{Owner, check_folder, clone_id, make_clone_id};
pub use made::{Made, machine, today};
pub use samples::{Samples, digest};

use error::{Result, reading, writing};

/// The folder below a results folder for rows measured on the bundled sample.
pub const SAMPLE: &str = "sample";

/// The column with a cell's key.
pub const KEY: &str = "key";

/// One row of `cells.csv`: column to text.
pub type Row = IndexMap<String, String>;
