//! `minicache run`: measures what experiment files describe.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, anyhow, bail};
use minicache_config::bounds::{MOST_BYTES, MOST_SAMPLES, check_number};
use minicache_config::{Experiment, parse_value};
use minicache_eval::run::{Context, Overall, Preview, Stop, Summary};
use minicache_eval::store::{self, Owner, Reuse};
use minicache_eval::tasks::Suite;
use minicache_models::LoadOptions;

use crate::failure::{Interrupted, describe, usage};
use crate::global::Global;
use crate::{output, signals};

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
    /// Which finished cells are taken as they are: any, or only those computed in this checkout (own).
    #[arg(long, default_value = "any", value_name = "any|own", value_parser = reuse)]
    reuse: Reuse,
    /// Only cells of which the results folder DIR has rows, to compute them a second time: rows without reports.
    #[arg(long, value_name = "DIR")]
    again: Option<PathBuf>,
    /// Print what would be run, and run nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Runs the experiments one after another. One that fails does not keep the others from running.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    // All files are read first: a mistake in the last one should not show after an hour.
    let experiments = args.experiments.iter().map(|path| load(path, args)).collect::<Result<Vec<_>>>()?;
    store::check_folder(&args.results)?;
    let command = command_line(std::env::args_os().skip(1));
    let _owner = if args.dry_run { None } else { Some(Owner::of(&args.results, &command)?) };
    let context = Context {
        results: args.results.clone(),
        reuse: args.reuse,
        stop: if args.dry_run { Stop::default() } else { signals::stop() },
        data: global.data_source(),
        load: LoadOptions { devices: global.devices()?, ..LoadOptions::default() },
        fresh: args.fresh,
        command,
        again: args.again.clone(),
    };
    if args.dry_run {
        return experiments.iter().try_for_each(|e| print_plan(e, &context));
    }
    // So is whatever else can be known to fail before the first token is computed.
    let mut table = Vec::with_capacity(experiments.len());
    let mut plans = Vec::with_capacity(experiments.len());
    for experiment in &experiments {
        let plan = match minicache_eval::run::preview(experiment, &context, false) {
            Ok(plan) => Some(plan),
            Err(e) if experiments.len() == 1 => return Err(e.into()),
            Err(e) => {
                let error = Error::from(e).context(experiment.id.clone());
                eprintln!("cannot be run: {}", describe(&error));
                table.push(Outcome { id: &experiment.id, summary: None, errors: vec![error] });
                None
            }
        };
        plans.push(plan);
    }
    if let Some(again) = &args.again
        && table.is_empty()
        && plans.iter().flatten().all(|plan| plan.cells.is_empty())
    {
        let what = "no rows of these experiments on this model, data and profile, so there is nothing to compute again";
        bail!("{}: {what}", again.display());
    }
    output::line(heading(&plans, &context))?;
    let overall = Overall::new(plans.iter().map(|p| p.as_ref().map_or(0.0, |p| p.seconds)).collect());
    for (index, (experiment, plan)) in experiments.iter().zip(&plans).enumerate() {
        let Some(plan) = plan.as_ref().filter(|plan| !plan.cells.is_empty()) else { continue };
        overall.begin(index);
        table.push(one(experiment, plan, &context, &overall)?);
        if let Some(signal) = context.stop.signal() {
            // What was finished is reported; the rest is left to the same call.
            return Err(Interrupted { signal, command: going_on() }.into());
        }
    }
    finish(table, &experiments)
}

/// What became of an experiment.
struct Outcome<'a> {
    id: &'a str,
    summary: Option<Summary>,
    errors: Vec<Error>,
}

/// Runs one experiment and makes its report, of what is finished even where something failed.
fn one<'a>(
    experiment: &'a Experiment,
    plan: &Preview,
    context: &Context,
    overall: &Overall,
) -> Result<Outcome<'a>> {
    let (summary, mut errors) = match minicache_eval::run::run(experiment, context, overall) {
        Ok(mut summary) => {
            let errors = std::mem::take(&mut summary.failures).into_iter().map(|f| f.error.into()).collect();
            (Some(summary), errors)
        }
        Err(e) => (None, vec![Error::from(e)]),
    };
    let mut made = String::new();
    let nothing = summary.as_ref().is_some_and(|s| s.computed + s.reused == 0);
    // Rows that are computed a second time are there to be compared.
    let reported = context.again.is_none();
    if reported && plan.dir.join("cells.csv").is_file() && !nothing {
        match super::report::rebuild(&plan.dir) {
            Ok(report) => {
                super::report::say_problems(&report.problems);
                made = format!(", {}", plan.dir.join("report.md").display());
            }
            Err(e) => errors.push(e),
        }
    }
    if let Some(Summary { planned, computed, .. }) = &summary {
        output::line(format!("{}: {planned} cells, {computed} computed{made}", experiment.id))?;
    }
    Ok(Outcome { id: &experiment.id, summary, errors })
}

/// The first line: what is run on, and where results go.
fn heading(plans: &[Option<Preview>], context: &Context) -> String {
    let plans: Vec<&Preview> = plans.iter().flatten().collect();
    let folders: BTreeSet<&Path> = plans.iter().filter_map(|p| p.dir.parent()).collect();
    let folders: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    let origins: BTreeSet<&str> = plans.iter().flat_map(|p| p.origins.values()).map(String::as_str).collect();
    let sample = origins.iter().filter(|o| **o == "bundled sample").count();
    let data = match (sample, origins.len()) {
        (_, 0) => "no data sets needed".to_string(),
        (1, 1) => "on the bundled sample, which is no benchmark (real data: --data DIR)".to_string(),
        (0, _) => format!("on {}", place(context)),
        _ => format!("on {}, and the bundled sample for what is not there", place(context)),
    };
    let open = plans.iter().flat_map(|p| &p.cells).filter(|(_, done)| !done).count();
    let seconds: f64 = plans.iter().map(|p| p.seconds).sum();
    let time = if open == 0 { String::new() } else { format!(", about {}", clock(seconds)) };
    let results = folders.join(" and ");
    format!("{data}; results in {results}; {open} cells to compute{time}")
}

/// Where real data comes from.
fn place(context: &Context) -> String {
    match context.data.dir() {
        Some(dir) => format!("the data in {}", dir.display()),
        None => "data from the hub".to_string(),
    }
}

/// Minutes and seconds.
fn clock(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    format!("{}:{:02} min", whole / 60, whole % 60)
}

/// The table at the end, and the error that stands for all.
fn finish(mut table: Vec<Outcome<'_>>, experiments: &[Experiment]) -> Result<()> {
    table.sort_by_key(|o| experiments.iter().position(|e| e.id == o.id));
    if experiments.len() > 1 {
        let wide = table.iter().map(|o| o.id.len()).max().unwrap_or(0).max("experiment".len());
        output::line(format!("{:wide$}  computed  reused  failed        time", "experiment"))?;
        for Outcome { id, summary, errors } in &table {
            let numbers = match summary {
                Some(s) => {
                    let failed = s.planned - s.computed - s.reused;
                    format!("{:8}  {:6}  {failed:6}  {:>10}", s.computed, s.reused, clock(s.seconds))
                }
                None => format!("{:8}  {:6}  {:>6}  {:>10}", "-", "-", "all", "-"),
            };
            output::line(format!("{id:wide$}  {numbers}"))?;
            for error in errors {
                output::line(format!("{:wide$}    {}", "", describe(error)))?;
            }
        }
    }
    let failed = table.iter().filter(|o| !o.errors.is_empty()).count();
    let nothing = table.iter().all(|o| o.summary.as_ref().is_none_or(|s| s.computed + s.reused == 0));
    let mut errors: Vec<Error> = table.into_iter().flat_map(|o| o.errors).collect();
    match (errors.len(), experiments) {
        (0, _) => Ok(()),
        (_, [_]) if nothing => Err(errors.remove(0)),
        (1, [_]) => Err(errors.remove(0)),
        (n, [experiment]) => {
            errors.iter().for_each(|e| eprintln!("{}", describe(e)));
            Err(anyhow!("{}: {n} failures, which are named above", experiment.id))
        }
        (_, all) => {
            let of = all.len();
            Err(anyhow!("{failed} of {of} experiments failed, in whole or in part; the table says why"))
        }
    }
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

/// The call that goes on with what this one has begun: with `--fresh` it would begin again.
fn going_on() -> String {
    command_line(std::env::args_os().skip(1).filter(|arg| arg != "--fresh"))
}

fn reuse(text: &str) -> Result<Reuse, String> {
    match text {
        "any" => Ok(Reuse::Any),
        "own" => Ok(Reuse::Own),
        _ => Err("must be any or own".into()),
    }
}

fn print_plan(experiment: &Experiment, context: &Context) -> Result<()> {
    let preview = minicache_eval::run::preview(experiment, context, true)?;
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
