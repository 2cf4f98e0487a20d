//! Which cells are a run's: its share, what of it is open and can be claimed, and what others have.

use std::time::Duration;

use minicache_config::{Cell, Kind};

use super::input::Input;
use super::plan::Planned;
use super::share::{self, slot};
use super::work::Run;
use super::{Failure, Result, RunError, accuracy};
use crate::store::FailedCell;

/// Cells that are claimed and go through a model together, at most: as many as have one step of decoding in common.
const TOGETHER: usize = 48;
/// Of what is open each of several runs claims at a time, divided by their number, this part.
const PART: usize = 2;
/// Between two looks at what others do.
const BETWEEN: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

impl<'a> Run<'a> {
    /// The cells of the plan that are this run's.
    pub(super) fn mine(&self) -> impl Iterator<Item = &'a Planned> + use<'a> {
        let (plan, share) = (self.plan, self.context.share.as_ref());
        plan.cells.iter().filter(move |p| share.is_none_or(|s| s.has(&slot(plan.experiment, &p.cell))))
    }

    /// Those, and the cells that they are compared with.
    pub(super) fn wanted(&self) -> impl Iterator<Item = &'a Planned> + use<'a> {
        let mine: Vec<&Planned> = self.mine().collect();
        let mut references: Vec<&str> = Vec::new();
        if self.plan.experiment.kind == Kind::Accuracy && self.context.share.is_some() {
            let of = |p: &&Planned| self.plan.reference(&p.cell.model, &p.cell.task).map(|r| r.key.as_str());
            references.extend(mine.iter().filter(|p| self.is_open(p)).filter_map(of));
        }
        let wanted =
            move |p: &&Planned| mine.iter().any(|m| m.key == p.key) || references.contains(&p.key.as_str());
        self.plan.cells.iter().filter(wanted)
    }

    /// Whether the cell is neither finished nor failed.
    fn is_unsettled(&self, p: &Planned) -> bool {
        !self.store.is_done(&p.key) && !self.failed.contains(&p.key)
    }

    /// Whether the cell is to be computed.
    pub(super) fn is_open(&self, p: &Planned) -> bool {
        self.is_unsettled(p) && !self.parked.iter().any(|q| q.key == p.key)
    }

    /// This run's cells that are neither finished nor failed.
    pub(super) fn open(&self) -> Vec<&'a Planned> {
        self.mine().filter(|p| self.is_unsettled(p)).collect()
    }

    /// How many of this run's cells failed.
    pub(super) fn failed(&self) -> usize {
        self.unknown
            + self.mine().filter(|p| self.failed.contains(&p.key) && !self.store.is_done(&p.key)).count()
    }

    /// Whether all cells of the plan are finished.
    pub(super) fn is_whole(&self) -> bool {
        self.unknown == 0 && self.plan.cells.iter().all(|p| self.store.is_done(&p.key))
    }

    /// Claims open ones of `cells`, which are of one model and task, for work on them together: all of them where this run
    /// is alone or has a share of its own, and a part where others may help. None where others have them all.
    pub(super) fn claim(&mut self, cells: &[Planned]) -> Result<Vec<Planned>> {
        self.context.stop.check()?;
        self.store.refresh()?;
        let mut open: Vec<&Planned> = cells.iter().filter(|p| self.is_open(p)).collect();
        let Some(first) = open.first() else { return Ok(Vec::new()) };
        // The others wait for it at their end.
        if let Some(reference) = self.plan.reference(&first.cell.model, &first.cell.task) {
            open.sort_by_key(|p| p.key != reference.key);
        }
        // What is timed side by side stays together.
        let timed = self.plan.experiment.kind == Kind::Throughput;
        let most = match &self.context.worker {
            _ if timed => open.len(),
            Some(worker) if self.context.share.is_none() => match worker.company()? {
                1 => TOGETHER,
                company => open.len().div_ceil(PART * company).min(TOGETHER),
            },
            _ => TOGETHER,
        };
        let mut taken: Vec<Planned> = Vec::new();
        for p in open {
            if taken.len() == most {
                break;
            }
            if self.store.claim(&p.key)? {
                taken.push(p.clone());
            } else if timed {
                break;
            }
        }
        if taken.is_empty() {
            return Ok(taken);
        }
        // What was finished between the look and the claim.
        self.store.refresh()?;
        let (finished, mut taken): (Vec<_>, Vec<_>) =
            taken.into_iter().partition(|p| self.store.is_done(&p.key));
        finished.iter().for_each(|p| self.store.release(&p.key));
        taken.sort_by_key(|p| cells.iter().position(|q| q.key == p.key));
        Ok(taken)
    }

    /// Counts what of `claimed` is finished, and gives the rest back but for cells that only wait for the full cache's.
    pub(super) fn give_back(&mut self, claimed: Vec<Planned>) {
        for p in claimed {
            if self.store.is_done(&p.key) {
                self.settled(&p);
            } else if self.plan.experiment.kind == Kind::Accuracy
                && self.is_unsettled(&p)
                && self.store.holds(&p.key)
            {
                self.parked.push(p);
            } else {
                self.store.release(&p.key);
            }
        }
    }

    /// Counts a cell that this run has finished.
    fn settled(&mut self, p: &Planned) {
        self.computed += usize::from(self.mine().any(|m| m.key == p.key));
        // Worth no failure: the mark is cleared by whoever comes next.
        let _ = self.store.forget_failure(&slot(self.plan.experiment, &p.cell));
    }

    /// Finishes cells that waited for the full cache's, where that is finished or has failed by now.
    pub(super) fn conclude_parked(&mut self) -> Result<()> {
        if self.parked.is_empty() {
            return Ok(());
        }
        self.store.refresh()?;
        let experiment = self.plan.experiment;
        for p in std::mem::take(&mut self.parked) {
            let reference = self.plan.reference(&p.cell.model, &p.cell.task);
            if reference.is_some_and(|r| self.is_unsettled(r)) {
                self.parked.push(p);
                continue;
            }
            if let Some(Input::Documents(suite, documents)) = self.plan.inputs.get(&p.cell.task) {
                accuracy::conclude(experiment, suite, &documents.docs, &[&p], reference, &mut self.store)?;
            }
            if self.store.is_done(&p.key) {
                self.settled(&p);
            }
            self.store.release(&p.key);
        }
        Ok(())
    }

    /// Waits until there is something to do again; false where nothing is left to wait for.
    pub(super) fn wait(&mut self) -> Result<bool> {
        let mut between = BETWEEN;
        loop {
            self.context.stop.check()?;
            self.store.refresh()?;
            self.note_failures()?;
            let open = self.open();
            if open.is_empty() {
                return Ok(false);
            }
            let settled = |p: &Planned| {
                let reference = self.plan.reference(&p.cell.model, &p.cell.task);
                reference.is_none_or(|r| !self.is_unsettled(r))
            };
            if self.parked.iter().any(settled) {
                return Ok(true);
            }
            let mut wanted: Vec<&Planned> = self.wanted().filter(|p| self.is_open(p)).collect();
            // Some of them: who is gone has left more than one, or leaves it to a later look.
            let some = rand::random_range(0..wanted.len().max(1));
            wanted.rotate_left(some);
            for p in wanted.into_iter().take(TOGETHER) {
                if self.store.claim(&p.key)? {
                    return Ok(true);
                }
            }
            if between == BETWEEN {
                self.overall.say(format_args!("waiting for {} cells of other runs", open.len()));
            }
            std::thread::sleep(between);
            between = (between * 2).min(LONGEST);
        }
    }

    /// Takes note of this run's cells that failed elsewhere since it began.
    fn note_failures(&mut self) -> Result<()> {
        for failed in self.store.failed_meanwhile()? {
            let failing = self.wanted().find(|p| p.key == failed.key && self.is_unsettled(p));
            if let Some(p) = failing {
                self.note(&p.key, failed);
            }
        }
        Ok(())
    }

    fn note(&mut self, key: &str, failed: FailedCell) {
        self.failed.insert(key.to_string());
        self.failures.push(Failure { cells: 1, error: RunError::Elsewhere(failed.error) });
    }

    /// Takes note of all cells that failed and were not computed since, whoever tried.
    pub(super) fn note_all_failures(&mut self) -> Result<()> {
        let failed = self.store.failures()?;
        for p in self.open() {
            let slot = slot(self.plan.experiment, &p.cell);
            if let Some(failed) = failed.iter().find(|f| f.slot == slot) {
                self.note(&p.key, failed.clone());
            }
        }
        Ok(())
    }

    /// Sets down that `cells` could not be computed, unless no other could be either. Those that another run has claimed
    /// are left to that.
    pub(super) fn fail(&mut self, cells: &[Planned], error: RunError) -> Result<()> {
        if error.ends_run() {
            return Err(error);
        }
        let mut count = 0;
        for p in cells {
            if self.is_unsettled(p) && self.store.claim(&p.key)? {
                self.store.fail(&share::failed(self.plan.experiment, &p.cell, &p.key, &error))?;
                self.failed.insert(p.key.clone());
                count += 1;
            }
        }
        if count > 0 {
            self.failures.push(Failure { cells: count, error });
            if let Some(Failure { error, .. }) = self.failures.last() {
                self.overall.say(format_args!("failed: {error}"));
            }
        }
        Ok(())
    }

    /// Sets down that cells of models that are not there cannot be computed; gives how many are this run's.
    pub(super) fn fail_unknown(&mut self, unknown: Vec<(Vec<Cell>, RunError)>) -> Result<usize> {
        let experiment = self.plan.experiment;
        for (cells, error) in unknown {
            let mut count = 0;
            for cell in cells {
                let slot = slot(experiment, &cell);
                if self.context.share.as_ref().is_none_or(|share| share.has(&slot)) {
                    self.store.fail(&share::failed(experiment, &cell, "", &error))?;
                    count += 1;
                }
            }
            if count > 0 {
                let error = error.in_cell(experiment.id.clone());
                self.overall.say(format_args!("failed: {error}"));
                self.failures.push(Failure { cells: count, error });
            }
            self.unknown += count;
        }
        Ok(self.unknown)
    }

    /// Writes what is run on what.
    pub(super) fn describe(&mut self) -> Result<()> {
        let Self { store, about, .. } = self;
        store.alone(|_| about.write(false))
    }

    /// Puts everything that is finished together.
    pub(super) fn end(&mut self) -> Result<()> {
        self.store.settle()?;
        if self.context.collect {
            self.note_all_failures()?;
        }
        let whole = self.is_whole();
        let Self { store, about, .. } = self;
        store.alone(|_| about.write(whole))
    }
}
