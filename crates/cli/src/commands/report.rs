//! `minicache report`: figures and reports from the CSV of earlier runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use minicache_eval::run::SAMPLE;
use minicache_eval::store::{StoreError, Worker};

use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// Options of `minicache report`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with one folder per experiment.
    #[arg(default_value = "results", value_name = "DIR")]
    dir: PathBuf,
}

/// Rebuilds every figure and report below the folder.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let dir = args.dir.display();
    if args.dir.is_file() {
        return Err(usage(format!("{dir}: is a file; name a folder with results")));
    }
    if !args.dir.is_dir() {
        let message =
            "no such folder; run `minicache run EXPERIMENT.toml` first, or name its --results folder";
        return Err(usage(format!("{dir}: {message}")));
    }
    let worker = Worker::of(&minicache_plot::root(&args.dir)?, &format!("minicache report {dir}"))?;
    let mut problems = Vec::new();
    for folder in folders(&args.dir) {
        let summary = alone(&worker, || rebuild(&folder))?;
        for experiment in &summary.experiments {
            let (figures, path) = (experiment.figures, experiment.path.display());
            output::line(format!("{}: {figures} figures, {path}", experiment.id))?;
        }
        output::line(summary.index.display())?;
        problems.extend(summary.problems);
    }
    match problems.len() {
        0 => Ok(()),
        1 => Err(problems.remove(0).into()),
        n => {
            say_problems(&problems);
            bail!("{n} experiments could not be reported, the first: {}", problems[0])
        }
    }
}

/// Does `work` while no other process of the results folder writes reports, so that those of the newest rows stay.
pub(super) fn alone<T>(worker: &Arc<Worker>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    worker.alone(worker.results(), "report", || Ok::<_, StoreError>(work()))?
}

/// The folder, and the one below it for runs on the bundled sample, as far as there are results in them.
pub(super) fn folders(dir: &Path) -> Vec<PathBuf> {
    let sample = dir.join(SAMPLE);
    let both = [dir.to_path_buf(), sample];
    let found: Vec<PathBuf> = both.into_iter().filter(|d| minicache_plot::has_results(d)).collect();
    if found.is_empty() { vec![dir.to_path_buf()] } else { found }
}

/// Rebuilds the reports in `results`, the folder of one experiment or of all, and says on stderr what is missing in
/// them.
pub(crate) fn rebuild(results: &Path) -> Result<minicache_plot::Summary> {
    let summary = minicache_plot::report(results, None)?;
    for experiment in &summary.experiments {
        for note in &experiment.notes {
            eprintln!("{}: {note}", experiment.id);
        }
    }
    Ok(summary)
}

/// Says on stderr which experiments could not be reported.
pub(crate) fn say_problems(problems: &[minicache_plot::PlotError]) {
    for problem in problems {
        eprintln!("left out: {problem}");
    }
}
