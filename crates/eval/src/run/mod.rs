//! Runs experiments: from a plan to rows in the results store.
//!
//! A run goes model by model, and task by task within it. What is finished is in the store, so that a run that was
//! stopped goes on where it was; models and data of finished cells are not even loaded. What fails is set down and
//! the rest goes on: a model that cannot be loaded costs its own cells, and a cache that breaks costs one.

mod accuracy;
mod calibration;
mod choose;
mod engine;
mod error;
mod fidelity;
mod info;
mod input;
mod key;
mod memory;
mod numbers;
mod overhead;
mod plan;
mod prefill;
mod progress;
mod prompts;
mod similarity;
mod stop;
#[cfg(test)]
mod tests;
mod throughput;
mod writer;

use std::path::{Path, PathBuf};
use std::time::Instant;

use indexmap::IndexMap;
use minicache_config::{Cell, ConfigError, Experiment, Kind, ModelSettings, RunInfo};
use minicache_core::settings::Calibration;
use minicache_core::{CacheSpec, ModelShape};
use minicache_models::{Description, LoadOptions, Model, Registry};

pub use crate::store::SAMPLE;
pub use calibration::{CalibrationText, Corpus, prepare as prepare_latents};
pub use choose::Choices;
pub use error::{Result, RunError};
use input::Input;
pub use key::cache_json;
use plan::{Plan, Planned};
pub use progress::Overall;
use progress::Progress;
pub use stop::Stop;

use crate::data::DataSource;
use crate::store::{self, Made, Provenance, Reuse, Store};

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
}

/// What a run did.
#[derive(Debug)]
pub struct Summary {
    /// The experiment's results folder.
    pub dir: PathBuf,
    /// Cells in the plan.
    pub planned: usize,
    /// Cells that this run computed.
    pub computed: usize,
    /// Cells that an earlier run had computed.
    pub reused: usize,
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
    /// Tokens that go through a model for the cells that are not, at most.
    pub tokens: usize,
    /// Seconds that they took when they were computed before, here or where the rows in the folder come from; where
    /// nothing is known a guess by tokens.
    pub seconds: f64,
}

/// Says what [`run`] would do, without loading a model. With `absent_weights`, models of the registry need not be on
/// this machine.
///
/// # Errors
/// As [`run`], as far as it shows without a model.
pub fn preview(experiment: &Experiment, context: &Context, absent_weights: bool) -> Result<Preview> {
    let plan = Plan::new(experiment, context, |name| match absent(name)?.filter(|_| absent_weights) {
        // Its weights are elsewhere: nothing of it can be finished here.
        Some(shape) => Ok(Description { fingerprint: String::new(), shape }),
        None => Ok(minicache_models::describe(name)?),
    })?;
    let clone = store::clone_id(&context.results);
    let store = plan.store(context)?.reusing(context.reuse, clone.as_deref());
    let is_done = |p: &Planned| !context.fresh && store.is_done(&p.key);
    let cells = plan.cells.iter().map(|p| (p.cell.clone(), is_done(p))).collect();
    let open: Vec<_> = plan.cells.iter().filter(|p| !is_done(p)).collect();
    let tokens = plan.tokens(&open);
    Ok(Preview {
        dir: plan.folder(context),
        origins: plan.origins(),
        cells,
        tokens,
        seconds: progress::estimate(&store, &open, tokens),
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
    let start = Instant::now();
    let plan = Plan::new(experiment, context, |name| Ok(minicache_models::describe(name)?))?;
    let dir = plan.folder(context);
    let clone = store::make_clone_id(&context.results)?;
    let mut store = plan.store(context)?.reusing(context.reuse, Some(&clone));
    store.begin(context.fresh, Provenance { made: Made::here(&clone), data: plan.origins() })?;
    let open = |store: &Store| plan.cells.iter().filter(|p| !store.is_done(&p.key)).count();
    let before = open(&store);
    let mut about = info::Info::new(&plan, context, &store, &dir);
    if before > 0 {
        about.write(false)?;
    }
    let mut run = Run {
        plan: &plan,
        context,
        overall,
        store,
        about,
        failures: Vec::new(),
        known: memory::Known::new(),
    };
    for (model, settings) in plan.models() {
        run.model(model, settings)?;
    }
    run.about.write(run.failures.is_empty())?;
    let computed = before - open(&run.store);
    let failures = run.failures;
    let (planned, reused) = (plan.cells.len(), plan.cells.len() - before);
    Ok(Summary { dir, planned, computed, reused, failures, seconds: start.elapsed().as_secs_f64() })
}

/// An experiment while it runs.
struct Run<'a> {
    plan: &'a Plan<'a>,
    context: &'a Context,
    overall: &'a Overall,
    store: Store,
    about: info::Info,
    failures: Vec<Failure>,
    known: memory::Known,
}

impl Run<'_> {
    /// Computes the open cells of one model.
    fn model(&mut self, model: &str, settings: &ModelSettings) -> Result<()> {
        let (plan, experiment) = (self.plan, self.plan.experiment);
        let mut open: Vec<Planned> =
            plan.cells.iter().filter(|p| p.is_of(model, settings)).cloned().collect();
        open.retain(|p| !self.store.is_done(&p.key));
        if open.is_empty() {
            return Ok(());
        }
        let place = format!("{}, {model}", experiment.id);
        if !experiment.kind.needs_weights() {
            let shape = &plan.shapes[model];
            self.about.add_shape(model, shape);
            self.about.write(false)?;
            return self.each_apart(open, &place, |cells, run| {
                let work =
                    ShapeWork { experiment, shape, cells, overall: run.overall, stop: &run.context.stop };
                match experiment.kind {
                    Kind::Overhead => overhead::run(&work, &mut run.store),
                    _ => memory::run(&work, &mut run.known, &mut run.store),
                }
            });
        }
        self.overall.say(format!("{} {model}: loading", experiment.id));
        let loaded = match self.load(model, settings, &mut open) {
            Ok(loaded) => loaded,
            Err(error) => return self.failed(open.len(), error.in_cell(place)),
        };
        self.about.add(model, &loaded, settings);
        self.about.write(false)?;
        if experiment.kind == Kind::Throughput {
            return self.each_apart(open, &place, |cells, run| {
                throughput::run(experiment, &loaded, cells, &run.context.stop, &mut run.store, run.overall)
            });
        }
        for (task, input) in &plan.inputs {
            let cells: Vec<Planned> = open.iter().filter(|p| p.cell.task == *task).cloned().collect();
            let reference = plan.reference(model, task);
            self.each_apart(cells, &format!("{place}, {task}"), |cells, run| {
                let (overall, stop) = (run.overall, &run.context.stop);
                let work = Work { experiment, model: &loaded, cells, reference, overall, stop };
                match input {
                    Input::Documents(suite, documents) => {
                        accuracy::run(&work, suite, &documents.docs, &mut run.store)
                    }
                    Input::Texts(_, texts) if experiment.kind == Kind::Similarity => {
                        similarity::run(&work, &texts.docs, &mut run.store)
                    }
                    Input::Texts(_, texts) => fidelity::run(&work, &texts.docs, &mut run.store),
                }
            })?;
        }
        Ok(())
    }

    /// Runs `work` on all `cells` together, and where that fails on each alone, so that one that fails does not take
    /// the others with it: what they had finished is in the store.
    fn each_apart(
        &mut self,
        cells: Vec<Planned>,
        place: &str,
        work: impl Fn(&[&Planned], &mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut left: Vec<&Planned> = cells.iter().collect();
        if left.is_empty() {
            return Ok(());
        }
        match work(&left, self) {
            Ok(()) => return Ok(()),
            Err(error) if error.ends_run() => return Err(error.in_cell(place)),
            Err(error) if left.len() == 1 || error.is_of_all() => {
                return self.failed(left.len(), error.in_cell(place));
            }
            Err(_) => left.retain(|p| !self.store.is_done(&p.key)),
        }
        for cell in left {
            match work(&[cell], self) {
                Ok(()) => {}
                Err(error) if error.ends_run() => return Err(error.in_cell(place)),
                Err(error) => self.failed(1, error.in_cell(place))?,
            }
        }
        Ok(())
    }

    /// Sets down that `cells` could not be computed, unless no other could be either.
    fn failed(&mut self, cells: usize, error: RunError) -> Result<()> {
        if error.ends_run() {
            return Err(error);
        }
        self.overall.say(format_args!("failed: {error}"));
        self.failures.push(Failure { cells, error });
        Ok(())
    }

    /// The model with what `cells` need of it. Cells whose cache cannot be made fail here, before anything is computed;
    /// what the others leave to choice is chosen.
    fn load(&mut self, model: &str, settings: &ModelSettings, cells: &mut Vec<Planned>) -> Result<Model> {
        self.context.stop.check()?;
        let options = LoadOptions { weights: settings.weights, ..self.context.load.clone() };
        let mut loaded = Model::load(model, &options)?;
        for p in &*cells {
            p.cell
                .cache
                .validate_for(loaded.decoder.shape())
                .map_err(|e| ConfigError::from(e.under("cache")))?;
        }
        if settings.align.is_none() && cells.iter().all(|p| p.cell.cache.calibration().is_none()) {
            return Ok(loaded);
        }
        let measured = self.plan.measured(loaded.need_tokenizer()?, self.context)?;
        let corpus = Corpus::beside(&self.context.data, measured, &self.context.stop);
        if let Some(calibration) = &settings.align {
            let what = calibration::describe(calibration);
            self.overall.say(format!("{} {model}: aligning on {what}", self.plan.experiment.id));
            self.context.stop.check()?;
            let text = CalibrationText::read(calibration, &loaded, &corpus)?;
            let alignment = loaded.alignment(text.chunks())?;
            drop(loaded);
            loaded = Model::load_aligned(model, &options, &alignment)?;
            self.about.add_calibration(what, text.origin());
        }
        self.calibrate(&loaded, cells, model, &corpus)?;
        self.choose(&loaded, cells, model, &corpus)?;
        Ok(loaded)
    }

    /// Makes the bases that `cells` need. Those for which there can be none fail and are taken out.
    fn calibrate(
        &mut self,
        loaded: &Model,
        cells: &mut Vec<Planned>,
        model: &str,
        corpus: &Corpus<'_>,
    ) -> Result<()> {
        let mut texts: Vec<Calibration> = Vec::new();
        for text in cells.iter().filter_map(|p| p.cell.cache.calibration()) {
            if !texts.contains(text) {
                texts.push(text.clone());
            }
        }
        for text in texts {
            let what = calibration::describe(&text);
            self.overall.say(format!("{} {model}: calibrating on {what}", self.plan.experiment.id));
            let of_text = |p: &&Planned| p.cell.cache.calibration() == Some(&text);
            let caches = cells.iter().filter(of_text).map(|p| &p.cell.cache);
            match calibration::prepare(loaded, caches, corpus, &self.context.stop) {
                Ok(origin) => origin.into_iter().for_each(|o| self.about.add_calibration(what.clone(), o)),
                Err(error) => {
                    let failed = cells.iter().filter(of_text).count();
                    cells.retain(|p| !of_text(&p));
                    let place = format!("{}, {model}, calibrating on {what}", self.plan.experiment.id);
                    self.failed(failed, error.in_cell(place))?;
                }
            }
        }
        Ok(())
    }

    /// Puts what was chosen in place of `auto` in `cells`. Those for which nothing can be chosen fail and are taken out.
    fn choose(
        &mut self,
        loaded: &Model,
        cells: &mut Vec<Planned>,
        model: &str,
        corpus: &Corpus<'_>,
    ) -> Result<()> {
        let mut measured = Choices::default();
        let mut choices: Vec<(CacheSpec, Option<CacheSpec>)> = Vec::new();
        for Planned { cell, .. } in cells.iter().filter(|p| p.cell.cache.is_auto()) {
            if choices.iter().any(|(auto, _)| *auto == cell.cache) {
                continue;
            }
            let place = format!("{}, {model}, choosing for {}", self.plan.experiment.id, cell.variant);
            self.overall.say(place.clone());
            self.context.stop.check()?;
            let chosen = match measured.resolve(loaded, &cell.cache, corpus) {
                Ok(chosen) => {
                    let json = cache_json(&chosen, loaded.decoder.shape().layers).to_string();
                    self.about.add_chosen(&cell.variant, model, json);
                    Some(chosen)
                }
                Err(error) => {
                    let failed = cells.iter().filter(|p| p.cell.cache == cell.cache).count();
                    self.failed(failed, error.in_cell(place))?;
                    None
                }
            };
            choices.push((cell.cache.clone(), chosen));
        }
        for (auto, chosen) in choices {
            match chosen {
                Some(chosen) => {
                    let of_choice = cells.iter_mut().filter(|p| p.cell.cache == auto);
                    of_choice.for_each(|p| p.cell.cache = chosen.clone());
                }
                None => cells.retain(|p| p.cell.cache != auto),
            }
        }
        Ok(())
    }
}

/// One model's cells that are not finished, for kinds that need its shape alone.
struct ShapeWork<'a> {
    experiment: &'a Experiment,
    shape: &'a ModelShape,
    cells: &'a [&'a Planned],
    overall: &'a Overall,
    stop: &'a Stop,
}

/// One task's cells of one model that are not finished.
struct Work<'a> {
    experiment: &'a Experiment,
    model: &'a Model,
    cells: &'a [&'a Planned],
    /// The full cache's cell of the same model and task, finished or not.
    reference: Option<&'a Planned>,
    overall: &'a Overall,
    stop: &'a Stop,
}

impl Work<'_> {
    fn tokenizer(&self) -> Result<&minicache_models::Tokenizer> {
        Ok(self.model.need_tokenizer()?)
    }

    /// Progress of `tokens` of work on these cells.
    fn progress(&self, tokens: usize) -> Progress<'_> {
        let cell = &self.cells[0].cell;
        self.overall.progress(format!("{} {} {}", self.experiment.id, cell.model, cell.task), tokens)
    }
}

/// `run.json` of an experiment's folder, where there is one.
pub(crate) fn previous(dir: &Path) -> Option<RunInfo> {
    RunInfo::read(dir).ok()
}
