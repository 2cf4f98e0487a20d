//! What `minicache submit` leaves beside the results of a sweep: who computes what. Its tasks and `status` read it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use indexmap::IndexMap;
use minicache_config::atomic;
use serde::{Deserialize, Serialize};

use crate::failure::OrUsage;

/// The folder of submitted sweeps in a results folder.
pub(crate) const JOBS: &str = ".jobs";
const FILE: &str = "shares.json";

/// A sweep that was submitted.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Shares {
    /// The call.
    pub(crate) command: String,
    /// When.
    pub(crate) since: String,
    /// The jobs, as `sbatch` has numbered them; empty until then.
    pub(crate) jobs: Vec<String>,
    /// Cells by the experiment's results folder, below the results folder: slot to what it is, finished ones too.
    pub(crate) experiments: IndexMap<PathBuf, IndexMap<String, Planned>>,
    /// The tasks, in order.
    pub(crate) tasks: Vec<Share>,
}

/// A cell.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Planned {
    /// Model, task, variant and swept values.
    pub(crate) cell: String,
    /// Estimated seconds.
    pub(crate) seconds: f64,
}

/// One task's.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Share {
    /// Estimated seconds.
    pub(crate) seconds: f64,
    /// Models that it loads.
    pub(crate) models: Vec<String>,
    /// Its cells, by slot.
    pub(crate) cells: Vec<String>,
}

impl Shares {
    /// The file in the folder `dir` of a sweep.
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join(FILE)
    }

    /// Reads the file at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = minicache_config::read_text(path)?;
        serde_json::from_str(&text)
            .or_usage(format!("{}: is not what `minicache submit` writes", path.display()))
    }

    /// Writes the file into the folder `dir`.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        atomic::replace(&Self::path(dir), &bytes)
            .map_err(|e| anyhow::anyhow!("cannot write {}: {e}", Self::path(dir).display()))
    }

    /// The sweeps that were submitted for the results folder `results`, the last one last.
    pub(crate) fn all(results: &Path) -> Vec<Self> {
        let folders = std::fs::read_dir(results.join(JOBS)).into_iter().flatten();
        let mut dirs: Vec<PathBuf> = folders.filter_map(|entry| Some(entry.ok()?.path())).collect();
        dirs.sort();
        // One that is being written now, or was left half made, is none.
        dirs.into_iter().filter_map(|dir| Self::read(&Self::path(&dir)).ok()).collect()
    }
}
