//! The cells of an experiment with their data: what can be known before a model is loaded.

use std::path::PathBuf;

use indexmap::IndexMap;
use minicache_config::{Cell, ConfigError, Experiment, Kind, ModelSettings, cells};
use minicache_core::settings::Calibration;
use minicache_core::{CacheSpec, ModelShape};
use minicache_models::{Description, Registry, Tokenizer};

use super::calibration::Measured;
use super::input::Input;
use super::{
    Context, Result, RunError, accuracy, fidelity, key, memory, overhead, previous, similarity, throughput,
};
use crate::store::{Finished, Row, SAMPLE, Store};
use crate::tasks::texts;

/// A cell with what names it in results.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) cell: Cell,
    pub(super) key: String,
    pub(super) names: Row,
}

impl Planned {
    pub(super) fn is_of(&self, model: &str, settings: &ModelSettings) -> bool {
        self.cell.model == model && self.cell.settings == *settings
    }
}

/// The cells of an experiment with the data that they need.
pub(super) struct Plan<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) cells: Vec<Planned>,
    /// By task; empty for kinds without tasks.
    pub(super) inputs: IndexMap<String, Input>,
    /// By model.
    pub(super) shapes: IndexMap<String, ModelShape>,
    /// Cells of models that are not there, and why: they have no keys.
    pub(super) unknown: Vec<(Vec<Cell>, RunError)>,
    /// How many they are.
    pub(super) missing: usize,
}

impl<'a> Plan<'a> {
    /// `describe` says what a model is, by its name. Where it cannot say that of some of several models, the plan is that
    /// of the others.
    pub(super) fn new(
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
        let mut models = IndexMap::new();
        let mut unknown: Vec<(Vec<Cell>, RunError)> = Vec::new();
        for name in &experiment.models {
            let weights = experiment.kind.needs_weights();
            match if weights { describe(name) } else { describe_shape(name) } {
                Ok(description) => {
                    models.insert(name.clone(), description);
                }
                Err(error) => {
                    unknown.push((listed.iter().filter(|c| c.model == *name).cloned().collect(), error));
                }
            }
        }
        if models.is_empty()
            && let Some((_, error)) = unknown.pop()
        {
            return Err(error);
        }
        let mut planned: Vec<Planned> = Vec::with_capacity(listed.len());
        let mut texts: Vec<(Calibration, serde_json::Value)> = Vec::new();
        for cell in listed {
            let Some(model) = models.get(&cell.model) else { continue };
            cell.cache.validate_for(&model.shape).map_err(|e| ConfigError::from(e.under("cache")))?;
            let data = inputs.get(&cell.task).map(Input::fingerprint);
            let mut calibrated = Vec::new();
            for calibration in calibrations(experiment, &cell) {
                let known = texts.iter().find(|(c, _)| c == calibration).map(|(_, text)| text.clone());
                let text = match known {
                    Some(text) => text,
                    None => {
                        let text = key::text(experiment, calibration, &inputs, &context.data)?;
                        texts.push((calibration.clone(), text.clone()));
                        text
                    }
                };
                calibrated.push(text);
            }
            let key = key::of(experiment, &cell, model, data, &calibrated);
            // Two spellings of one cache (start_layer "half" and 15 of 30) are one cell.
            if !planned.iter().any(|p| p.key == key) {
                let names = names(experiment, &cell, model.shape.layers);
                planned.push(Planned { cell, key, names });
            }
        }
        if let Some(results) = &context.again {
            let there = [results.clone(), results.join(SAMPLE)]
                .map(|folder| Finished::read(&folder.join(&experiment.id)))
                .into_iter()
                .collect::<std::result::Result<Vec<_>, _>>()?;
            planned.retain(|p| there.iter().any(|of| of.cells.contains_key(&p.key)));
        }
        let shapes = models.into_iter().map(|(name, model)| (name, model.shape)).collect();
        let missing = unknown.iter().map(|(cells, _)| cells.len()).sum();
        Ok(Self { experiment, cells: planned, inputs, shapes, unknown, missing })
    }

    /// Task name to where its data comes from.
    pub(super) fn origins(&self) -> IndexMap<String, String> {
        self.inputs.iter().map(|(task, input)| (task.clone(), input.origin())).collect()
    }

    /// The experiment's results folder: below `sample/` where all of its data is the bundled sample, or where rows on
    /// it would take the place of rows on real data.
    pub(super) fn folder(&self, context: &Context) -> PathBuf {
        let folder = context.results.join(&self.experiment.id);
        let before = previous(&folder).map(|info| info.origins).unwrap_or_default();
        let sample = |input: &Input| input.is_sample();
        let replaces = |(task, input): (&String, &Input)| {
            sample(input) && before.get(task).is_some_and(|origin| *origin != input.origin())
        };
        let all = match self.inputs.len() {
            0 => !context.data.is_real(),
            _ => self.inputs.values().all(sample),
        };
        if all || self.inputs.iter().any(replaces) {
            context.results.join(SAMPLE).join(&self.experiment.id)
        } else {
            folder
        }
    }

    /// The store in the experiment's folder, opened for this plan.
    pub(super) fn store(&self, context: &Context) -> Result<Store> {
        let fixed = |columns: &[&str]| columns.iter().map(|c| (*c).to_string()).collect();
        let columns: Vec<String> = match self.experiment.kind {
            Kind::Similarity => fixed(similarity::COLUMNS),
            Kind::Fidelity => fixed(fidelity::COLUMNS),
            Kind::Accuracy => accuracy::columns(self.inputs.values()),
            Kind::Memory => fixed(memory::COLUMNS),
            Kind::Throughput => fixed(throughput::COLUMNS),
            Kind::Overhead => fixed(overhead::COLUMNS),
        };
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
        Ok(Store::open(&self.folder(context), &plan, &columns)?)
    }

    /// Models with their settings, in plan order.
    pub(super) fn models(&self) -> Vec<(&str, &ModelSettings)> {
        let mut models: Vec<(&str, &ModelSettings)> = Vec::new();
        for p in &self.cells {
            let model = (p.cell.model.as_str(), &p.cell.settings);
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }

    /// What this experiment measures on, which nothing may be calibrated on.
    pub(super) fn measured(&self, tokenizer: &Tokenizer, context: &Context) -> Result<Measured> {
        let mut measured = Measured::default();
        for (task, input) in &self.inputs {
            match input {
                Input::Documents(suite, _) => {
                    for member in &suite.tasks {
                        let limit = self.experiment.limit_of(task);
                        measured.add(suite, &texts(member.name(), &context.data, limit)?.docs);
                    }
                }
                Input::Texts(suite, texts) if self.experiment.kind == Kind::Fidelity => {
                    let used = fidelity::documents(self.experiment, &texts.docs, tokenizer)?;
                    measured.add(suite, texts.docs.iter().filter(|d| used.contains(&d.id)));
                }
                Input::Texts(suite, texts) => measured.add(suite, &texts.docs),
            }
        }
        Ok(measured)
    }

    /// The cell that others of `model` and `task` are compared with: the full cache's, of the model as it is.
    pub(super) fn reference(&self, model: &str, task: &str) -> Option<&Planned> {
        let full =
            |p: &&Planned| matches!(p.cell.cache, CacheSpec::Full(_)) && p.cell.settings.align.is_none();
        self.cells.iter().filter(|p| p.cell.model == model && p.cell.task == task).find(full)
    }

    /// Tokens that go through a model for `cells`, at most.
    pub(super) fn tokens(&self, cells: &[&Planned]) -> usize {
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

/// The texts that a cell is calibrated on.
fn calibrations<'c>(experiment: &Experiment, cell: &'c Cell) -> impl Iterator<Item = &'c Calibration> {
    let cache = cell.cache.calibration().filter(|_| experiment.kind.needs_weights());
    cell.settings.align.iter().map(|align| &align.text).chain(cache)
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

#[cfg(test)]
mod tests {
    use minicache_config::columns::is_known;

    use super::*;

    #[test]
    fn every_column_that_is_written_is_in_the_table_of_columns() {
        let fixed =
            [similarity::COLUMNS, fidelity::COLUMNS, memory::COLUMNS, throughput::COLUMNS, overhead::COLUMNS];
        let accuracy = accuracy::columns(std::iter::empty());
        let all = fixed.into_iter().flatten().copied().chain(accuracy.iter().map(String::as_str));
        for column in all {
            assert!(is_known(column), "{column}");
        }
    }
}
