//! Runs experiments: from a plan to rows in the results store.
//!
//! A run goes model by model, and task by task within it. What is finished is in the store, so that a run that was
//! stopped goes on where it was; models and data of finished cells are not even loaded. What fails is set down and
//! the rest goes on: a model that cannot be loaded costs its own cells, and a cache that breaks costs one.
//!
//! Several runs may work on one results folder: each claims what it computes (see [`crate::store`]), and at its end waits
//! for what others have claimed, to take it over should they be gone. A run may also have a share of the cells, and then
//! leaves the others alone.

mod accuracy;
mod calibration;
mod choose;
mod claimed;
mod engine;
mod error;
mod fidelity;
mod info;
mod input;
mod key;
mod memory;
mod model;
mod numbers;
mod overhead;
mod plan;
mod predictions;
mod prefill;
mod progress;
mod prompts;
mod share;
mod similarity;
mod split;
mod stop;
#[cfg(test)]
mod tests;
mod throughput;
mod work;
mod writer;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use indexmap::IndexMap;
use minicache_config::{Cell, Experiment, RunInfo};
use minicache_core::ModelShape;
use minicache_models::{Description, LoadOptions, Registry};

pub use crate::store::SAMPLE;
pub use calibration::{CalibrationText, Corpus, prepare as prepare_latents};
pub use choose::Choices;
pub use error::{Result, RunError};
pub use key::cache_json;
use model::Kept;
use plan::{Plan, Planned};
pub use progress::Overall;
pub use share::{Share, describe as describe_cell, slot};
pub use split::{Job, Load, Task, estimates, split};
pub use stop::Stop;
use work::Run;

use crate::data::DataSource;
use crate::store::{self, Made, Provenance, Reuse, Worker};

/// What a run needs besides the experiment.
pub struct Context {
    /// Folder with one folder per experiment, and `sample/` with those on the bundled sample.
    pub results: PathBuf,
    /// Which finished cells are taken as they are.
    pub reuse: Reuse,
    /// Asks for a stop between two pieces of work.
    pub stop: Stop,
    /// Where data sets come from.
    pub data: DataSource,
    /// How models are loaded; the weights' form is the experiment's.
    pub load: LoadOptions,
    /// Start the planned cells anew.
    pub fresh: bool,
    /// The command line, for the report.
    pub command: String,
    /// Leave out cells of which this results folder has no rows.
    pub again: Option<PathBuf>,
    /// This process, at work in the results folder; `None` where nothing is run.
    pub worker: Option<Arc<Worker>>,
    /// The cells that are this run's; `None`: all of them.
    pub share: Option<Share>,
    /// Compute nothing, and put together what others have computed.
    pub collect: bool,
    /// The model that was loaded last, for the next experiment.
    pub kept: RefCell<Option<Kept>>,
}

impl Context {
    /// The GPUs that models run on; empty for the host.
    pub(crate) fn device(&self) -> String {
        minicache_models::describe_gpus(&self.load.devices)
    }
}

/// What a run did.
#[derive(Debug)]
pub struct Summary {
    /// The experiment's results folder.
    pub dir: PathBuf,
    /// Cells in the plan that are this run's.
    pub planned: usize,
    /// Cells that this run computed.
    pub computed: usize,
    /// Cells that an earlier run had computed.
    pub reused: usize,
    /// Cells that another run has computed meanwhile.
    pub others: usize,
    /// Cells that are neither finished nor failed: with [`Context::collect`], those that nobody has computed.
    pub open: usize,
    /// Whether all cells of the plan are finished, this run's or not.
    pub whole: bool,
    /// What could not be computed, and why.
    pub failures: Vec<Failure>,
    /// Wall time.
    pub seconds: f64,
}

/// Cells that could not be computed.
#[derive(Debug)]
pub struct Failure {
    /// How many.
    pub cells: usize,
    /// Why, with the experiment, model, task and cache.
    pub error: RunError,
}

/// A plan as it is known before a run.
#[derive(Debug, Clone)]
pub struct Preview {
    /// The folder that results go to.
    pub dir: PathBuf,
    /// Where each task's data comes from.
    pub origins: IndexMap<String, String>,
    /// The cells, with whether each is finished already.
    pub cells: Vec<(Cell, bool)>,
    /// The cells again, as pieces of work.
    pub jobs: Vec<Job>,
    /// Tokens that go through a model for the cells that are not finished, at most.
    pub tokens: usize,
    /// Seconds that they are estimated to take in one process, times as much as cells of the plan took that were computed
    /// before on such a device, here or where the rows in the folder come from.
    pub seconds: f64,
    /// Seconds that these took, and that they were estimated to take (see [`estimates`]).
    pub measured: (f64, f64),
}

/// Says what [`run`] would do, without loading a model. With `absent_weights`, models of the registry need not be on
/// this machine.
///
/// # Errors
/// As [`run`], as far as it shows without a model.
pub fn preview(experiment: &Experiment, context: &Context, absent_weights: bool) -> Result<Preview> {
    let plan = Plan::new(experiment, context, |name| match absent(name)?.filter(|_| absent_weights) {
        // Its weights are elsewhere: nothing of it can be finished here. Models of one shape are apart all the same.
        Some(shape) => Ok(Description { fingerprint: format!("{name}, absent"), shape }),
        None => Ok(minicache_models::describe(name)?),
    })?;
    let clone = store::clone_id(&context.results);
    let store = plan.store(context)?.reusing(context.reuse, clone.as_deref());
    let is_done = |p: &Planned| !context.fresh && store.is_done(&p.key);
    let mut cells: Vec<_> = plan.cells.iter().map(|p| (p.cell.clone(), is_done(p))).collect();
    cells.extend(plan.unknown.iter().flat_map(|(cells, _)| cells).map(|cell| (cell.clone(), false)));
    let open: Vec<_> = plan.cells.iter().filter(|p| !is_done(p)).collect();
    let tokens = plan.tokens(&open);
    let jobs = split::jobs(&plan, is_done);
    let estimates = split::estimates(&jobs);
    let (mut measured, device) = ((0.0, 0.0), context.device());
    for p in &plan.cells {
        let estimate = estimates.get(&slot(experiment, &p.cell));
        if let (Some(seconds), Some(estimate)) = (store.seconds(&p.key, &device), estimate) {
            measured = (measured.0 + seconds, measured.1 + estimate);
        }
    }
    let pace = if measured.1 > 0.0 { measured.0 / measured.1 } else { 1.0 };
    let alone: f64 = split(&jobs, 1, 0.0, false).iter().map(|task| task.seconds).sum();
    Ok(Preview {
        dir: plan.folder(context),
        origins: plan.origins(),
        cells,
        jobs,
        tokens,
        seconds: pace * alone,
        measured,
    })
}

/// The shape of a model of the registry whose weights are not on this machine.
fn absent(name: &str) -> Result<Option<ModelShape>> {
    let registry = Registry::load()?;
    Ok(registry.find(name).filter(|entry| entry.local().is_none()).map(|entry| entry.shape()))
}

/// Runs `experiment`, or what is left of it. What is finished stays in the store whatever happens.
///
/// # Errors
/// What is wrong with the experiment or its data, or a results folder that cannot be written: nothing could be computed.
/// What a model, a task or a cache meets is in [`Summary::failures`].
pub fn run(experiment: &Experiment, context: &Context, overall: &Overall) -> Result<Summary> {
    context.stop.check()?;
    let Some(worker) = &context.worker else {
        return Err(RunError::Asked("a run needs a worker in its results folder".into()));
    };
    let start = Instant::now();
    let mut plan = Plan::new(experiment, context, |name| Ok(minicache_models::describe(name)?))?;
    let unknown = std::mem::take(&mut plan.unknown);
    let dir = plan.folder(context);
    let clone = store::make_clone_id(&context.results)?;
    let mut store = plan.store(context)?.reusing(context.reuse, Some(&clone));
    store.begin(
        context.fresh,
        Provenance { made: Made::here(&clone, context.device()), data: plan.origins() },
        worker,
    )?;
    let about = info::Info::new(&plan, context, &store, &dir);
    let mut run = Run::new(&plan, context, overall, store, about);
    let before = run.open().len();
    let missing = run.fail_unknown(unknown)?;
    if before + missing > 0 {
        run.describe()?;
    }
    let computed = if context.collect { Ok(()) } else { run.compute() };
    // What is finished is put together whatever has happened.
    let ended = run.end();
    computed.and(ended)?;
    let planned = run.mine().count() + missing;
    let (open, failed) = (run.open().len(), run.failed());
    let (computed, reused) = (run.computed, planned - before - missing);
    Ok(Summary {
        dir,
        planned,
        computed,
        reused,
        others: planned - computed - reused - open - failed,
        open,
        whole: run.is_whole(),
        failures: run.failures,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Makes `experiment` one to be computed anew, and computes nothing.
///
/// # Errors
/// As [`run`].
pub fn renew(experiment: &Experiment, context: &Context) -> Result<()> {
    let Some(worker) = &context.worker else { return Ok(()) };
    let plan = Plan::new(experiment, context, |name| Ok(minicache_models::describe(name)?))?;
    let clone = store::make_clone_id(&context.results)?;
    let mut store = plan.store(context)?.reusing(context.reuse, Some(&clone));
    Ok(store.begin(
        true,
        Provenance { made: Made::here(&clone, context.device()), data: plan.origins() },
        worker,
    )?)
}

/// `run.json` of an experiment's folder, where there is one.
pub(crate) fn previous(dir: &Path) -> Option<RunInfo> {
    RunInfo::read(dir).ok()
}
