//! Rows of finished cells that are not in `cells.csv` yet: a file for each cell, so that no two processes write to one.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Made, Result, Row, files, reading, writing};

/// The folder of these files in an experiment's.
pub(super) const UNMERGED: &str = ".unmerged";

/// A finished cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Unmerged {
    pub(super) key: String,
    pub(super) rows: Vec<Row>,
    /// Who made them.
    pub(super) made: Made,
}

impl Unmerged {
    /// Leaves the cell for whoever merges next.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        files::put_json(&dir.join(UNMERGED), &self.key, self)
    }
}

/// What is there, in the order of keys.
pub(super) fn read(dir: &Path) -> Result<Vec<Unmerged>> {
    files::read_json_folder(&dir.join(UNMERGED))
}

/// Removes cells that are in `cells.csv` now.
pub(super) fn remove<'k>(dir: &Path, keys: impl Iterator<Item = &'k str>) -> Result<()> {
    let folder = dir.join(UNMERGED);
    for key in keys {
        let path = folder.join(format!("{key}.json"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(writing(&path)(e)),
            _ => {}
        }
    }
    // Whoever needs it again makes it again.
    match fs::remove_dir(&folder) {
        Err(e) if ![ErrorKind::NotFound, ErrorKind::DirectoryNotEmpty].contains(&e.kind()) => {
            Err(reading(&folder)(e))
        }
        _ => Ok(()),
    }
}
