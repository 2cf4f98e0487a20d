//! An experiment's results folder as it stands, for who reads it without running anything.

use std::collections::BTreeMap;
use std::path::Path;

use indexmap::IndexMap;

use super::cells::{CELLS, MADE};
use super::{Made, Result, Row, files};

/// The rows of an experiment's results folder, of any plan.
#[derive(Debug, Default)]
pub struct Finished {
    /// Rows by the key of their cell, in the order of the file.
    pub cells: IndexMap<String, Vec<Row>>,
    /// Who made the rows of a cell, as far as that is known.
    pub made: BTreeMap<String, Made>,
}

impl Finished {
    /// Reads the folder `dir`; one that is not there has no rows.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(Self { cells: files::read_cells(&dir.join(CELLS))?, made: files::read_made(&dir.join(MADE))? })
    }
}
