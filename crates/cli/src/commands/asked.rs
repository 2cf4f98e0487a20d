//! Which experiments, and with what in place of what their files say: options of `minicache run` and `submit`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use minicache_config::bounds::{MOST_BYTES, MOST_SAMPLES, check_number};
use minicache_config::{Experiment, parse_value};
use minicache_eval::store::{Reuse, Worker};
use minicache_eval::tasks::Suite;

use crate::failure::usage;

/// Experiments with the options that change them.
#[derive(Debug, clap::Args)]
pub(crate) struct Asked {
    /// Experiment files, or the names of those in `experiments/`.
    #[arg(required = true, value_name = "EXPERIMENT")]
    pub(super) experiments: Vec<PathBuf>,
    /// Models to run instead of the experiment's: registry names, folders or `.gguf` files.
    #[arg(long, value_delimiter = ',', value_name = "M,..")]
    models: Vec<String>,
    /// Tasks to run instead of the experiment's; `minicache tasks` lists them.
    #[arg(long, value_delimiter = ',', value_name = "T,..")]
    tasks: Vec<String>,
    /// Samples per task, instead of the experiment's.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Sets a key of the experiment, such as `cache.start_layer=10`; may be given again.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Sweeps a key over values, such as `cache.retention.gamma=0,0.05`, in place of the experiment's; may be given
    /// again.
    #[arg(long, value_name = "KEY=V1,V2,..")]
    sweep: Vec<String>,
    /// The profile of models, tasks and limits.
    #[arg(long, default_value = "default", value_name = "P")]
    profile: String,
    /// Memory that the caches of a throughput experiment may take together, such as 8GiB: a cache stops at the batch
    /// size that does not fit. On a GPU what the model leaves free, where not given.
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
    /// Folder for results.
    #[arg(long, default_value = "results", value_name = "DIR")]
    pub(super) results: PathBuf,
    /// Start anew instead of going on where an earlier run stopped.
    #[arg(long)]
    pub(super) fresh: bool,
    /// Which finished cells are taken as they are: any, or only those computed in this checkout (own).
    #[arg(long, default_value = "any", value_name = "any|own", value_parser = reuse)]
    pub(super) reuse: Reuse,
}

impl Asked {
    /// Reads all experiments: a mistake in the last one should not show after an hour.
    pub(super) fn load(&self) -> Result<Vec<Experiment>> {
        self.experiments.iter().map(|path| load(path, self)).collect()
    }

    /// Begins work in the results folder.
    pub(super) fn worker(&self, command: &str) -> Result<Arc<Worker>> {
        let worker = Worker::of(&self.results, command)?;
        if self.fresh && worker.company()? > 1 {
            let mend = "wait until they end, or leave --fresh out to share their work";
            return Err(usage(format!(
                "--fresh: {}: other runs are at work there; {mend}",
                self.results.display()
            )));
        }
        Ok(worker)
    }
}

/// Reads an experiment file with the options of the command line on top.
fn load(name: &Path, args: &Asked) -> Result<Experiment> {
    let bare = name.extension().is_none() && name.components().count() == 1 && !name.is_file();
    let path =
        if bare { Path::new("experiments").join(name).with_extension("toml") } else { name.to_path_buf() };
    let mut experiment = Experiment::load(&path, &args.set, Some(&args.profile))?;
    if !args.models.is_empty() {
        experiment.models.clone_from(&args.models);
    }
    if !args.tasks.is_empty() {
        if !experiment.kind.reads_tasks() {
            return Err(usage(format!("--tasks: {} reads no task", path.display())));
        }
        for task in &args.tasks {
            Suite::find(task).map_err(|e| usage(format!("--tasks: {e}")))?;
        }
        experiment.tasks.clone_from(&args.tasks);
    }
    if let Some(limit) = args.limit {
        check_number("--limit", limit, 1..=MOST_SAMPLES)?;
        experiment.limit = args.limit;
        experiment.limits.clear();
    }
    if let Some(text) = &args.memory_budget {
        let bytes = size("--memory-budget", text)?;
        check_number("--memory-budget", bytes, 1..=MOST_BYTES)?;
        experiment.bench.memory_budget = Some(bytes);
    }
    if experiment.models.is_empty() {
        let message = "no models in this profile; name some with --models";
        return Err(usage(format!("{}: {message}", path.display())));
    }
    for sweep in &args.sweep {
        let (key, values) = parse_sweep(sweep)?;
        experiment.sweep_over(&key, &values);
    }
    Ok(experiment)
}

/// Bytes: a number with an optional unit.
fn size(option: &str, text: &str) -> Result<u64> {
    const UNITS: [(&str, f64); 7] = [
        ("", 1.0),
        ("B", 1.0),
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("MB", 1e6),
        ("GB", 1e9),
    ];
    let (number, unit) =
        text.split_at(text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim())).map(|(_, f)| f);
    match (number.parse::<f64>(), factor) {
        (Ok(n), Some(factor)) if n * factor >= 1.0 => Ok((n * factor) as u64),
        _ => Err(usage(format!(
            "{option}: `{text}` is no size; give bytes, or a number with MiB, GiB, MB or GB"
        ))),
    }
}

/// `KEY=V1,V2`: a dotted key and TOML values or bare words.
fn parse_sweep(text: &str) -> Result<(String, Vec<toml::Value>)> {
    let wrong = || usage(format!("--sweep: `{text}` is not KEY=V1,V2,.. such as cache.start_layer=8,16"));
    let (key, values) = text.split_once('=').ok_or_else(wrong)?;
    let values: Vec<toml::Value> =
        values.split(',').map(str::trim).filter(|v| !v.is_empty()).map(parse_value).collect();
    if key.trim().is_empty() || values.is_empty() {
        Err(wrong())
    } else {
        Ok((key.trim().to_string(), values))
    }
}

fn reuse(text: &str) -> Result<Reuse, String> {
    match text {
        "any" => Ok(Reuse::Any),
        "own" => Ok(Reuse::Own),
        _ => Err("must be any or own".into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_are_keys_with_values() {
        let (key, values) = parse_sweep("cache.start_layer=half, 8,0.5").unwrap();
        assert_eq!(key, "cache.start_layer");
        assert_eq!(values, [toml::Value::from("half"), toml::Value::from(8), toml::Value::from(0.5)]);
        for bad in ["x", "x=", "=1"] {
            assert!(parse_sweep(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("1000", 1000), ("8GiB", 8 << 30), ("1.5 mib", 3 << 19), ("2GB", 2_000_000_000)]
        {
            assert_eq!(size("--x", text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "GiB", "8 pounds", "-1", "0", "1.2.3"] {
            assert!(size("--x", bad).is_err(), "{bad}");
        }
    }
}
