//! `minicache run`: measures what experiment files describe.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, anyhow, bail};
use minicache_config::Experiment;
use minicache_config::bounds::MOST_CELLS;
use minicache_eval::run::{Context, Overall, Preview, Share, Stop, Summary, split};
use minicache_eval::store;
use minicache_models::LoadOptions;

use super::asked::Asked;
use crate::call::{command_line, without};
use crate::failure::{Interrupted, describe};
use crate::global::Global;
use crate::shares::Shares;
use crate::{output, signals};

/// Options of `minicache run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    asked: Asked,
    /// Only cells of which the results folder DIR has rows, to compute them a second time: rows without reports.
    #[arg(long, value_name = "DIR")]
    again: Option<PathBuf>,
    /// Only the I-th of N shares of the cells, of about equal estimated time: for N processes, here or elsewhere, that
    /// have the results folder in common. Reports are written by the one that finishes an experiment.
    #[arg(long, value_name = "I/N", value_parser = shard, conflicts_with_all = ["again", "fresh"])]
    shard: Option<(usize, usize)>,
    /// The shares as `minicache submit` has written them, instead of those that are worked out here.
    #[arg(long, value_name = "FILE", requires = "shard", hide = true)]
    shares: Option<PathBuf>,
    /// Compute nothing: put together what other runs have computed, write reports, and fail where cells are missing.
    #[arg(long, conflicts_with_all = ["fresh", "shard", "again"])]
    collect: bool,
    /// Print what would be run, and run nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Runs the experiments one after another. One that fails does not keep the others from running.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let asked = &args.asked;
    let experiments = asked.load()?;
    store::check_folder(&asked.results)?;
    let command =
        command_line(without(std::env::args_os().skip(1), &["--collect"], &["--shard", "--shares"]));
    let mut context = context(asked, global, command)?;
    context.again.clone_from(&args.again);
    context.collect = args.collect;
    if args.dry_run {
        return experiments.iter().try_for_each(|e| print_plan(e, &context));
    }
    context.worker = Some(asked.worker(&context.command)?);
    context.stop = signals::stop();
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
    if let Some((index, of)) = args.shard {
        let shares = match &args.shares {
            Some(file) => Shares::read(file)?.tasks.into_iter().map(|task| task.cells).collect(),
            None => {
                let jobs: Vec<_> = plans.iter().flatten().flat_map(|plan| plan.jobs.clone()).collect();
                split(&jobs, of, 0.0, true).into_iter().map(|task| task.cells).collect::<Vec<_>>()
            }
        };
        // With more shares than cells the last ones are empty.
        context.share = Some(Share::of(shares.into_iter().nth(index - 1).unwrap_or_default()));
    }
    output::line(heading(&plans, &context))?;
    let overall = Overall::new(plans.iter().map(|p| p.as_ref().map_or(0.0, |p| p.seconds)).collect());
    for (index, (experiment, plan)) in experiments.iter().zip(&plans).enumerate() {
        let Some(plan) = plan.as_ref().filter(|plan| is_mine(plan, &context)) else { continue };
        overall.begin(index);
        table.push(one(experiment, plan, &context, &overall)?);
        if let Some(signal) = context.stop.signal() {
            // What was finished is reported; the rest is left to the same call.
            return Err(Interrupted { signal, command: going_on() }.into());
        }
    }
    finish(table, &experiments)
}

/// What a run needs, with nothing in it that writes.
pub(super) fn context(asked: &Asked, global: &Global, command: String) -> Result<Context> {
    Ok(Context {
        results: asked.results.clone(),
        reuse: asked.reuse,
        stop: Stop::default(),
        data: global.data_source(),
        load: LoadOptions { devices: global.devices()?, ..LoadOptions::default() },
        fresh: asked.fresh,
        command,
        again: None,
        worker: None,
        share: None,
        collect: false,
        kept: RefCell::default(),
    })
}

/// Whether there are cells of the plan that are this run's.
fn is_mine(plan: &Preview, context: &Context) -> bool {
    let mut cells = plan.jobs.iter().flat_map(|job| &job.cells);
    cells.any(|(slot, _, _)| context.share.as_ref().is_none_or(|share| share.has(slot)))
}

/// What became of an experiment.
struct Outcome<'a> {
    id: &'a str,
    summary: Option<Summary>,
    errors: Vec<Error>,
}

/// Runs one experiment and makes its report, of what is finished even where something failed; of a share only where that
/// was the last one.
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
    if let Some(open) = summary.as_ref().map(|s| s.open).filter(|open| *open > 0) {
        let mend = "run or submit the same experiments again";
        errors.push(anyhow!("{}: {open} cells are not computed; {mend}", experiment.id));
    }
    let mut made = String::new();
    let nothing = summary.as_ref().is_some_and(|s| s.computed + s.reused + s.others == 0);
    let partial = context.share.is_some() && summary.as_ref().is_none_or(|s| !s.whole);
    // Rows that are computed a second time are there to be compared.
    let reported = context.again.is_none() && !partial;
    if let Some(worker) = context.worker.as_ref().filter(|_| reported && !nothing)
        && plan.dir.join("cells.csv").is_file()
    {
        match super::report::alone(worker, || super::report::rebuild(&plan.dir)) {
            Ok(report) => {
                super::report::say_problems(&report.problems);
                made = format!(", {}", plan.dir.join("report.md").display());
            }
            Err(e) => errors.push(e),
        }
    }
    if let Some(Summary { planned, computed, others, .. }) = &summary {
        let others = if *others > 0 { format!(", {others} by other runs") } else { String::new() };
        output::line(format!("{}: {planned} cells, {computed} computed{others}{made}", experiment.id))?;
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
pub(super) fn clock(seconds: f64) -> String {
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
                    let failed = s.planned - s.computed - s.reused - s.others;
                    format!(
                        "{:8}  {:6}  {failed:6}  {:>10}",
                        s.computed,
                        s.reused + s.others,
                        clock(s.seconds)
                    )
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
    let nothing =
        table.iter().all(|o| o.summary.as_ref().is_none_or(|s| s.computed + s.reused + s.others == 0));
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

/// `I/N`, from 1 to N.
fn shard(text: &str) -> Result<(usize, usize), String> {
    let numbers =
        text.split_once('/').and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?)));
    numbers
        .filter(|(i, n)| (1..=*n).contains(i) && *n <= MOST_CELLS)
        .ok_or_else(|| format!("must be I/N with I from 1 to N, such as 3/8, and N at most {MOST_CELLS}"))
}

/// The call that goes on with what this one has begun: with `--fresh` it would begin again.
fn going_on() -> String {
    command_line(without(std::env::args_os().skip(1), &["--fresh"], &[]))
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
mod tests {
    use super::*;

    #[test]
    fn shares_are_numbered_from_one() {
        assert_eq!((shard("1/1"), shard(" 3/8")), (Ok((1, 1)), Ok((3, 8))));
        for bad in ["", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "1/99999"] {
            assert!(shard(bad).is_err(), "{bad}");
        }
    }
}
