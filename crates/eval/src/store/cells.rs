//! `cells.csv`: the finished cells of a plan first, in its order, then those of other plans.
//!
//! Rows of other models, tasks, variants and swept values stand side by side with the plan's. Those that go by the same
//! names as a cell of the plan (computed with another limit, say) give way to it once it is finished: they are set aside
//! in `other-cells.jsonl`, from where a later plan takes them back. Until then they stay, as do the old rows of a cell
//! that is computed anew, so a run that is stopped loses no row.
//!
//! Several processes may have the folder open, each with a plan of its own. What one knows of the others is what was
//! there at its last look ([`Store::refresh`]).

mod merge;
mod names;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use indexmap::IndexMap;

use self::merge::Cadence;
use self::names::name;
use super::claim::Claim;
use super::failed::{self, FailedCell};
use super::files::{self, Cells};
use super::samples::{self, FOLDER, Samples};
use super::unmerged::{self, Unmerged};
use super::{Made, Result, Row, Worker, tidy, writing};

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
    /// Which finished cells count, and the id of the results folder.
    reuse: (Reuse, Option<String>),
    provenance: Provenance,
    /// The planned cells are computed anew, whatever there is.
    anew: bool,
    /// `None` before [`Store::begin`].
    work: Option<Work>,
}

/// The part that this process has in the work on a folder.
#[derive(Debug)]
struct Work {
    worker: Arc<Worker>,
    /// Cells that it has claimed, by key.
    held: HashMap<String, Arc<Claim>>,
    cadence: Cadence,
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
            rows: Cells::new(),
            aside: Cells::new(),
            made: BTreeMap::new(),
            reuse: (Reuse::Any, None),
            provenance: Provenance::default(),
            anew: false,
            work: None,
        };
        store.refresh()?;
        Ok(store)
    }

    /// Takes of the finished cells only those that `reuse` lets pass, for the results folder with the id `clone`: the
    /// others are computed again, and their rows replaced as each is finished.
    #[must_use]
    pub fn reusing(mut self, reuse: Reuse, clone: Option<&str>) -> Self {
        self.reuse = (reuse, clone.map(str::to_string));
        let Self { done, made, reuse, .. } = &mut self;
        done.retain(|key| passes(reuse, made.get(key)));
        self
    }

    /// Makes the folder ready for work by `provenance`, of `worker`. With `fresh` the planned cells start anew, finished
    /// or not; their rows stay until each is finished again.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn begin(&mut self, fresh: bool, provenance: Provenance, worker: &Arc<Worker>) -> Result<()> {
        (self.provenance, self.anew) = (provenance, fresh);
        self.work = Some(Work { worker: worker.clone(), held: HashMap::new(), cadence: Cadence::default() });
        fs::create_dir_all(&self.dir).map_err(writing(&self.dir))?;
        if fresh { self.renew() } else { self.settle() }
    }

    /// Looks at what is there by now.
    ///
    /// # Errors
    /// Files that cannot be read, or that are no results.
    pub fn refresh(&mut self) -> Result<()> {
        // Before `cells.csv`: what has left this is in that.
        let unmerged = unmerged::read(&self.dir)?;
        self.read(&unmerged)?;
        self.made.extend(unmerged.into_iter().map(|cell| (cell.key, cell.made)));
        Ok(())
    }

    /// Reads the files, and takes in the cells `unmerged`, but not who made them.
    fn read(&mut self, unmerged: &[Unmerged]) -> Result<()> {
        self.rows = files::read_cells(&self.dir.join(CELLS))?;
        self.aside = files::read_aside(&self.dir.join(ASIDE))?;
        self.made = files::read_made(&self.dir.join(MADE))?;
        for cell in unmerged {
            self.rows.insert(cell.key.clone(), cell.rows.clone());
        }
        for (key, names) in &self.plan {
            if !self.rows.contains_key(key)
                && let Some(rows) = self.aside.get(key)
            {
                self.rows.insert(key.clone(), rows.clone());
            }
            let Some(rows) = self.rows.get_mut(key) else {
                self.done.remove(key);
                continue;
            };
            name(rows, key, names);
            if self.done.contains(key) {
                continue;
            }
            let count = rows.first().and_then(|r| r.get("samples")?.parse().ok()).unwrap_or(0);
            let new = unmerged.iter().find(|cell| cell.key == *key).map(|cell| &cell.made);
            let made = new.or_else(|| self.made.get(key));
            let outdated = made.is_some_and(|m| m.outdated) || !passes(&self.reuse, made);
            if !outdated && samples::are_sound(&samples_path(&self.dir, key), key, count)? {
                self.done.insert(key.clone());
            }
        }
        Ok(())
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

    /// Seconds that a planned cell took when it was computed before on `device` (empty: the host), here or where the rows
    /// come from.
    pub fn seconds(&self, key: &str, device: &str) -> Option<f64> {
        let there = self.made.get(key).map_or("", |made| &made.device);
        let rows = self.rows.get(key).filter(|_| there == device)?;
        rows.iter().filter_map(|row| row.get("seconds")?.parse().ok()).reduce(f64::max)
    }

    /// Claims a cell for this process; gives whether it has it. One that is finished may be claimed too.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn claim(&mut self, key: &str) -> Result<bool> {
        let Some(work) = &mut self.work else { return Ok(true) };
        if work.held.contains_key(key) {
            return Ok(true);
        }
        let claim = Claim::take(&self.dir, key, &work.worker)?;
        Ok(claim.map(|claim| work.held.insert(key.to_string(), Arc::new(claim))).is_some())
    }

    /// Whether this process has claimed a cell.
    pub fn holds(&self, key: &str) -> bool {
        self.claim_of(key).is_some()
    }

    /// Gives a claim back.
    pub fn release(&mut self, key: &str) {
        if let Some(work) = &mut self.work {
            work.held.remove(key);
        }
    }

    /// Records finished cells, gives their claims back, and merges what has waited long enough to be. A cell that
    /// another process has taken over is left to that.
    ///
    /// # Errors
    /// A file that cannot be written; the cells finished before stay.
    pub fn finish(&mut self, cells: impl IntoIterator<Item = (String, Vec<Row>)>) -> Result<()> {
        for (key, mut rows) in cells {
            if self.claim_of(&key).is_some_and(|claim| !claim.holds()) {
                self.release(&key);
                continue;
            }
            if let Some(names) = self.plan.get(&key) {
                name(&mut rows, &key, names);
            }
            let made = self.maker(&key);
            let cell = Unmerged { key, rows, made };
            cell.write(&self.dir)?;
            self.release(&cell.key);
            self.rows.insert(cell.key.clone(), cell.rows);
            self.made.insert(cell.key.clone(), cell.made);
            self.done.insert(cell.key);
        }
        self.merge_if_due()
    }

    /// Sets down that a cell failed, and gives its claim back.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn fail(&mut self, cell: &FailedCell) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(writing(&self.dir))?;
        cell.write(&self.dir)?;
        self.release(&cell.key);
        Ok(())
    }

    /// The cells that failed since this process is at work.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn failed_meanwhile(&self) -> Result<Vec<FailedCell>> {
        let since = self.work.as_ref().map_or(SystemTime::UNIX_EPOCH, |work| work.worker.began());
        let mut new = failed::read(&self.dir)?;
        let mut error = None;
        new.retain(|cell| match failed::when(&self.dir, &cell.slot) {
            Ok(when) => when.is_some_and(|when| when >= since),
            Err(e) => error.replace(e).is_some(),
        });
        error.map_or(Ok(new), Err)
    }

    /// The cells that failed and were not computed since, of any plan.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn failures(&self) -> Result<Vec<FailedCell>> {
        failed::read(&self.dir)
    }

    /// Forgets that the cell `slot` failed: it is finished.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn forget_failure(&self, slot: &str) -> Result<()> {
        failed::forget(&self.dir, slot)
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
    /// [`super::digest`]). What it lacks comes from the same cell of the experiments beside this one, which share their
    /// full cache and often their middle setting; not where the cell is computed anew.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn samples<T: serde::Serialize + serde::de::DeserializeOwned>(
        &self,
        key: &str,
        of: Vec<String>,
    ) -> Result<Samples<T>> {
        let mut samples = Samples::open(&self.samples_path(key), key, of, self.claim_of(key).cloned())?;
        let anew = self.anew || self.made.get(key).is_some_and(|made| made.outdated);
        if !anew && !samples.is_whole() {
            for beside in self.dir.parent().map_or_else(|| Ok(Vec::new()), tidy::folders)? {
                samples.adopt(&samples_path(&beside, key))?;
            }
        }
        Ok(samples)
    }

    fn claim_of(&self, key: &str) -> Option<&Arc<Claim>> {
        self.work.as_ref()?.held.get(key)
    }

    fn maker(&self, key: &str) -> Made {
        let Provenance { made, data } = &self.provenance;
        let task = self.plan.get(key).and_then(|names| names.get("task"));
        Made { data: task.and_then(|t| data.get(t)).cloned().unwrap_or_default(), ..made.clone() }
    }
}

/// Whether a finished cell counts, by who made it.
fn passes((reuse, clone): &(Reuse, Option<String>), made: Option<&Made>) -> bool {
    *reuse == Reuse::Any || clone.as_ref().is_some_and(|id| made.is_some_and(|m| m.clone == *id))
}

fn samples_path(dir: &Path, key: &str) -> PathBuf {
    dir.join(FOLDER).join(format!("{key}.jsonl"))
}
