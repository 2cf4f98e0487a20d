//! `minicache run`: measures what experiment files describe.

use std::path::{Path, PathBuf};

use anyhow::Result;
use minicache_config::Experiment;
use minicache_eval::run::Context;
use minicache_eval::tasks::Suite;
use minicache_models::LoadOptions;

use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// Options of `minicache run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Experiment files, or the names of those in `experiments/`.
    #[arg(required = true, value_name = "EXPERIMENT")]
    experiments: Vec<PathBuf>,
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
    /// size that does not fit.
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
    /// Folder for results.
    #[arg(long, default_value = "results", value_name = "DIR")]
    results: PathBuf,
    /// Start anew instead of going on where an earlier run stopped.
    #[arg(long)]
    fresh: bool,
    /// Print what would be run, and run nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Runs the experiments one after another.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    // All files are read first: a mistake in the last one should not show after an hour.
    let experiments = args.experiments.iter().map(|path| load(path, args)).collect::<Result<Vec<_>>>()?;
    let context = Context {
        results: args.results.clone(),
        data: global.data_source(),
        load: LoadOptions { devices: global.devices()?, ..LoadOptions::default() },
        fresh: args.fresh,
        command: command_line(std::env::args_os().skip(1)),
    };
    if args.dry_run {
        return experiments.iter().try_for_each(|e| print_plan(e, &context));
    }
    for experiment in &experiments {
        let dir = args.results.join(&experiment.id);
        let summary = match minicache_eval::run::run(experiment, &context) {
            Ok(summary) => summary,
            Err(e) => {
                // What is finished is reported all the same; the error is what the user has to know.
                let _ = minicache_plot::report(&dir, None);
                return Err(e.into());
            }
        };
        super::report::rebuild(&dir)?;
        let (planned, computed) = (summary.planned, summary.computed);
        let report = dir.join("report.md");
        output::line(format!(
            "{}: {planned} cells, {computed} computed, {}",
            experiment.id,
            report.display()
        ))?;
    }
    Ok(())
}

/// Reads an experiment file with the options of the command line on top.
fn load(name: &Path, args: &Args) -> Result<Experiment> {
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
    if args.limit == Some(0) {
        return Err(usage("--limit: must be at least 1; leave it out for the experiment's own"));
    }
    if args.limit.is_some() {
        experiment.limit = args.limit;
        experiment.limits.clear();
    }
    if let Some(text) = &args.memory_budget {
        experiment.bench.memory_budget = Some(size("--memory-budget", text)?);
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
    let value = |text: &str| {
        let parsed =
            toml::from_str::<toml::Table>(&format!("v = {text}")).ok().and_then(|mut t| t.remove("v"));
        parsed.unwrap_or_else(|| toml::Value::String(text.to_string()))
    };
    let values: Vec<toml::Value> =
        values.split(',').map(str::trim).filter(|v| !v.is_empty()).map(value).collect();
    if key.trim().is_empty() || values.is_empty() {
        Err(wrong())
    } else {
        Ok((key.trim().to_string(), values))
    }
}

/// The call as it can be typed again.
fn command_line(args: impl Iterator<Item = std::ffi::OsString>) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    let quote = |arg: std::ffi::OsString| {
        let arg = arg.to_string_lossy().into_owned();
        if !arg.is_empty() && arg.chars().all(plain) {
            arg
        } else {
            format!("'{}'", arg.replace('\'', r"'\''"))
        }
    };
    std::iter::once("minicache".to_string()).chain(args.map(quote)).collect::<Vec<_>>().join(" ")
}

fn print_plan(experiment: &Experiment, context: &Context) -> Result<()> {
    let preview = minicache_eval::run::preview(experiment, context)?;
    let (total, done) = (preview.cells.len(), preview.cells.iter().filter(|(_, done)| *done).count());
    let left = preview.tokens;
    let left = if left > 0 { format!(", about {left} tokens to go") } else { String::new() };
    output::line(format!("{}: {total} cells, {done} finished{left}", experiment.id))?;
    for (cell, done) in &preview.cells {
        let swept = cell.swept.iter().map(|(k, v)| format!("  {k}={v}")).collect::<String>();
        let state = if *done { "  (finished)" } else { "" };
        output::line(format!("  {}  {}  {}{swept}{state}", cell.model, cell.task, cell.variant))?;
    }
    Ok(())
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

    #[test]
    fn the_command_can_be_typed_again() {
        let args = ["run", "e.toml", "--set", "tasks=[\"a\"]", "it's"].map(std::ffi::OsString::from);
        assert_eq!(command_line(args.into_iter()), r#"minicache run e.toml --set 'tasks=["a"]' 'it'\''s'"#);
    }
}
