//! `run.json`: what made the rows.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use minicache_config::{ModelInfo, ModelSettings, RunInfo, WeightMode};
use minicache_core::ModelShape;
use minicache_core::kernels::Isa;
use minicache_models::{Model, Registry};

use super::plan::Plan;
use super::{Context, Result};
use crate::store::{Store, StoreError, machine, today};

/// `run.json` while a run goes on.
pub(crate) struct Info {
    dir: PathBuf,
    /// Models in the order of the plan.
    order: Vec<String>,
    current: RunInfo,
}

impl Info {
    pub(crate) fn new(plan: &Plan<'_>, context: &Context, store: &Store, dir: &Path) -> Self {
        let previous = super::previous(dir);
        // Rows of other plans stand beside this one's: what was known of their models and data stays, as does what was
        // known of models whose cells are all finished, which are not loaded again.
        let known = |p: &RunInfo| (p.models.clone(), p.origins.clone());
        let (known_models, known_origins) = previous.as_ref().map(known).unwrap_or_default();
        let mut origins = plan.origins();
        for task in store.others("task") {
            if let (Some(origin), false) = (known_origins.get(task), origins.contains_key(task)) {
                origins.insert(task.to_string(), origin.clone());
            }
        }
        let mut models: IndexMap<String, ModelInfo> = IndexMap::new();
        for name in plan.models().into_iter().map(|(name, _)| name).chain(store.others("model")) {
            if let (Some(info), false) = (known_models.get(name), models.contains_key(name)) {
                models.insert(name.to_string(), info.clone());
            }
        }
        let current = RunInfo {
            command: context.command.clone(),
            experiment: plan.experiment.clone(),
            origins,
            models,
            calibrations: IndexMap::new(),
            chosen: IndexMap::new(),
            machine: machine(),
            simd: Isa::active().name().to_string(),
            device: context.device(),
            date: today(),
            planned: plan.cells.len() + plan.missing,
            keys: plan.cells.iter().map(|p| p.key.clone()).collect(),
            finished: false,
        };
        let order = plan.models().into_iter().map(|(name, _)| name.to_string()).collect();
        Self { dir: dir.to_path_buf(), order, current }
    }

    /// Records a loaded model.
    pub(crate) fn add(&mut self, name: &str, model: &Model, settings: &ModelSettings) {
        let registry = Registry::load().ok();
        let entry = registry.as_ref().and_then(|r| r.find(name));
        let form = if model.path.is_dir() { "safetensors" } else { "GGUF" };
        let mut weights = entry.map_or_else(|| form.to_string(), |e| format!("{} ({form})", e.dtype));
        match settings.weights {
            WeightMode::Auto => {}
            WeightMode::F32 => weights.push_str(", computed in f32"),
            WeightMode::Quantized => weights.push_str(", computed as stored"),
        }
        if let Some(align) = &settings.align {
            weights.push_str(&format!(", aligned on {} tokens", align.text.tokens));
        }
        let shape = model.decoder.shape();
        let info = ModelInfo {
            label: entry.map_or(model.name.as_str(), |e| e.title()).to_string(),
            weights,
            layers: Some(shape.layers),
            kv_heads: Some(shape.kv_heads),
            head_dim: Some(shape.head_dim),
        };
        self.current.models.insert(name.to_string(), info);
    }

    /// Records what was chosen for a variant on a model.
    pub(crate) fn add_chosen(&mut self, variant: &str, model: &str, cache: String) {
        self.current.chosen.insert(format!("{variant}, {model}"), cache);
    }

    /// Records what the text of a calibration came to.
    pub(crate) fn add_calibration(&mut self, asked: String, origin: String) {
        self.current.calibrations.insert(asked, origin);
    }

    /// Records a model of which only the shape is used.
    pub(crate) fn add_shape(&mut self, name: &str, shape: &ModelShape) {
        let registry = Registry::load().ok();
        let entry = registry.as_ref().and_then(|r| r.find(name));
        let info = ModelInfo {
            label: entry.map_or(name, |e| e.title()).to_string(),
            weights: String::new(),
            layers: Some(shape.layers),
            kv_heads: Some(shape.kv_heads),
            head_dim: Some(shape.head_dim),
        };
        self.current.models.insert(name.to_string(), info);
    }

    /// Writes the file, with what other runs of the same plan have put there: for who is alone with it. A finished run that
    /// is asked for again keeps its date, command, machine and instruction set: nothing changes.
    pub(crate) fn write(&mut self, finished: bool) -> Result<()> {
        let previous = super::previous(&self.dir);
        self.current.finished = finished;
        if let Some(previous) = &previous {
            self.take_over(previous);
            let mut same = self.current.clone();
            same.command.clone_from(&previous.command);
            same.machine.clone_from(&previous.machine);
            same.simd.clone_from(&previous.simd);
            same.device.clone_from(&previous.device);
            same.date.clone_from(&previous.date);
            if previous.keys.is_empty() {
                // Of a version that did not name them.
                same.keys.clear();
            }
            if same == *previous {
                return Ok(());
            }
        }
        self.current
            .write(&self.dir)
            .map_err(|source| StoreError::Write { path: self.dir.join(RunInfo::FILE), source })?;
        Ok(())
    }

    /// Takes in what `previous` knows and this run does not.
    fn take_over(&mut self, previous: &RunInfo) {
        let current = &mut self.current;
        let mut calibrations = previous.calibrations.clone();
        calibrations.extend(std::mem::take(&mut current.calibrations));
        current.calibrations = calibrations;
        let mut chosen = previous.chosen.clone();
        chosen.extend(std::mem::take(&mut current.chosen));
        current.chosen = chosen;
        if previous.keys == current.keys {
            for (name, info) in &previous.models {
                current.models.entry(name.clone()).or_insert_with(|| info.clone());
            }
            let place = |name: &str| self.order.iter().position(|of| of == name).unwrap_or(usize::MAX);
            current.models.sort_by_cached_key(|name, _| place(name));
        }
    }
}
