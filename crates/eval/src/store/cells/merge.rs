//! Merging: rows of finished cells into `cells.csv`, by one process at a time.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use super::{ASIDE, MADE, Store};
use crate::store::files;
use crate::store::unmerged;
use crate::store::{Made, Result, StoreError, writing};

/// What a merge is claimed by.
const MERGE: &str = "merge";
/// Of the time between two merges one takes this share at most.
const SHARE: u32 = 10;

/// When the last merge was, and how long it took.
#[derive(Debug, Default)]
pub(super) struct Cadence(Option<(Instant, Duration)>);

impl Cadence {
    fn is_due(&self) -> bool {
        self.0.is_none_or(|(end, took)| end.elapsed() >= took * SHARE)
    }
}

impl Store {
    /// Does `work` while no other process merges into this folder or writes what goes with its rows.
    ///
    /// # Errors
    /// Of `work`; a folder that cannot be written to.
    pub fn alone<T, E: From<StoreError>>(
        &mut self,
        work: impl FnOnce(&mut Self) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match self.work.as_ref().map(|w| w.worker.clone()) {
            Some(worker) => worker.alone(&self.dir.clone(), MERGE, || work(self)),
            None => work(self),
        }
    }

    /// Merges all that is finished.
    ///
    /// # Errors
    /// Files that cannot be read or written; what was finished stays.
    pub fn settle(&mut self) -> Result<()> {
        self.alone(Self::merge)
    }

    /// Merges, unless another process does or the last merge is not long ago.
    pub(super) fn merge_if_due(&mut self) -> Result<()> {
        let Some(work) = self.work.as_ref().filter(|work| work.cadence.is_due()) else { return Ok(()) };
        let Some(claim) = super::Claim::take(&self.dir, MERGE, &work.worker)? else { return Ok(()) };
        let merged = self.merge();
        drop(claim);
        merged
    }

    /// Starts the planned cells anew.
    pub(super) fn renew(&mut self) -> Result<()> {
        self.alone(|store| {
            store.merge()?;
            store.done.clear();
            for key in store.plan.keys().filter(|key| store.rows.contains_key(*key)) {
                store.made.entry(key.clone()).or_default().outdated = true;
            }
            // Before the samples go: a run that is stopped between them is still one to be computed anew.
            files::write_made(&store.dir.join(MADE), &store.made)?;
            for key in store.plan.keys() {
                let path = store.samples_path(key);
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(writing(&path)(e)),
                    _ => {}
                }
            }
            Ok(())
        })
    }

    /// Takes in what all have finished and writes everything, so that a kill between any two writes loses no row: a file
    /// of an unmerged cell goes last.
    fn merge(&mut self) -> Result<()> {
        let start = Instant::now();
        let unmerged = unmerged::read(&self.dir)?;
        self.read(&unmerged)?;
        let (cells, aside, made) = (self.cells_path(), self.dir.join(ASIDE), self.dir.join(MADE));
        // What leaves a file is in the other one before.
        for key in self.outnamed() {
            if let Some(rows) = self.rows.shift_remove(&key) {
                self.aside.insert(key, rows);
            }
        }
        files::write_aside(&aside, &self.aside)?;
        // Who made a row is known once the row is there; and who made an old one not before it is replaced.
        let new: BTreeMap<String, Made> = unmerged.into_iter().map(|cell| (cell.key, cell.made)).collect();
        for (key, made) in &new {
            self.made.entry(key.clone()).or_insert_with(|| made.clone());
        }
        files::write_made(&made, &self.made)?;
        let others = self.rows.iter().filter(|(key, _)| !self.plan.contains_key(*key));
        let ordered = self.plan.keys().filter_map(|key| self.rows.get(key));
        let all = ordered.chain(others.map(|(_, rows)| rows)).flatten();
        files::write_cells(&cells, &self.columns(), all)?;
        self.made.extend(new.iter().map(|(key, made)| (key.clone(), made.clone())));
        self.aside.retain(|key, _| !self.rows.contains_key(key));
        self.made.retain(|key, _| self.rows.contains_key(key) || self.aside.contains_key(key));
        files::write_made(&made, &self.made)?;
        files::write_aside(&aside, &self.aside)?;
        unmerged::remove(&self.dir, new.keys().map(String::as_str))?;
        if let Some(work) = &mut self.work {
            work.cadence = Cadence(Some((Instant::now(), start.elapsed())));
        }
        Ok(())
    }
}
