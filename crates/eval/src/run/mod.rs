//! Runs experiments: from a plan to rows in the results store.
//!
//! A run goes model by model, and task by task within it. What is finished is in the store, so that a run that was
//! stopped goes on where it was; models and data of finished cells are not even loaded.

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
mod prefill;
mod progress;
mod prompts;
mod similarity;
#[cfg(test)]
mod tests;
mod throughput;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use minicache_config::{CacheSpec, Cell, Experiment, Kind, ModelSettings, ModelShape, RunInfo, cells};
use minicache_models::{Description, LoadOptions, Model, Registry};

pub use calibration::{CalibrationText, prepare as prepare_latents};
pub use choose::resolve;
pub use error::{Result, RunError};
use input::Input;
pub use key::cache_json;

use crate::data::DataSource;
use crate::store::{Row, Store};

/// What a run needs besides the experiment.
pub struct Context {
    /// Folder with one folder per experiment.
    pub results: PathBuf,
    /// Where data sets come from.
    pub data: DataSource,
    /// How models are loaded; the weights' form is the experiment's.
    pub load: LoadOptions,
    /// Start the planned cells anew.
    pub fresh: bool,
    /// The command line, for the report.
    pub command: String,
}

/// Whether a column of `cells.csv` depends on the machine and the moment: times and rates. All others are the same
/// whenever a run is repeated.
pub fn is_timing(column: &str) -> bool {
    ["seconds", "ms"].contains(&column) || ["_seconds", "_ms", "_per_s"].iter().any(|s| column.ends_with(s))
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The experiment's results folder.
    pub dir: PathBuf,
    /// Cells in the plan.
    pub planned: usize,
    /// Cells that this run computed.
    pub computed: usize,
}

/// A plan as it is printed before a run.
#[derive(Debug, Clone)]
pub struct Preview {
    /// The cells, with whether each is finished already.
    pub cells: Vec<(Cell, bool)>,
    /// Tokens that go through a model for the cells that are not, at most.
    pub tokens: usize,
}

/// Says what [`run`] would do, without loading a model.
///
/// # Errors
/// As [`run`], as far as it shows without a model.
pub fn preview(experiment: &Experiment, context: &Context) -> Result<Preview> {
    let plan = Plan::new(experiment, context, |name| match absent(name)? {
        // Its weights are elsewhere: nothing of it can be finished here.
        Some(shape) => Ok(Description { fingerprint: String::new(), shape }),
        None => Ok(minicache_models::describe(name)?),
    })?;
    let store = plan.store(&context.results)?;
    let is_done = |p: &Planned| !context.fresh && store.is_done(&p.key);
    let cells = plan.cells.iter().map(|p| (p.cell.clone(), is_done(p))).collect();
    let open: Vec<_> = plan.cells.iter().filter(|p| !is_done(p)).collect();
    Ok(Preview { cells, tokens: plan.tokens(&open) })
}

/// The shape of a model of the registry whose weights are not on this machine.
fn absent(name: &str) -> Result<Option<ModelShape>> {
    let registry = Registry::load()?;
    Ok(registry.find(name).filter(|entry| entry.local().is_none()).map(|entry| entry.shape()))
}

/// Runs `experiment`, or what is left of it.
///
/// # Errors
/// Whatever is wrong with the experiment, a model or the data is found before the first cell is computed, as far as
/// it can be; what is finished stays in the store whatever happens.
pub fn run(experiment: &Experiment, context: &Context) -> Result<Summary> {
    let plan = Plan::new(experiment, context, |name| Ok(minicache_models::describe(name)?))?;
    let mut store = plan.store(&context.results)?;
    store.begin(context.fresh)?;
    let dir = context.results.join(&experiment.id);
    let open = |store: &Store| plan.cells.iter().filter(|p| !store.is_done(&p.key)).count();
    let computed = open(&store);
    let mut about = info::Info::new(&plan, context, &dir);
    if computed > 0 {
        about.write(false)?;
    }
    let mut known = memory::Known::default();
    for (model, settings) in plan.models() {
        let of_model: Vec<&Planned> = plan.cells.iter().filter(|p| p.is_of(model, settings)).collect();
        if of_model.iter().all(|p| store.is_done(&p.key)) {
            continue;
        }
        if !experiment.kind.needs_weights() {
            let shape = &plan.shapes[model];
            about.add_shape(model, shape);
            about.write(false)?;
            let cells: Vec<&Planned> = of_model.into_iter().filter(|p| !store.is_done(&p.key)).collect();
            let work = ShapeWork { experiment, shape, cells: &cells };
            let place = |e: RunError| e.in_cell(format!("{}, {model}", experiment.id));
            match experiment.kind {
                Kind::Overhead => overhead::run(&work, &mut store).map_err(place)?,
                _ => memory::run(&work, &mut known, &mut store).map_err(place)?,
            }
            continue;
        }
        let (loaded, mut calibrated) = load(model, settings, &of_model, context)?;
        about.add(model, &loaded, settings);
        let mut resolved: Vec<Planned> =
            of_model.into_iter().filter(|p| !store.is_done(&p.key)).cloned().collect();
        for (auto, chosen) in choose_all(&loaded, &mut resolved, context, &mut calibrated)? {
            about.add_chosen(
                &auto,
                model,
                key::cache_json(&chosen, loaded.decoder.shape().layers).to_string(),
            );
        }
        let of_model: Vec<&Planned> = resolved.iter().collect();
        about.write(false)?;
        if experiment.kind == Kind::Throughput {
            let cells: Vec<&Planned> = of_model.into_iter().filter(|p| !store.is_done(&p.key)).collect();
            let place = |e: RunError| e.in_cell(format!("{}, {model}", experiment.id));
            throughput::run(experiment, &loaded, &cells, &mut store).map_err(place)?;
            continue;
        }
        for (task, input) in &plan.inputs {
            let cells: Vec<&Planned> =
                of_model.iter().copied().filter(|p| p.cell.task == *task && !store.is_done(&p.key)).collect();
            if !cells.is_empty() {
                let work = Work { experiment, model: &loaded, cells: &cells, calibrated: &calibrated };
                let place = |e: RunError| e.in_cell(format!("{}, {model}, {task}", experiment.id));
                match input {
                    Input::Documents(suite, documents) => {
                        accuracy::run(&work, suite, &documents.docs, &mut store)
                    }
                    Input::Texts(texts) if experiment.kind == Kind::Similarity => {
                        similarity::run(&work, &texts.docs, &mut store)
                    }
                    Input::Texts(texts) => fidelity::run(&work, &texts.docs, &mut store),
                }
                .map_err(place)?;
            }
        }
    }
    about.write(true)?;
    Ok(Summary { dir, planned: plan.cells.len(), computed })
}

/// Puts what was chosen in place of `auto` in `cells`. Gives each choice with its variant, and adds the documents that it
/// was made on to `used`.
fn choose_all(
    model: &Model,
    cells: &mut [Planned],
    context: &Context,
    used: &mut BTreeSet<String>,
) -> Result<Vec<(String, CacheSpec)>> {
    let mut choices: Vec<(CacheSpec, CacheSpec)> = Vec::new();
    let mut out = Vec::new();
    for cell in cells.iter_mut().map(|p| &mut p.cell).filter(|c| c.cache.is_auto()) {
        let chosen = match choices.iter().find(|(auto, _)| *auto == cell.cache) {
            Some((_, chosen)) => chosen.clone(),
            None => {
                let (chosen, documents) = resolve(model, &cell.cache, &context.data)?;
                used.extend(documents);
                choices.push((cell.cache.clone(), chosen.clone()));
                out.push((cell.variant.clone(), chosen.clone()));
                chosen
            }
        };
        cell.cache = chosen;
    }
    Ok(out)
}

/// What a cache depends on, of the model that `name` names: of a model of the registry without its weights.
fn describe_shape(name: &str) -> Result<Description> {
    let registry = Registry::load()?;
    let (name, shape) = match registry.find(name) {
        Some(entry) => (entry.name.as_str(), entry.shape()),
        None => (name, minicache_models::describe(name)?.shape),
    };
    // With the name: models of one shape have rows of their own.
    Ok(Description { fingerprint: format!("{name}: {shape:?}"), shape })
}

/// One model's cells that are not finished, for kinds that need its shape alone.
struct ShapeWork<'a> {
    experiment: &'a Experiment,
    shape: &'a ModelShape,
    cells: &'a [&'a Planned],
}

/// One task's cells of one model that are not finished.
struct Work<'a> {
    experiment: &'a Experiment,
    model: &'a Model,
    cells: &'a [&'a Planned],
    /// Documents that must not be measured on.
    calibrated: &'a BTreeSet<String>,
}

impl Work<'_> {
    fn tokenizer(&self) -> Result<&minicache_models::Tokenizer> {
        Ok(self.model.need_tokenizer()?)
    }
}

/// A cell with what names it in results.
#[derive(Debug, Clone)]
struct Planned {
    cell: Cell,
    key: String,
    names: Row,
}

impl Planned {
    fn is_of(&self, model: &str, settings: &ModelSettings) -> bool {
        self.cell.model == model && self.cell.settings == *settings
    }
}

/// The cells of an experiment with the data that they need.
struct Plan<'a> {
    experiment: &'a Experiment,
    cells: Vec<Planned>,
    /// By task; empty for kinds without tasks.
    inputs: IndexMap<String, Input>,
    /// By model.
    shapes: IndexMap<String, ModelShape>,
}

impl<'a> Plan<'a> {
    /// `describe` says what a model is, by its name.
    fn new(
        experiment: &'a Experiment,
        context: &Context,
        describe: impl Fn(&str) -> Result<Description>,
    ) -> Result<Self> {
        let listed = cells(experiment)?;
        if experiment.kind.reads_tasks() && experiment.tasks.is_empty() {
            let message = "must name at least one task whose text is used";
            return Err(minicache_config::ConfigError::new("tasks", message).into());
        }
        let mut inputs = IndexMap::new();
        for task in &experiment.tasks {
            inputs.insert(task.clone(), Input::load(experiment, task, &context.data)?);
        }
        if let Some(reason) = context.data.unreachable() {
            eprintln!("data sets that are not in the data folder come from the bundled sample: {reason}");
        }
        let mut models = IndexMap::new();
        for name in &experiment.models {
            let weights = experiment.kind.needs_weights();
            models.insert(name.clone(), if weights { describe(name)? } else { describe_shape(name)? });
        }
        let mut planned: Vec<Planned> = Vec::with_capacity(listed.len());
        for cell in listed {
            let model = &models[&cell.model];
            cell.cache.validate_for(&model.shape).map_err(|e| e.under("cache"))?;
            let data = inputs.get(&cell.task).map(Input::fingerprint);
            let key = key::of(experiment, &cell, model, data);
            // Two spellings of one cache (start_layer "half" and 15 of 30) are one cell.
            if !planned.iter().any(|p| p.key == key) {
                let names = names(experiment, &cell, model.shape.layers);
                planned.push(Planned { cell, key, names });
            }
        }
        let shapes = models.into_iter().map(|(name, model)| (name, model.shape)).collect();
        Ok(Self { experiment, cells: planned, inputs, shapes })
    }

    /// The store, opened for this plan.
    fn store(&self, results: &Path) -> Result<Store> {
        let fixed = |columns: &[&str]| columns.iter().map(|c| (*c).to_string()).collect();
        let columns: Vec<String> = match self.experiment.kind {
            Kind::Similarity => fixed(similarity::COLUMNS),
            Kind::Fidelity => fixed(fidelity::COLUMNS),
            Kind::Accuracy => accuracy::columns(self.inputs.values()),
            Kind::Memory => fixed(memory::COLUMNS),
            Kind::Throughput => fixed(throughput::COLUMNS),
            Kind::Overhead => fixed(overhead::COLUMNS),
        };
        let dir = results.join(&self.experiment.id);
        let mut swept: Vec<&String> = Vec::new();
        for key in self.cells.iter().flat_map(|p| p.cell.swept.keys()) {
            if !swept.contains(&key) {
                swept.push(key);
            }
        }
        // Every cell has every naming column, so that the columns of the file are those of the plan.
        let named = |p: &Planned| {
            let mut names: Row = ["model", "task", "variant"]
                .iter()
                .map(|c| ((*c).to_string(), p.names[*c].clone()))
                .collect();
            for key in &swept {
                names.insert((*key).clone(), p.names.get(*key).cloned().unwrap_or_default());
            }
            names.insert("cache".into(), p.names["cache"].clone());
            (p.key.clone(), names)
        };
        let plan: Vec<_> = self.cells.iter().map(named).collect();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        Ok(Store::open(&dir, &plan, &columns)?)
    }

    /// Models with their settings, in plan order.
    fn models(&self) -> Vec<(&str, &ModelSettings)> {
        let mut models: Vec<(&str, &ModelSettings)> = Vec::new();
        for p in &self.cells {
            let model = (p.cell.model.as_str(), &p.cell.settings);
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }

    /// Tokens that go through a model for `cells`, at most.
    fn tokens(&self, cells: &[&Planned]) -> usize {
        match self.experiment.kind {
            Kind::Similarity => cells
                .iter()
                .map(|p| self.inputs[&p.cell.task].len() * self.experiment.similarity.tokens)
                .sum(),
            Kind::Fidelity => fidelity::tokens(self, cells),
            Kind::Accuracy => accuracy::tokens(self, cells),
            Kind::Throughput => throughput::tokens(&self.experiment.bench, cells.len()),
            Kind::Memory | Kind::Overhead => 0,
        }
    }
}

/// What names a cell in its rows.
fn names(experiment: &Experiment, cell: &Cell, layers: usize) -> Row {
    let mut names = Row::new();
    names.insert("model".into(), cell.model.clone());
    names.insert("task".into(), cell.task.clone());
    let caches = experiment.kind != Kind::Similarity;
    names.insert("variant".into(), if caches { cell.variant.clone() } else { String::new() });
    names.extend(cell.swept.clone());
    names.insert(
        "cache".into(),
        if caches { key::cache_json(&cell.cache, layers).to_string() } else { String::new() },
    );
    names
}

/// The model, and the documents of calibration text that it or its caches were made with.
fn load(
    model: &str,
    settings: &ModelSettings,
    cells: &[&Planned],
    context: &Context,
) -> Result<(Model, BTreeSet<String>)> {
    let options = LoadOptions { weights: settings.weights, ..context.load.clone() };
    let mut loaded = Model::load(model, &options)?;
    for p in cells {
        p.cell.cache.validate_for(loaded.decoder.shape()).map_err(|e| e.under("cache"))?;
    }
    let mut used = BTreeSet::new();
    if let Some(calibration) = &settings.align {
        let text = CalibrationText::read(calibration, loaded.need_tokenizer()?, &context.data)?;
        let alignment = loaded.alignment(text.chunks())?;
        drop(loaded);
        loaded = Model::load_aligned(model, &options, &alignment)?;
        used.extend(text.documents);
    }
    used.extend(calibration::prepare(&loaded, cells.iter().map(|p| &p.cell.cache), &context.data)?);
    Ok((loaded, used))
}

/// The experiment's results folder below `results`.
pub fn folder(results: &Path, experiment: &Experiment) -> PathBuf {
    results.join(&experiment.id)
}

/// `run.json` of an experiment's folder, where there is one.
pub(crate) fn previous(dir: &Path) -> Option<RunInfo> {
    RunInfo::read(dir).ok()
}
