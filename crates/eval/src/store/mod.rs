//! Results on disk: `cells.csv` with an experiment's finished cells, `made.json` with who made each of them, and
//! per-sample files that let a stopped run go on. Many processes may share a results folder (see [`Worker`]): each cell
//! is claimed by one, which alone appends to its per-sample file and leaves its rows in a file of their own
//! (`.unmerged/<key>.json`); whoever comes to it merges those into `cells.csv`, one at a time.
//!
//! Files that are written as a whole are replaced as a whole (see [`minicache_config::atomic`]), so that a reader or a
//! killed run sees either the old or the new file; per-sample files are appended to, every line with a check of its
//! own.

mod cells;
mod claim;
mod error;
mod failed;
mod files;
mod finished;
mod folder;
mod made;
mod samples;
mod state;
mod tidy;
mod unmerged;
mod worker;

use indexmap::IndexMap;

pub use cells::{Provenance, Reuse, Store};
pub use error::StoreError;
pub use failed::FailedCell;
pub use finished::Finished;
pub use folder::{check_folder, clone_id, make_clone_id};
pub use made::{Made, machine, processor, today};
pub use samples::{Samples, digest};
pub use state::State;
pub use worker::{Holder, LIMIT, Seen, Worker, limit, workers};

use error::{Result, reading, writing};
use failed::FAILED;
use unmerged::UNMERGED;

/// The folder below a results folder for rows measured on the bundled sample.
pub const SAMPLE: &str = "sample";

/// The column with a cell's key.
pub const KEY: &str = "key";

/// One row of `cells.csv`: column to text.
pub type Row = IndexMap<String, String>;
