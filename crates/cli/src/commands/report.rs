//! `minicache report`: figures and reports from the CSV of earlier runs.

use std::path::{Path, PathBuf};

use anyhow::Result;

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
    if !args.dir.is_dir() {
        let message =
            "no such folder; run `minicache run EXPERIMENT.toml` first, or name its --results folder";
        return Err(usage(format!("{}: {message}", args.dir.display())));
    }
    let summary = rebuild(&args.dir)?;
    for experiment in &summary.experiments {
        let (figures, path) = (experiment.figures, experiment.path.display());
        output::line(format!("{}: {figures} figures, {path}", experiment.id))?;
    }
    output::line(summary.index.display())
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
    for problem in &summary.problems {
        eprintln!("left out: {problem}");
    }
    Ok(summary)
}
