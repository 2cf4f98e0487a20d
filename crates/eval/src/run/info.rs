//! `run.json`: what made the rows.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minicache_config::{ModelInfo, ModelSettings, ModelShape, RunInfo, WeightMode};
use minicache_models::{Model, Registry};

use super::plan::Plan;
use super::{Context, Result};

/// `run.json` while a run goes on.
pub(crate) struct Info {
    dir: PathBuf,
    previous: Option<RunInfo>,
    current: RunInfo,
}

impl Info {
    pub(crate) fn new(plan: &Plan<'_>, context: &Context, dir: &Path) -> Self {
        let previous = super::previous(dir);
        // Rows of tasks and models that are not in this plan stand beside its own.
        let mut origins = previous.as_ref().map(|p| p.origins.clone()).unwrap_or_default();
        origins.extend(plan.inputs.iter().map(|(task, input)| (task.clone(), input.origin())));
        // Models whose cells are all finished are not loaded again, so what was known of them stays.
        let models = previous.as_ref().map(|p| p.models.clone()).unwrap_or_default();
        let current = RunInfo {
            command: context.command.clone(),
            experiment: plan.experiment.clone(),
            origins,
            models,
            calibrations: previous.as_ref().map(|p| p.calibrations.clone()).unwrap_or_default(),
            chosen: previous.as_ref().map(|p| p.chosen.clone()).unwrap_or_default(),
            machine: machine(),
            date: date(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())),
            planned: plan.cells.len(),
            finished: false,
        };
        Self { dir: dir.to_path_buf(), previous, current }
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
            weights.push_str(&format!(", aligned on {} tokens", align.tokens));
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

    /// Writes the file. A finished run that is asked for again keeps its date, command and machine: nothing changes.
    pub(crate) fn write(&mut self, finished: bool) -> Result<()> {
        self.current.finished = finished;
        if let Some(previous) = &self.previous {
            let mut same = self.current.clone();
            same.command.clone_from(&previous.command);
            same.machine.clone_from(&previous.machine);
            same.date.clone_from(&previous.date);
            if same == *previous {
                return Ok(());
            }
        }
        self.current.write(&self.dir)?;
        self.previous = Some(self.current.clone());
        Ok(())
    }
}

/// Processor, cores and memory.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines().find_map(|l| l.strip_prefix(name)?.split_once(':').map(|(_, v)| v.trim().to_string()))
    };
    let processor =
        field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kib =
        field(&read("/proc/meminfo"), "MemTotal").and_then(|v| v.trim_end_matches(" kB").parse::<f64>().ok());
    let memory = kib.map(|k| format!(", {:.0} GiB memory", k / 1024.0 / 1024.0)).unwrap_or_default();
    let plural = if cores == 1 { "" } else { "s" };
    format!("{processor}, {cores} core{plural}{memory}")
}

/// The day of `seconds` since 1970 as `2025-01-31` (days to civil date after Howard Hinnant's derivation: years that
/// start in March put the leap day last).
fn date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_named_by_the_calendar() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_735_689_599, "2024-12-31"),
            (1_735_689_600, "2025-01-01"),
        ] {
            assert_eq!(date(seconds), day);
        }
        assert!(machine().contains("core"));
    }
}
