//! What is checked of an experiment: names that become those of files, and numbers within their bounds.

use std::path::Path;

use super::{Bench, Experiment, Fidelity, cache_of};
use crate::bounds::{MOST_BYTES, MOST_SAMPLES, MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS, check_number};
use crate::{ConfigError, Result};

/// What stands in a results folder beside the experiments.
const RESERVED: [&str; 3] = ["sample", "index.html", "verdict.md"];
/// Names of folders have an end.
const LONGEST_ID: usize = 100;

impl Experiment {
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

    pub(super) fn validate(&self) -> Result<()> {
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

/// Checks a number of samples.
fn check_limit(key: &str, limit: usize) -> Result<()> {
    check_number(key, limit, 1..=MOST_SAMPLES).map_err(|e| {
        let message = format!("{}; leave it out for all samples", e.message);
        ConfigError::new(e.key, message)
    })
}
