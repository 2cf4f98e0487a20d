//! `results/<id>/run.json`: what made the rows of `cells.csv` beside it.

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::{ConfigError, Experiment, Result};

/// A model as it was loaded.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelInfo {
    /// Name for readers, such as `SmolLM2-135M-Instruct`.
    pub label: String,
    /// Form of the weights, such as `Q4_1 (GGUF)` or `bf16`.
    pub weights: String,
    /// Decoder layers.
    pub layers: Option<usize>,
    /// KV heads per layer.
    pub kv_heads: Option<usize>,
    /// Numbers per head.
    pub head_dim: Option<usize>,
}

/// What was run, on what and where: the head of every report. The runner writes it before the first cell and again
/// after the last; reports read it. Only `experiment` has to be there, and unknown keys are passed over, so reports
/// read the files of older and newer runners.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The command line that repeats the run.
    #[serde(default)]
    pub command: String,
    /// The experiment as it was run: after profile and overrides.
    pub experiment: Experiment,
    /// Task name to where its data came from, such as `bundled sample` or `openai/gsm8k, test.jsonl`.
    #[serde(default)]
    pub origins: IndexMap<String, String>,
    /// Model name, as in the `model` column, to what it is.
    #[serde(default)]
    pub models: IndexMap<String, ModelInfo>,
    /// `VARIANT, MODEL` to the cache that `pairs = "auto"` or `group = "auto"` came to, as JSON.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub chosen: IndexMap<String, String>,
    /// What was to be calibrated on, such as `8192 tokens of longbench`, to what the text came to.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub calibrations: IndexMap<String, String>,
    /// Processor, cores, memory.
    #[serde(default)]
    pub machine: String,
    /// The GPUs that models and caches were on; empty on the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// The instruction set of the kernels, such as `avx512`: results of others differ in the last digits.
    #[serde(default)]
    pub simd: String,
    /// Day of the run, as `2025-01-31`.
    #[serde(default)]
    pub date: String,
    /// Cells in the plan.
    #[serde(default)]
    pub planned: usize,
    /// Their keys, as in the `key` column. Rows of other keys are of other plans: another model or another sweep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Whether every cell of the plan is done.
    #[serde(default)]
    pub finished: bool,
}

impl RunInfo {
    /// Name of the file in an experiment's results folder.
    pub const FILE: &'static str = "run.json";

    /// Reads `run.json` of the results folder `dir`.
    ///
    /// # Errors
    /// The file cannot be read, or is no such JSON; the error names the file and the key.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(Self::FILE);
        let fail = |key: String, message: String| {
            let file = Some(path.clone());
            ConfigError { file, line: None, key, message }
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|e| fail(String::new(), format!("cannot read what was run: {e}")))?;
        let mut json = serde_json::Deserializer::from_str(&text);
        let info: Self = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            let key = e.path().to_string();
            fail(if key == "." { String::new() } else { key }, e.into_inner().to_string())
        })?;
        info.experiment.check_names().map_err(|e| fail(format!("experiment.{}", e.key), e.message))?;
        Ok(info)
    }

    /// Writes `run.json` into the results folder `dir`, whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        let path = dir.join(Self::FILE);
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        crate::atomic::replace(&path, text.as_bytes())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TOML: &str = r#"
id = "table2"
kind = "accuracy"
models = ["smollm2-135m"]
tasks = ["gsm8k"]
[cache]
method = "minicache"
start_layer = "half"
retention = { rule = "most_distinct", gamma = 0.05 }
[sweep]
"cache.retention.gamma" = [0.0, 0.05, 1.0]
[[plots]]
name = "gamma"
x = "cache.retention.gamma"
y = "exact_match"
"#;

    fn info() -> RunInfo {
        let shape = ModelInfo { label: "SmolLM2".into(), layers: Some(30), ..ModelInfo::default() };
        RunInfo {
            command: "minicache run experiments/table2.toml".into(),
            experiment: Experiment::from_toml(TOML, &[], None).unwrap(),
            origins: [("gsm8k".to_string(), "bundled sample".to_string())].into_iter().collect(),
            models: [("smollm2-135m".to_string(), shape)].into_iter().collect(),
            chosen: IndexMap::new(),
            calibrations: IndexMap::new(),
            machine: "2 cores".into(),
            device: String::new(),
            simd: "avx2".into(),
            date: "2025-01-31".into(),
            planned: 3,
            keys: vec!["0123".into()],
            finished: true,
        }
    }

    fn folder(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("minicache-run-info-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn comes_back_as_written() {
        let dir = folder("same");
        info().write(&dir).unwrap();
        assert_eq!(RunInfo::read(&dir).unwrap(), info());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_error_names_the_file_and_the_key() {
        let dir = folder("bad");
        std::fs::write(dir.join(RunInfo::FILE), r#"{"experiment": {"id": "x", "kind": "speed"}}"#).unwrap();
        let error = RunInfo::read(&dir).unwrap_err();
        assert!(error.to_string().contains("run.json"), "{error}");
        assert_eq!(error.key, "experiment.kind");
        let text = serde_json::to_string(&info()).unwrap().replace("table2", "..");
        std::fs::write(dir.join(RunInfo::FILE), text).unwrap();
        let error = RunInfo::read(&dir).unwrap_err();
        assert_eq!(error.key, "experiment.id", "{error}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
