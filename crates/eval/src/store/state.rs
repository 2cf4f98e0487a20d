//! An experiment's results folder as it stands, for who asks how far it has come.

use std::path::Path;

use indexmap::IndexMap;

use super::cells::{CELLS, MADE};
use super::claim::claims;
use super::failed::{self, FailedCell};
use super::{Result, Row, Seen, files, unmerged};

/// What is finished, at work and failed, of any plan, by the keys of cells.
#[derive(Debug, Default)]
pub struct State {
    /// Rows of finished cells.
    pub done: IndexMap<String, Vec<Row>>,
    /// Cells that are claimed, with whose claim it is, gone or not.
    pub claimed: Vec<(String, Seen)>,
    /// Cells that failed.
    pub failed: Vec<FailedCell>,
}

impl State {
    /// Reads the folder `dir`; in one that is not there nothing has been done.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn read(dir: &Path) -> Result<Self> {
        // In the order in which a cell goes through them, so that none is missed.
        let claimed = claims(dir)?;
        let failed = failed::read(dir)?;
        let new = unmerged::read(dir)?;
        let mut done = files::read_cells(&dir.join(CELLS))?;
        let made = files::read_made(&dir.join(MADE))?;
        done.retain(|key, _| made.get(key).is_none_or(|m| !m.outdated));
        done.extend(new.into_iter().map(|cell| (cell.key, cell.rows)));
        Ok(Self { done, claimed, failed })
    }
}
