//! Cells that could not be computed, and why: a file for each, until it is computed.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Result, files, reading, writing};

/// The folder of these files in an experiment's.
pub(super) const FAILED: &str = ".failed";

/// A cell that could not be computed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FailedCell {
    /// What it goes by, whatever its model and data are: see [`crate::run::slot`].
    pub slot: String,
    /// Its key; empty where not even that is known, because its model is missing.
    pub key: String,
    /// Model, task, variant and swept values.
    pub cell: String,
    /// What happened, in a line.
    pub error: String,
    /// The machine.
    pub host: String,
    /// When.
    pub since: String,
}

impl FailedCell {
    /// Sets down that the cell failed, in the experiment's folder `dir`.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        files::put_json(&dir.join(FAILED), &self.slot, self)
    }
}

/// The cells of the experiment's folder `dir` that failed.
pub(super) fn read(dir: &Path) -> Result<Vec<FailedCell>> {
    files::read_json_folder(&dir.join(FAILED))
}

/// When the cell failed, by the file system's time.
pub(super) fn when(dir: &Path, slot: &str) -> Result<Option<SystemTime>> {
    let path = dir.join(FAILED).join(format!("{slot}.json"));
    match fs::File::open(&path).and_then(|file| file.metadata()?.modified()) {
        Ok(when) => Ok(Some(when)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(reading(&path)(e)),
    }
}

/// Forgets that the cell failed.
pub(super) fn forget(dir: &Path, slot: &str) -> Result<()> {
    let folder = dir.join(FAILED);
    let path = folder.join(format!("{slot}.json"));
    match fs::remove_file(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        removed => removed.map_err(writing(&path))?,
    }
    // The last one takes the folder along.
    let _ = fs::remove_dir(&folder);
    Ok(())
}
