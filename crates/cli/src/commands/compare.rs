//! `minicache compare`: whether two results folders say the same.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use indexmap::IndexMap;
use minicache_eval::run::SAMPLE;
use minicache_plot::PlotError;
use serde_json::json;

use super::report::folders;
use crate::compare::{Cell, Comparison, Difference};
use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// More cells than these that only one folder has are counted, not listed.
const MOST_LISTED: usize = 20;

/// Options of `minicache compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A results folder, or the folder of one experiment.
    a: PathBuf,
    /// The folder to compare it with.
    b: PathBuf,
    /// Only these experiments.
    #[arg(long, value_name = "ID", num_args = 1.., value_delimiter = ',')]
    experiments: Vec<String>,
    /// Cells of A that B lacks are differences too.
    #[arg(long)]
    all: bool,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

/// Compares, and fails where a value is further apart than it may be or where there is nothing to compare.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let mut comparisons = Vec::new();
    for (id, [a, b]) in pairs(args)? {
        comparisons.push(Comparison::of(&id, a.as_deref(), b.as_deref())?);
    }
    let sum = |count: fn(&Comparison) -> usize| comparisons.iter().map(count).sum::<usize>();
    let (compared, different) = (sum(|c| c.compared), sum(|c| c.different));
    let lacking = sum(|c| c.only_a.len());
    if args.json {
        let all = json!({
            "a": args.a,
            "b": args.b,
            "compared": compared,
            "different": different,
            "agree": compared > 0 && comparisons.iter().all(|c| c.agrees(args.all)),
            "experiments": comparisons,
        });
        output::line(serde_json::to_string_pretty(&all)?)?;
    } else {
        print(args, &comparisons)?;
    }
    let of = format!("{} and {}", args.a.display(), args.b.display());
    match (compared, different) {
        (0, _) => bail!("{of} have no cell in common, so that nothing was compared"),
        (_, 0) if args.all && lacking > 0 => bail!("{lacking} cells of A are not in B"),
        (_, 0) => Ok(()),
        (1, _) => bail!("the one cell that was compared differs"),
        _ => bail!("{different} of {compared} cells differ"),
    }
}

/// Experiments by name, with their folder on either side.
type Pairs = IndexMap<String, [Option<PathBuf>; 2]>;

/// What is compared with what.
fn pairs(args: &Args) -> Result<Pairs> {
    for dir in [&args.a, &args.b] {
        if folders(dir).iter().all(|folder| !minicache_plot::has_results(folder)) {
            return Err(PlotError::NoResults(dir.clone()).into());
        }
    }
    let mut pairs = Pairs::new();
    match [&args.a, &args.b].map(|dir| minicache_plot::is_experiment(dir)) {
        [true, true] => {
            pairs.insert(name(&args.a), [Some(args.a.clone()), Some(args.b.clone())]);
        }
        [false, false] => {
            for (side, dir) in [&args.a, &args.b].into_iter().enumerate() {
                for root in folders(dir) {
                    for folder in minicache_plot::experiments(&root)? {
                        let id = folder.strip_prefix(dir).unwrap_or(&folder).display().to_string();
                        pairs.entry(id).or_default()[side] = Some(folder);
                    }
                }
            }
            join(&mut pairs);
        }
        [a, _] => {
            let (one, all) = if a { (&args.a, &args.b) } else { (&args.b, &args.a) };
            let (one, all) = (one.display(), all.display());
            return Err(usage(format!("{one} is the folder of one experiment, {all} of several")));
        }
    }
    if !args.experiments.is_empty() {
        pairs.retain(|id, _| args.experiments.contains(&name(Path::new(id))));
    }
    Ok(pairs)
}

/// Pairs an experiment of one side with that below `sample/` on the other, where neither has a counterpart: rows that
/// need no data are in either, by the data that was at hand.
fn join(pairs: &mut Pairs) {
    let ids: Vec<String> = pairs.keys().filter(|id| !Path::new(id).starts_with(SAMPLE)).cloned().collect();
    for id in ids {
        let below = format!("{SAMPLE}/{id}");
        let (Some(one), Some(other)) = (pairs.get(&id), pairs.get(&below)) else { continue };
        let joined = match (one, other) {
            ([Some(a), None], [None, Some(b)]) | ([None, Some(b)], [Some(a), None]) => {
                [Some(a.clone()), Some(b.clone())]
            }
            _ => continue,
        };
        pairs.shift_remove(&below);
        pairs.insert(id, joined);
    }
}

fn name(dir: &Path) -> String {
    dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn print(args: &Args, comparisons: &[Comparison]) -> Result<()> {
    output::line(format!("A is {}, B is {}", args.a.display(), args.b.display()))?;
    for c in comparisons.iter().filter(|c| c.compared > 0) {
        let (compared, different) = (c.compared, c.different);
        let (equal, a, b) = (compared - different, c.only_a.len(), c.only_b.len());
        output::line(format!(
            "{}: {compared} cells compared, {equal} equal, {different} different, {a} only in A, {b} only in B",
            c.id
        ))?;
        for difference in &c.differences {
            output::line(format!("  {}", said(difference)))?;
        }
        for (cells, side) in [(&c.only_a, "A"), (&c.only_b, "B")] {
            for cell in cells.iter().take(MOST_LISTED) {
                output::line(format!("  only in {side}: {}", named(cell, "")))?;
            }
            if cells.len() > MOST_LISTED {
                let more = cells.len() - MOST_LISTED;
                output::line(format!("  only in {side}: {more} more; --json lists them all"))?;
            }
        }
        if c.unjudged > 0 {
            let why = "other instructions, or another processor, give other answers";
            output::line(format!("  not judged: {} other values of answers differ; {why}", c.unjudged))?;
        }
        for t in &c.timings {
            let range = format!("{:.2} to {:.2}", t.least, t.most);
            output::line(format!(
                "  not judged: {} in B {:.2} times that in A ({range})",
                t.column, t.median
            ))?;
        }
    }
    for (side, cells) in [("A", (|c| &c.only_a) as fn(&Comparison) -> &Vec<Cell>), ("B", |c| &c.only_b)] {
        let only: Vec<&Comparison> =
            comparisons.iter().filter(|c| c.compared == 0 && !cells(c).is_empty()).collect();
        if !only.is_empty() {
            let count: usize = only.iter().map(|c| cells(c).len()).sum();
            let ids: Vec<&str> = only.iter().map(|c| c.id.as_str()).collect();
            output::line(format!("no cell in common, {count} cells only in {side}: {}", ids.join(", ")))?;
        }
    }
    let sum = |count: fn(&Comparison) -> usize| comparisons.iter().map(count).sum::<usize>();
    let (compared, different) = (sum(|c| c.compared), sum(|c| c.different));
    output::line(format!(
        "{compared} cells compared: {} equal, {different} different; {} only in A, {} only in B",
        compared - different,
        sum(|c| c.only_a.len()),
        sum(|c| c.only_b.len())
    ))
}

fn said(difference: &Difference) -> String {
    let Difference { cell, row, column, a, b, tolerance } = difference;
    let shown = |text: &str| if text.is_empty() { "nothing".to_string() } else { text.to_string() };
    format!("{}, {column}: {} in A, {} in B ({tolerance})", named(cell, row), shown(a), shown(b))
}

fn named(cell: &Cell, row: &str) -> String {
    let parts = [&cell.model, &cell.task, &cell.variant, row];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("{} {}", cell.key, parts.join(", "))
}
