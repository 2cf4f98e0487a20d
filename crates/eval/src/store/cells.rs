//! `cells.csv`: the finished cells of a plan first, in its order, then those of other plans.
//!
//! Rows of other models, tasks, variants and swept values stand side by side with the plan's. Those that go by the same
//! names as a cell of the plan (computed with another limit, say) give way to it once it is finished: they are set aside
//! in `other-cells.jsonl`, from where a later plan takes them back. Until then they stay, as do the old rows of a cell
//! that is computed anew, so a run that is stopped loses no row.

mod names;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use self::names::{name, names};
use super::files::{self, Cells};
use super::samples::{self, FOLDER, Samples};
use super::{Made, Result, Row, writing};

pub(super) const CELLS: &str = "cells.csv";
const ASIDE: &str = "other-cells.jsonl";
pub(super) const MADE: &str = "made.json";

/// Which finished cells are taken as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// All of them.
    #[default]
    Any,
    /// Those that were computed for this results folder, and none that came with the checkout.
    Own,
}

/// Who makes the rows of a run.
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    /// What all have in common.
    pub made: Made,
    /// Where each task's data came from.
    pub data: IndexMap<String, String>,
}

/// The results folder of one experiment, opened for one plan.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Planned cells in order, each key once.
    plan: IndexMap<String, Row>,
    /// Columns of what is measured.
    measured: Vec<String>,
    /// Planned cells that are finished.
    done: HashSet<String>,
    /// What stands in `cells.csv`, or is about to: of any plan.
    rows: Cells,
    /// What stands in `other-cells.jsonl`.
    aside: Cells,
    made: BTreeMap<String, Made>,
    provenance: Provenance,
}

impl Store {
    /// Opens the folder `dir` for the cells `plan`: keys in order, each with the columns that say what the cell is
    /// (model, task, names, swept values). These head the file, `columns` with what is measured follow. The naming
    /// columns of finished cells are brought up to date, so a renamed variant needs no new run. Nothing is written
    /// before [`Store::begin`].
    ///
    /// A cell is finished where its rows are there and are not outdated, and where its per-sample file, if there is one,
    /// is undamaged.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn open(dir: &Path, plan: &[(String, Row)], columns: &[&str]) -> Result<Self> {
        let mut unique = IndexMap::new();
        for (key, names) in plan {
            unique.entry(key.clone()).or_insert_with(|| names.clone());
        }
        let mut store = Self {
            dir: dir.to_path_buf(),
            plan: unique,
            measured: columns.iter().map(|c| (*c).to_string()).collect(),
            done: HashSet::new(),
            rows: files::read_cells(&dir.join(CELLS))?,
            aside: files::read_aside(&dir.join(ASIDE))?,
            made: files::read_made(&dir.join(MADE))?,
            provenance: Provenance::default(),
        };
        for (key, names) in &store.plan {
            if !store.rows.contains_key(key)
                && let Some(rows) = store.aside.get(key)
            {
                store.rows.insert(key.clone(), rows.clone());
            }
            let Some(rows) = store.rows.get_mut(key) else { continue };
            name(rows, key, names);
            let count = rows.first().and_then(|r| r.get("samples")?.parse().ok()).unwrap_or(0);
            let outdated = store.made.get(key).is_some_and(|m| m.outdated);
            if !outdated && samples::are_sound(&samples_path(dir, key), key, count)? {
                store.done.insert(key.clone());
            }
        }
        Ok(store)
    }

    /// Takes of the finished cells only those that `reuse` lets pass, for the results folder with the id `clone`: the
    /// others are computed again, and their rows replaced as each is finished.
    #[must_use]
    pub fn reusing(mut self, reuse: Reuse, clone: Option<&str>) -> Self {
        if reuse == Reuse::Own {
            let made = &self.made;
            self.done.retain(|key| clone.is_some_and(|id| made.get(key).is_some_and(|m| m.clone == id)));
        }
        self
    }

    /// Makes the folder ready for work by `provenance`. With `fresh` the planned cells start anew, finished or not; their
    /// rows stay until each is finished again.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn begin(&mut self, fresh: bool, provenance: Provenance) -> Result<()> {
        self.provenance = provenance;
        fs::create_dir_all(&self.dir).map_err(writing(&self.dir))?;
        if fresh {
            self.done.clear();
            for key in self.plan.keys().filter(|key| self.rows.contains_key(*key)) {
                self.made.entry(key.clone()).or_default().outdated = true;
            }
            // Before the samples go: a run that is stopped between them is still one to be computed anew.
            files::write_made(&self.dir.join(MADE), &self.made)?;
            for key in self.plan.keys() {
                let path = self.samples_path(key);
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(writing(&path)(e)),
                    _ => {}
                }
            }
        }
        self.save(&[])
    }

    /// Whether the cell is finished.
    pub fn is_done(&self, key: &str) -> bool {
        self.done.contains(key)
    }

    /// Rows of a finished cell.
    pub fn rows(&self, key: &str) -> Option<&[Row]> {
        self.rows.get(key).filter(|_| self.is_done(key)).map(Vec::as_slice)
    }

    /// Who made the rows of a cell; `None` where that is not known.
    pub fn made(&self, key: &str) -> Option<&Made> {
        self.made.get(key)
    }

    /// The values of a naming column in the rows of other plans.
    pub fn others<'a>(&'a self, column: &'a str) -> impl Iterator<Item = &'a str> {
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        others.filter_map(move |(_, rows)| rows.first()?.get(column).map(String::as_str))
    }

    /// Seconds that a planned cell took when it was computed before: in its own rows, or in rows that go by its names
    /// (of other limits or data).
    pub fn seconds(&self, key: &str) -> Option<f64> {
        let named = names(self.plan.get(key)?);
        let alike = |rows: &&Vec<Row>| rows.first().is_some_and(|row| names(row) == named);
        let rows =
            self.rows.get(key).or_else(|| self.rows.values().chain(self.aside.values()).find(alike))?;
        rows.iter().filter_map(|row| row.get("seconds")?.parse().ok()).reduce(f64::max)
    }

    /// Records finished cells, all of them in one atomic write.
    ///
    /// # Errors
    /// The file cannot be written; the cells finished before stay.
    pub fn finish(&mut self, cells: impl IntoIterator<Item = (String, Vec<Row>)>) -> Result<()> {
        let mut new = Vec::new();
        for (key, mut rows) in cells {
            if let Some(names) = self.plan.get(&key) {
                name(&mut rows, &key, names);
            }
            self.rows.insert(key.clone(), rows);
            self.done.insert(key.clone());
            new.push(key);
        }
        self.save(&new)
    }

    /// The cells file.
    pub fn cells_path(&self) -> PathBuf {
        self.dir.join(CELLS)
    }

    /// The per-sample file of a cell.
    pub fn samples_path(&self, key: &str) -> PathBuf {
        samples_path(&self.dir, key)
    }

    /// Opens a cell's per-sample file with what earlier runs left in it of the samples that are computed from `of` (see
    /// [`super::digest`]).
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn samples<T: serde::Serialize + serde::de::DeserializeOwned>(
        &self,
        key: &str,
        of: Vec<String>,
    ) -> Result<Samples<T>> {
        Samples::open(&self.samples_path(key), key, of)
    }

    /// Writes everything, so that a kill between any two writes loses no row. `new` are the cells that have just been
    /// finished.
    fn save(&mut self, new: &[String]) -> Result<()> {
        let (cells, aside, made) = (self.cells_path(), self.dir.join(ASIDE), self.dir.join(MADE));
        // What leaves a file is in the other one before.
        for key in self.outnamed() {
            if let Some(rows) = self.rows.shift_remove(&key) {
                self.aside.insert(key, rows);
            }
        }
        files::write_aside(&aside, &self.aside)?;
        // Who made a row is known once the row is there; and who made an old one not before it is replaced.
        for key in new {
            if !self.made.contains_key(key) {
                self.made.insert(key.clone(), self.maker(key));
            }
        }
        files::write_made(&made, &self.made)?;
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        let ordered = self.plan.keys().filter_map(|key| self.rows.get(key));
        let all = ordered.chain(others.map(|(_, rows)| rows)).flatten();
        files::write_cells(&cells, &self.columns(), all)?;
        for key in new {
            self.made.insert(key.clone(), self.maker(key));
        }
        self.aside.retain(|key, _| !self.rows.contains_key(key));
        self.made.retain(|key, _| self.rows.contains_key(key) || self.aside.contains_key(key));
        files::write_made(&made, &self.made)?;
        files::write_aside(&aside, &self.aside)
    }

    fn maker(&self, key: &str) -> Made {
        let Provenance { made, data } = &self.provenance;
        let task = self.plan.get(key).and_then(|names| names.get("task"));
        Made { data: task.and_then(|t| data.get(t)).cloned().unwrap_or_default(), ..made.clone() }
    }
}

fn samples_path(dir: &Path, key: &str) -> PathBuf {
    dir.join(FOLDER).join(format!("{key}.jsonl"))
}
