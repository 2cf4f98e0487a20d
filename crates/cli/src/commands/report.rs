//! `minicache report`: figures and reports from the CSV of earlier runs.

use std::path::PathBuf;

use anyhow::Result;

use crate::failure::usage;
use crate::global::Global;

/// Options of `minicache report`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with one folder per experiment.
    #[arg(default_value = "results", value_name = "DIR")]
    dir: PathBuf,
    /// Folder with the paper's figures as CSV.
    #[arg(long, default_value = "experiments/paper", value_name = "DIR")]
    paper: PathBuf,
}

/// Rebuilds every figure and report below the folder.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    if !args.dir.is_dir() {
        let message =
            "no such folder; run `minicache run EXPERIMENT.toml` first, or name its --results folder";
        return Err(usage(format!("{}: {message}", args.dir.display())));
    }
    Ok(())
}
