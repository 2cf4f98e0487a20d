//! The kinds of experiments, and the settings of each.

use serde::{Deserialize, Serialize};

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
    /// Bytes that caches may take together; a method stops where it would not fit (throughput). Absent: no limit on the
    /// host, on a GPU what the model leaves free.
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
