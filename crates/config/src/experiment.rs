//! An experiment file: what is run, on what, and how its report looks.

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::bounds::{MOST_BYTES, MOST_SAMPLES, MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS, check_number};
use crate::{Claim, ConfigError, Result};
use minicache_core::CacheSpec;
use minicache_core::settings::{Calibration, SettingError, Unread};

/// What stands in a results folder beside the experiments.
const RESERVED: [&str; 3] = ["sample", "index.html", "verdict.md"];
/// Names of folders have an end.
const LONGEST_ID: usize = 100;

/// What an experiment measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Similarity of adjacent layers' states.
    Similarity,
    /// Task scores.
    Accuracy,
    /// Perplexity, KL and top-1 agreement with the full cache, teacher-forced.
    Fidelity,
    /// Bytes, computed from the model's shape.
    Memory,
    /// Tokens per second and peak memory of whole batches.
    Throughput,
    /// Time of each step of the method.
    Overhead,
}

impl Kind {
    /// The name in experiment files.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Similarity => "similarity",
            Kind::Accuracy => "accuracy",
            Kind::Fidelity => "fidelity",
            Kind::Memory => "memory",
            Kind::Throughput => "throughput",
            Kind::Overhead => "overhead",
        }
    }

    /// Whether it is measured on the texts of tasks.
    pub fn reads_tasks(self) -> bool {
        matches!(self, Kind::Similarity | Kind::Accuracy | Kind::Fidelity)
    }

    /// Whether it needs a model's weights, not just its shape.
    pub fn needs_weights(self) -> bool {
        !matches!(self, Kind::Memory | Kind::Overhead)
    }
}

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
    pub align: Option<Calibration>,
}

/// Settings of `kind = "fidelity"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fidelity {
    /// Tokens prefilled, then compressed.
    pub prefill: usize,
    /// Tokens teacher-forced after it.
    pub continuation: usize,
    /// Tokens of the continuation fed per step. Within a step attention reads the step's own states exactly, so 1
    /// (the default) is decoding as it is, every token compressed before the next one reads it, and `continuation`
    /// measures the compressed prompt alone.
    pub chunk: usize,
    /// Windows that go through the model side by side, at most; by default 8. It makes no difference to the results.
    #[serde(skip_serializing)]
    pub batch: Option<usize>,
}

impl Default for Fidelity {
    fn default() -> Self {
        Self { prefill: 768, continuation: 256, chunk: 1, batch: None }
    }
}

/// Settings of `kind = "accuracy"`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Accuracy {
    /// Tokens of a prompt, at most, in tasks that cut the middle out of prompts that are too long (LongBench): fewer
    /// than the model could take, where those are too slow. Prompts of other tasks are never cut by it.
    pub prompt_tokens: Option<usize>,
    /// Sequences that go through the model side by side, at most; by default 48. It makes no difference to the results.
    #[serde(skip_serializing)]
    pub batch: Option<usize>,
}

/// Settings of `kind = "similarity"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Similarity {
    /// Tokens looked at per sample, at most.
    pub tokens: usize,
    /// Also report by token position (bins of equal width over `tokens`).
    pub by_position: bool,
}

impl Default for Similarity {
    fn default() -> Self {
        Self { tokens: 512, by_position: false }
    }
}

/// Settings of `kind = "memory"`, `"throughput"` and `"overhead"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bench {
    /// Mean prompt length in tokens (throughput; ShareGPT: 161).
    pub input: usize,
    /// Mean output length in tokens (throughput; ShareGPT: 338).
    pub output: usize,
    /// Sequences side by side (memory, throughput).
    pub batch: Vec<usize>,
    /// Tokens of each sequence (memory, overhead).
    pub context: Vec<usize>,
    /// Decode steps that are timed for each batch size (throughput).
    pub steps: usize,
    /// Bytes that caches may take together; a method stops where it would not fit (throughput).
    pub memory_budget: Option<u64>,
    /// Mean cosine between adjacent layers of synthetic states (memory, overhead).
    pub similarity: f64,
    /// Its standard deviation over tokens.
    pub spread: f64,
}

impl Default for Bench {
    fn default() -> Self {
        Self {
            input: 161,
            output: 338,
            batch: vec![1, 4, 16],
            context: vec![1024],
            steps: 128,
            memory_budget: None,
            similarity: 0.85,
            spread: 0.05,
        }
    }
}

impl Bench {
    fn validate(&self) -> Result<()> {
        for (key, tokens) in [("input", self.input), ("output", self.output)] {
            check_number(key, tokens, 1..=MOST_TOKENS)?;
        }
        for (key, list, most) in
            [("batch", &self.batch, MOST_SEQUENCES), ("context", &self.context, MOST_TOKENS)]
        {
            if list.is_empty() || list.contains(&0) {
                return Err(ConfigError::new(key, "must list one number or more, each at least 1"));
            }
            list.iter().try_for_each(|&n| check_number(key, n, 1..=most))?;
        }
        // Every step of every sequence may end one, and the next is drawn beforehand.
        let batch = self.batch.iter().copied().max().unwrap_or(1);
        check_number("steps", self.steps, 1..=MOST_STEPS / batch)?;
        if let Some(bytes) = self.memory_budget {
            check_number("memory_budget", bytes, 1..=MOST_BYTES)?;
        }
        for (key, x, low) in [("similarity", self.similarity, -1.0), ("spread", self.spread, 0.0)] {
            if !(low..=1.0).contains(&x) {
                return Err(ConfigError::new(key, format!("must be within {low} to 1, not {x}")));
            }
        }
        Ok(())
    }
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
}

/// The paper's figures beside the measured ones: a CSV below `experiments/paper/`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paper {
    /// File name below `experiments/paper/`.
    pub csv: String,
    /// What the paper claims, in a sentence.
    #[serde(default)]
    pub claim: String,
}

/// How a figure is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlotKind {
    /// One line per series, with a band where `band` names a column.
    #[default]
    Line,
    /// Points, Pareto front marked.
    Scatter,
    /// Grouped bars.
    Bar,
    /// Radar chart.
    Radar,
}

/// One figure over the columns of `cells.csv`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plot {
    /// File name without extension.
    pub name: String,
    /// Title above the figure.
    #[serde(default)]
    pub title: String,
    /// How it is drawn.
    #[serde(default)]
    pub kind: PlotKind,
    /// Column on the x axis.
    pub x: String,
    /// Column on the y axis.
    pub y: String,
    /// Columns whose values together name a series.
    #[serde(default)]
    pub series: Vec<String>,
    /// Column with the half width of the band around y.
    #[serde(default)]
    pub band: Option<String>,
    /// Only rows with these column values.
    #[serde(default)]
    pub filter: IndexMap<String, String>,
    /// Logarithmic x axis.
    #[serde(default)]
    pub log_x: bool,
    /// Logarithmic y axis.
    #[serde(default)]
    pub log_y: bool,
    /// The paper's curves on the same axes: columns of the paper's CSV.
    #[serde(default)]
    pub paper_x: Option<String>,
    /// Columns of the paper's CSV, one curve each.
    #[serde(default)]
    pub paper_y: Vec<String>,
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
        let mut experiment: Self = if overrides.is_empty() {
            crate::toml_from_str(text).map_err(|e| locate(&e))?
        } else {
            let mut table: toml::Table = crate::toml_from_str(text).map_err(|e| locate(&e))?;
            for assignment in overrides {
                apply(&mut table, assignment)?;
            }
            serde_path_to_error::deserialize(table).map_err(
                |e: serde_path_to_error::Error<toml::de::Error>| {
                    let message =
                        format!("{} (after --set {})", e.inner().message(), overrides.join(" --set "));
                    ConfigError::new(e.path().to_string(), message)
                },
            )?
        };
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

    /// Checks the names that become those of files and folders.
    pub(crate) fn check_names(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if self.id.is_empty() || !self.id.chars().all(plain) || self.id.starts_with('.') {
            let message = "must be a plain name of letters, digits, `_`, `-` and `.`, not first a `.`";
            return Err(ConfigError::new("id", message));
        }
        if self.id.len() > LONGEST_ID {
            return Err(ConfigError::new("id", format!("must be at most {LONGEST_ID} characters long")));
        }
        if RESERVED.contains(&self.id.as_str()) {
            let message =
                format!("`{}` has a meaning of its own in a results folder; choose another", self.id);
            return Err(ConfigError::new("id", message));
        }
        for (index, paper) in self.paper.iter().enumerate() {
            let name = Path::new(&paper.csv);
            if name.file_name() != Some(name.as_os_str()) {
                let message = "must be the name of a file in `experiments/paper`, without folders";
                return Err(ConfigError::new(format!("paper.{index}.csv"), message));
            }
        }
        Ok(())
    }

    fn validate(&self) -> Result<()> {
        self.check_names()?;
        if self.models.is_empty() && !self.profiles.values().any(|p| p.models.is_some()) {
            return Err(ConfigError::new("models", "must name at least one model"));
        }
        if let Some(limit) = self.limit {
            check_limit("limit", limit)?;
        }
        self.limits.iter().try_for_each(|(task, limit)| check_limit(&format!("limits.{task}"), *limit))?;
        for (name, profile) in &self.profiles {
            let place = |key: &str| format!("profiles.{name}.{key}");
            profile.limit.map_or(Ok(()), |limit| check_limit(&place("limit"), limit))?;
            for (task, limit) in &profile.limits {
                check_limit(&place(&format!("limits.{task}")), *limit)?;
            }
            if let Some(tokens) = profile.prompt_tokens {
                check_number(&place("prompt_tokens"), tokens, 2..=MOST_TOKENS)?;
            }
        }
        if let Some(tokens) = self.accuracy.prompt_tokens {
            check_number("accuracy.prompt_tokens", tokens, 2..=MOST_TOKENS)?;
        }
        let Fidelity { prefill, continuation, chunk, batch } = self.fidelity;
        for (key, tokens) in [("prefill", prefill), ("continuation", continuation), ("chunk", chunk)] {
            check_number(&format!("fidelity.{key}"), tokens, 1..=MOST_TOKENS)?;
        }
        for (kind, batch) in [("fidelity", batch), ("accuracy", self.accuracy.batch)] {
            if let Some(batch) = batch {
                check_number(&format!("{kind}.batch"), batch, 1..=MOST_SEQUENCES)?;
            }
        }
        check_number("similarity.tokens", self.similarity.tokens, 1..=MOST_TOKENS)?;
        self.bench.validate().map_err(|e| e.under("bench"))?;
        if !self.kind.reads_tasks() && !self.tasks.is_empty() {
            let message = format!("experiments of kind {} run no tasks; leave it out", self.kind.name());
            return Err(ConfigError::new("tasks", message));
        }
        for (key, values) in &self.sweep {
            if values.is_empty() {
                return Err(ConfigError::new(format!("sweep.{key}"), "must list at least one value"));
            }
        }
        cache_of(self.cache.clone())?;
        crate::plan::cells(self).map(|_| ())
    }
}

/// Checks a number of samples.
fn check_limit(key: &str, limit: usize) -> Result<()> {
    check_number(key, limit, 1..=MOST_SAMPLES).map_err(|e| {
        let message = format!("{}; leave it out for all samples", e.message);
        ConfigError::new(e.key, message)
    })
}

/// Parts of a dotted key, at most; the deepest there is has five.
const MOST_PARTS: usize = 16;

/// Applies `KEY=VALUE` with a dotted key to `table`. VALUE is TOML, or a bare string.
fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let (key, value) = assignment
        .split_once('=')
        .ok_or_else(|| ConfigError::new("--set", format!("`{assignment}` is not KEY=VALUE")))?;
    if key.split('.').count() > MOST_PARTS {
        return Err(ConfigError::new("--set", format!("the key has more than {MOST_PARTS} parts")));
    }
    let value = value.trim();
    let parsed = parse_value(value);
    let digits = value.trim_start_matches(['+', '-']);
    if parsed.is_str() && !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '_') {
        let message = format!("`{value}` is no number that a setting can have (after --set {assignment})");
        return Err(ConfigError::new(key.trim(), message));
    }
    set(table, key.trim(), parsed)
}

/// A TOML value, or the text itself as a string: values as the command line takes them.
pub fn parse_value(text: &str) -> toml::Value {
    crate::toml_from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_string()))
}

/// Sets the dotted `key` to `value`, making tables on the way.
pub(crate) fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_string(), value);
            Ok(())
        }
        Some((head, rest)) => {
            let inner = table.entry(head).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            match inner {
                toml::Value::Table(t) => set(t, rest, value),
                _ => Err(ConfigError::new(
                    key,
                    format!("`{head}` is not a table, so `{rest}` cannot be set in it"),
                )),
            }
        }
    }
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
