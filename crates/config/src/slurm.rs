//! What sites with Slurm differ in: the file that `minicache submit --slurm` takes.

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::bounds::{MOST_CELLS, check_number};
use crate::{ConfigError, Result};

/// Restarts of a task that was killed, at most.
const MOST_RESTARTS: u32 = 100;
/// Seconds of a day: no warning is longer.
const DAY: u32 = 86_400;

/// How jobs are submitted. What is absent is left to the site's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slurm {
    /// `--partition`.
    pub partition: Option<String>,
    /// `--account`.
    pub account: Option<String>,
    /// `--qos`.
    pub qos: Option<String>,
    /// Longest time of a task, as Slurm has it: `24:00:00`, `2-00:00:00`, or minutes.
    pub time: Option<String>,
    /// GPUs of a task: a number, or with their type, such as `a100:1`.
    pub gpus: Option<Gpus>,
    /// CPUs of a task.
    pub cpus: Option<usize>,
    /// Memory of a task, such as `64G`.
    pub memory: Option<String>,
    /// `--constraint`, such as `a100|h100`.
    pub constraint: Option<String>,
    /// Modules that are loaded first.
    pub modules: Vec<String>,
    /// What the command is put behind, such as `apptainer exec --nv minicache.sif`.
    pub container: Option<String>,
    /// Variables of the environment.
    pub environment: IndexMap<String, String>,
    /// Further options of `sbatch`, each as it is written: `--exclusive`, `--nodelist=a[1-3]`.
    pub options: Vec<String>,
    /// Tasks of the array, at most.
    pub max_tasks: usize,
    /// Tasks at a time, at most.
    pub array_limit: Option<usize>,
    /// Whether tasks that are preempted, come to the end of their time or lose their machine are queued again.
    pub requeue: bool,
    /// How often a task that was killed without a warning is queued again.
    pub restarts: u32,
    /// Seconds before its end at which a task is warned (SIGUSR1), to finish the samples at hand.
    pub warning: u32,
    /// Minutes of work that are worth a task of their own, by estimate.
    pub shortest_minutes: f64,
    /// How many times as fast a task is as the two CPU cores that estimates are for; absent: by the rows that are there.
    pub speed: Option<f64>,
    /// The partition of the last job, which needs no GPU; absent: `partition`.
    pub report_partition: Option<String>,
}

impl Default for Slurm {
    fn default() -> Self {
        Self {
            partition: None,
            account: None,
            qos: None,
            time: None,
            gpus: None,
            cpus: None,
            memory: None,
            constraint: None,
            modules: Vec::new(),
            container: None,
            environment: IndexMap::new(),
            options: Vec::new(),
            max_tasks: 64,
            array_limit: None,
            requeue: true,
            restarts: 3,
            warning: 120,
            shortest_minutes: 10.0,
            speed: None,
            report_partition: None,
        }
    }
}

/// GPUs of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Gpus {
    /// So many, of any type.
    Number(usize),
    /// As `--gpus` has them.
    Text(String),
}

impl std::fmt::Display for Gpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Gpus::Number(n) => n.fmt(f),
            Gpus::Text(text) => f.write_str(text),
        }
    }
}

impl Slurm {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read; TOML, type, key or value errors with file, line and key.
    pub fn load(path: &Path) -> Result<Self> {
        let text = crate::read_text(path)?;
        Self::from_toml(&text).map_err(|e| e.in_file(path, &text))
    }

    /// Parses and checks the text of a file.
    ///
    /// # Errors
    /// As [`Slurm::load`], without the file's name.
    pub fn from_toml(text: &str) -> Result<Self> {
        let slurm: Self = crate::toml_from_str(text).map_err(|e| crate::error::from_toml(&e, text))?;
        slurm.check()?;
        Ok(slurm)
    }

    fn check(&self) -> Result<()> {
        let gpus = self.gpus.as_ref().map(ToString::to_string);
        for (key, value) in [
            ("partition", &self.partition),
            ("account", &self.account),
            ("qos", &self.qos),
            ("time", &self.time),
            ("gpus", &gpus),
            ("memory", &self.memory),
            ("constraint", &self.constraint),
            ("report_partition", &self.report_partition),
        ] {
            value.as_ref().map_or(Ok(()), |value| word(key, value))?;
        }
        self.modules.iter().enumerate().try_for_each(|(i, m)| word(&format!("modules.{i}"), m))?;
        for (index, option) in self.options.iter().enumerate() {
            let key = format!("options.{index}");
            line(&key, option)?;
            if !option.starts_with('-') {
                return Err(ConfigError::new(key, format!("`{option}` is no option; they begin with `-`")));
            }
        }
        self.container.as_ref().map_or(Ok(()), |text| line("container", text))?;
        for (name, value) in &self.environment {
            let key = format!("environment.{name}");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || !name.chars().all(plain) || name.starts_with(|c: char| c.is_ascii_digit()) {
                let message = "must be a name of letters, digits and `_`, not first a digit";
                return Err(ConfigError::new(key, message));
            }
            line(&key, value)?;
        }
        check_number("max_tasks", self.max_tasks, 1..=MOST_CELLS)?;
        self.array_limit.map_or(Ok(()), |n| check_number("array_limit", n, 1..=MOST_CELLS))?;
        self.cpus.map_or(Ok(()), |n| check_number("cpus", n, 1..=crate::bounds::MOST_THREADS))?;
        check_number("restarts", self.restarts, 0..=MOST_RESTARTS)?;
        check_number("warning", self.warning, 1..=DAY)?;
        check_number("shortest_minutes", self.shortest_minutes, 0.0..=f64::from(DAY))?;
        self.speed.map_or(Ok(()), |speed| check_number("speed", speed, 1e-3..=1e6))?;
        Ok(())
    }
}

/// A value that stands in a line of a script as it is.
fn word(key: &str, value: &str) -> Result<()> {
    line(key, value)?;
    if value.is_empty()
        || value.chars().any(char::is_whitespace)
        || value.contains(['\'', '"', '`', '$', '\\', ';'])
    {
        return Err(ConfigError::new(key, format!("`{value}` must be one word, without quotes")));
    }
    Ok(())
}

/// A value that does not end its line.
fn line(key: &str, value: &str) -> Result<()> {
    if value.chars().any(char::is_control) {
        return Err(ConfigError::new(key, "must be one line"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_a_site_differs_in() {
        let text = "partition = \"gpu\"\ngpus = \"a100:1\"\ntime = \"24:00:00\"\nmax_tasks = 8\n[environment]\nHF_HOME = \"/scratch/hf\"\n";
        let slurm = Slurm::from_toml(text).unwrap();
        assert_eq!((slurm.gpus.unwrap().to_string(), slurm.max_tasks), ("a100:1".into(), 8));
        assert_eq!((slurm.requeue, slurm.restarts, &*slurm.environment["HF_HOME"]), (true, 3, "/scratch/hf"));
        assert_eq!(Slurm::from_toml("gpus = 2").unwrap().gpus.unwrap().to_string(), "2");
        assert_eq!(Slurm::from_toml("").unwrap(), Slurm::default());
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        for (text, words) in [
            ("\npartitoin = \"gpu\"", "x.toml:2: "),
            ("partition = \"a b\"", "x.toml:1: partition: "),
            ("max_tasks = 0", "max_tasks: must be at least 1"),
            ("account = \"a\\nb\"", "account: must be one line"),
            ("options = [\"exclusive\"]", "no option"),
            ("cpus = 1\n[environment]\n\"A B\" = \"x\"", "environment.A B"),
            ("warning = 0", "warning: "),
            ("speed = 0.0", "speed: "),
        ] {
            let e = Slurm::from_toml(text).unwrap_err().in_file(Path::new("x.toml"), text).to_string();
            assert!(e.contains(words), "{text}: {e}");
        }
    }
}
