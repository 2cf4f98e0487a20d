//! An experiment file: what is run, on what, and how its report looks.

mod align;
mod check;
mod kinds;
mod overrides;
mod report;

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::{Claim, ConfigError, Result};
use minicache_core::CacheSpec;
use minicache_core::settings::{SettingError, Unread};
use overrides::apply;

pub use align::{ALIGN_LEVEL, Align};
pub use kinds::{Accuracy, Bench, Fidelity, Kind, Similarity};
pub use overrides::parse_value;
pub(crate) use overrides::set;
pub use report::{Paper, Plot, PlotKind};

/// How quantised weights are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightMode {
    /// The fastest form for this machine.
    #[default]
    Auto,
    /// Dequantised to f32: parity runs.
    F32,
    /// As stored in the file.
    Quantized,
}

/// How a model is loaded.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// Form of the weights.
    pub weights: WeightMode,
    /// Aligns adjacent layers on calibration text before running; absent: the model as it is.
    pub align: Option<Align>,
}

/// One line of comparison in an experiment: a named cache, with a sweep of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Name in tables and legends; by default the cache's label.
    #[serde(default)]
    pub name: Option<String>,
    /// Keys that differ from the experiment's `[cache]`.
    #[serde(default)]
    pub cache: toml::Table,
    /// Keys that differ from the experiment's `[model]`.
    #[serde(default)]
    pub model: toml::Table,
    /// Swept keys of this variant only.
    #[serde(default)]
    pub sweep: IndexMap<String, Vec<toml::Value>>,
}

/// Named alternatives, chosen with `--profile`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Models to run.
    pub models: Option<Vec<String>>,
    /// Tasks to run.
    pub tasks: Option<Vec<String>>,
    /// Samples per task.
    pub limit: Option<usize>,
    /// Samples of single tasks.
    pub limits: IndexMap<String, usize>,
    /// [`Accuracy::prompt_tokens`].
    pub prompt_tokens: Option<usize>,
    /// Values of swept keys, as [`Experiment::sweep_over`] takes them.
    pub sweep: IndexMap<String, Vec<toml::Value>>,
    /// Values of other keys, such as `"fidelity.prefill" = 256`.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub set: IndexMap<String, toml::Value>,
}

/// One experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Identifier; names the results folder.
    pub id: String,
    /// Title of the report.
    #[serde(default)]
    pub title: String,
    /// Where it stands among others in a report of all, the lowest first; those without a place follow by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<u32>,
    /// What is measured.
    pub kind: Kind,
    /// Registry names, model folders or `.gguf` files.
    #[serde(default)]
    pub models: Vec<String>,
    /// Task names.
    #[serde(default)]
    pub tasks: Vec<String>,
    /// Samples per task; absent: all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Samples of single tasks, instead of `limit`: a CoQA story is a dozen questions, a GSM8K problem one.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub limits: IndexMap<String, usize>,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// How models are loaded.
    #[serde(default)]
    pub model: ModelSettings,
    /// The defaults of every cell's cache.
    #[serde(default)]
    pub cache: toml::Table,
    /// Named caches compared; absent: just `[cache]`.
    #[serde(default)]
    pub variants: Vec<Variant>,
    /// Cartesian product over dotted keys, for every variant.
    #[serde(default)]
    pub sweep: IndexMap<String, Vec<toml::Value>>,
    /// `kind = "accuracy"`.
    #[serde(default)]
    pub accuracy: Accuracy,
    /// `kind = "fidelity"`.
    #[serde(default)]
    pub fidelity: Fidelity,
    /// `kind = "similarity"`.
    #[serde(default)]
    pub similarity: Similarity,
    /// `kind = "memory"`, `"throughput"` and `"overhead"`.
    #[serde(default)]
    pub bench: Bench,
    /// Named alternatives for models, tasks and limit.
    #[serde(default)]
    pub profiles: IndexMap<String, Profile>,
    /// The paper's figures.
    #[serde(default)]
    pub paper: Vec<Paper>,
    /// Claims of the paper that the rows judge.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub claims: Vec<Claim>,
    /// Figures of the report.
    #[serde(default)]
    pub plots: Vec<Plot>,
    /// Free text at the head of the report.
    #[serde(default)]
    pub notes: String,
}

impl Experiment {
    /// Reads and checks an experiment file, with `--set`-style overrides (`KEY=VALUE`) applied to it and the profile
    /// `profile` (if the file has it) taken.
    ///
    /// # Errors
    /// The file cannot be read; TOML, type, key or value errors with file, line and key.
    pub fn load(path: &Path, overrides: &[String], profile: Option<&str>) -> Result<Self> {
        let text = crate::read_text(path)?;
        let plain = Self::from_toml(&text, &[], profile).map_err(|e| e.in_file(path, &text))?;
        if overrides.is_empty() { Ok(plain) } else { Self::from_toml(&text, overrides, profile) }
    }

    /// Parses and checks the text of an experiment file.
    ///
    /// # Errors
    /// As [`Experiment::load`], without the file's name.
    pub fn from_toml(text: &str, overrides: &[String], profile: Option<&str>) -> Result<Self> {
        let locate = |e: &toml::de::Error| crate::error::from_toml(e, text);
        let read = || crate::toml_from_str::<toml::Table>(text).map_err(|e| locate(&e));
        let mut experiment: Self = if overrides.is_empty() {
            crate::toml_from_str(text).map_err(|e| locate(&e))?
        } else {
            overridden(read()?, &IndexMap::new(), overrides)?
        };
        if let Some(profile) = profile.and_then(|name| experiment.profiles.get(name))
            && !profile.set.is_empty()
        {
            experiment = overridden(read()?, &profile.set, overrides)?;
        }
        if let Some(name) = profile {
            experiment.take_profile(name, overrides)?;
        }
        experiment.validate()?;
        Ok(experiment)
    }

    /// Takes what the profile says, but for what `overrides` have set.
    fn take_profile(&mut self, name: &str, overrides: &[String]) -> Result<()> {
        let Some(profile) = self.profiles.get(name).cloned() else {
            if name == "default" {
                return Ok(());
            }
            let known: Vec<_> = self.profiles.keys().map(String::as_str).collect();
            let message = format!("no profile `{name}` in this experiment; it has: {}", known.join(", "));
            return Err(ConfigError::new("profiles", message));
        };
        let is_free = |key: &str| {
            let set = |o: &String| o.split_once('=').is_some_and(|(k, _)| k.trim() == key);
            !overrides.iter().any(set)
        };
        if let Some(models) = profile.models.filter(|_| is_free("models")) {
            self.models = models;
        }
        if let Some(tasks) = profile.tasks.filter(|_| is_free("tasks")) {
            self.tasks = tasks;
        }
        if profile.limit.is_some() && is_free("limit") {
            self.limit = profile.limit;
            self.limits.clear();
        }
        if is_free("limit") {
            self.limits.extend(profile.limits);
        }
        if is_free("accuracy.prompt_tokens") {
            self.accuracy.prompt_tokens = profile.prompt_tokens.or(self.accuracy.prompt_tokens);
        }
        for (key, values) in &profile.sweep {
            self.sweep_over(key, values);
        }
        Ok(())
    }

    /// Samples of `task`; `None`: all.
    pub fn limit_of(&self, task: &str) -> Option<usize> {
        self.limits.get(task).copied().or(self.limit)
    }

    /// Sweeps `key` over `values`: in place of the values of every variant that sweeps it, or else for all variants.
    pub fn sweep_over(&mut self, key: &str, values: &[toml::Value]) {
        let mut own = false;
        for swept in self.variants.iter_mut().filter_map(|v| v.sweep.get_mut(key)) {
            swept.clear();
            swept.extend_from_slice(values);
            own = true;
        }
        if !own {
            self.sweep.insert(key.to_string(), values.to_vec());
        }
    }
}

/// The experiment in `table`, with the values that a profile sets, and on top of them what the command line does.
fn overridden(
    mut table: toml::Table,
    profile: &IndexMap<String, toml::Value>,
    overrides: &[String],
) -> Result<Experiment> {
    for (key, value) in profile {
        set(&mut table, key, value.clone()).map_err(|e| e.under("profiles.set"))?;
    }
    for assignment in overrides {
        apply(&mut table, assignment)?;
    }
    serde_path_to_error::deserialize(table).map_err(|e: serde_path_to_error::Error<toml::de::Error>| {
        let after: String = overrides.iter().map(|o| format!(" --set {o}")).collect();
        let after = if overrides.is_empty() { " what the profile sets" } else { &after };
        ConfigError::new(e.path().to_string(), format!("{} (after{after})", e.inner().message()))
    })
}

/// `[cache]`, a variant's keys and swept keys, read as one cache. Keys that several methods share are left out where one
/// does not read them.
pub(crate) fn cache_of(table: toml::Table) -> Result<CacheSpec> {
    Ok(CacheSpec::from_table(table, Unread::Drop).map_err(|e: SettingError| e.under("cache"))?)
}

/// `table` as a `T`, with the dotted key below `root` in the error.
pub(crate) fn typed<T: serde::de::DeserializeOwned>(table: toml::Table, root: &str) -> Result<T> {
    serde_path_to_error::deserialize(table).map_err(|e: serde_path_to_error::Error<toml::de::Error>| {
        let path = e.path().to_string();
        let key = if path == "." { root.to_string() } else { format!("{root}.{path}") };
        ConfigError::new(key, e.inner().message().to_string())
    })
}
