//! An experiment while it runs: its models one after another, the tasks of each, and of those what this run has claimed.

use std::collections::HashSet;

use minicache_config::{Experiment, Kind, ModelSettings};
use minicache_core::ModelShape;
use minicache_models::Model;

use super::input::Input;
use super::model::Ready;
use super::plan::{Plan, Planned};
use super::progress::{Overall, Progress};
use super::{
    Context, Failure, Result, Stop, accuracy, fidelity, info, memory, overhead, similarity, throughput,
};
use crate::store::Store;

/// An experiment while it runs.
pub(super) struct Run<'a> {
    pub(super) plan: &'a Plan<'a>,
    pub(super) context: &'a Context,
    pub(super) overall: &'a Overall,
    pub(super) store: Store,
    pub(super) about: info::Info,
    pub(super) failures: Vec<Failure>,
    /// Keys of cells that failed, here or elsewhere.
    pub(super) failed: HashSet<String>,
    /// Cells that have all of their samples and wait for those of the full cache, which another run computes.
    pub(super) parked: Vec<Planned>,
    /// Cells that this run has finished.
    pub(super) computed: usize,
    /// Cells of models that are not there.
    pub(super) unknown: usize,
    known: memory::Known,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        plan: &'a Plan<'a>,
        context: &'a Context,
        overall: &'a Overall,
        store: Store,
        about: info::Info,
    ) -> Self {
        Self {
            plan,
            context,
            overall,
            store,
            about,
            failures: Vec::new(),
            failed: HashSet::new(),
            parked: Vec::new(),
            computed: 0,
            unknown: 0,
            known: memory::Known::new(),
        }
    }

    /// Computes what is open, and waits for what others have claimed.
    pub(super) fn compute(&mut self) -> Result<()> {
        loop {
            for (model, settings) in self.plan.models() {
                self.model(model, settings)?;
            }
            self.conclude_parked()?;
            if !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Computes the open cells of one model.
    fn model(&mut self, model: &str, settings: &ModelSettings) -> Result<()> {
        let (plan, experiment) = (self.plan, self.plan.experiment);
        let cells: Vec<Planned> =
            self.wanted().filter(|p| p.is_of(model, settings) && self.is_open(p)).cloned().collect();
        let place = format!("{}, {model}", experiment.id);
        let mut ready: Option<Ready> = None;
        let none = String::new();
        let tasks = if experiment.kind.reads_tasks() { plan.inputs.keys().collect() } else { vec![&none] };
        for task in tasks {
            let of_task: Vec<Planned> = cells.iter().filter(|p| p.cell.task == *task).cloned().collect();
            loop {
                let mut claimed = self.claim(&of_task)?;
                if claimed.is_empty() {
                    break;
                }
                if !experiment.kind.needs_weights() {
                    self.by_shape(&claimed, &place)?;
                    self.give_back(claimed);
                    continue;
                }
                if ready.is_none() {
                    ready = self.ready(model, settings, &cells)?;
                }
                let Some(ready) = &ready else { return Ok(()) };
                // What is left to choice is chosen there, and what could not be made ready has failed.
                claimed.retain_mut(|p| {
                    ready.cells.iter().any(|of| {
                        of.key == p.key && {
                            *p = of.clone();
                            true
                        }
                    })
                });
                match plan.inputs.get(task) {
                    Some(input) => self.task(&ready.model, task, input, &claimed, &place)?,
                    None => self.each_apart(&claimed, &place, |cells, run| {
                        let stop = &run.context.stop;
                        throughput::run(experiment, &ready.model, cells, stop, &mut run.store, run.overall)
                    })?,
                }
                self.give_back(claimed);
            }
        }
        if let Some(ready) = ready {
            ready.keep(self.context, settings);
        }
        Ok(())
    }

    /// Computes cells for which the shape of their model is enough.
    fn by_shape(&mut self, cells: &[Planned], place: &str) -> Result<()> {
        let experiment = self.plan.experiment;
        let model = &cells[0].cell.model;
        let shape = &self.plan.shapes[model];
        self.about.add_shape(model, shape);
        self.describe()?;
        self.each_apart(cells, place, |cells, run| {
            let work = ShapeWork { experiment, shape, cells, overall: run.overall, stop: &run.context.stop };
            match experiment.kind {
                Kind::Overhead => overhead::run(&work, &mut run.store),
                _ => memory::run(&work, &mut run.known, &mut run.store),
            }
        })
    }

    /// Computes cells of one task.
    fn task(
        &mut self,
        model: &Model,
        task: &str,
        input: &Input,
        cells: &[Planned],
        place: &str,
    ) -> Result<()> {
        let Some(first) = cells.first() else { return Ok(()) };
        let experiment = self.plan.experiment;
        let reference = self.plan.reference(&first.cell.model, task);
        self.each_apart(cells, &format!("{place}, {task}"), |cells, run| {
            let (overall, stop) = (run.overall, &run.context.stop);
            let reference = reference.filter(|r| !run.failed.contains(&r.key));
            let work = Work { experiment, model, cells, reference, overall, stop };
            match input {
                Input::Documents(suite, documents) => {
                    accuracy::run(&work, suite, &documents.docs, &mut run.store)
                }
                Input::Texts(_, texts) if experiment.kind == Kind::Similarity => {
                    similarity::run(&work, &texts.docs, &mut run.store)
                }
                Input::Texts(_, texts) => fidelity::run(&work, &texts.docs, &mut run.store),
            }
        })
    }

    /// Runs `work` on all `cells` together, and where that fails on each alone, so that one that fails does not take
    /// the others with it: what they had finished is in the store.
    fn each_apart(
        &mut self,
        cells: &[Planned],
        place: &str,
        work: impl Fn(&[&Planned], &mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut left: Vec<&Planned> = cells.iter().collect();
        if left.is_empty() {
            return Ok(());
        }
        match work(&left, self) {
            Ok(()) => return Ok(()),
            // They are another's now.
            Err(error) if error.is_lost() => return Ok(()),
            Err(error) if error.ends_run() => return Err(error.in_cell(place)),
            Err(error) if left.len() == 1 || error.is_of_all() => {
                return self.fail(cells, error.in_cell(place));
            }
            Err(_) => left.retain(|p| !self.store.is_done(&p.key)),
        }
        for cell in left {
            match work(&[cell], self) {
                Ok(()) => {}
                Err(error) if error.is_lost() => {}
                Err(error) if error.ends_run() => return Err(error.in_cell(place)),
                Err(error) => self.fail(std::slice::from_ref(cell), error.in_cell(place))?,
            }
        }
        Ok(())
    }
}

/// One model's cells that are not finished, for kinds that need its shape alone.
pub(super) struct ShapeWork<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) shape: &'a ModelShape,
    pub(super) cells: &'a [&'a Planned],
    pub(super) overall: &'a Overall,
    pub(super) stop: &'a Stop,
}

/// One task's cells of one model that are not finished.
pub(super) struct Work<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) model: &'a Model,
    pub(super) cells: &'a [&'a Planned],
    /// The full cache's cell of the same model and task, finished or not; `None` where there is none or it failed.
    pub(super) reference: Option<&'a Planned>,
    pub(super) overall: &'a Overall,
    pub(super) stop: &'a Stop,
}

impl Work<'_> {
    pub(super) fn tokenizer(&self) -> Result<&minicache_models::Tokenizer> {
        Ok(self.model.need_tokenizer()?)
    }

    /// Progress of `tokens` of work on these cells.
    pub(super) fn progress(&self, tokens: usize) -> Progress<'_> {
        let cell = &self.cells[0].cell;
        self.overall.progress(format!("{} {} {}", self.experiment.id, cell.model, cell.task), tokens)
    }
}
