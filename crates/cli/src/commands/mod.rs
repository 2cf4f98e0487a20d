//! The commands, one file each: an `Args` struct and `run(&Args, &Global) -> anyhow::Result<()>`.

mod report;
mod run;
mod score;
mod tasks;

use anyhow::Result;
use clap::Subcommand;

use crate::global::Global;

/// One command of the binary.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run experiment files: measure, and write CSV, figures and a report.
    Run(run::Args),
    /// Rebuild figures and reports from the CSV of earlier runs.
    Report(report::Args),
    /// Score a file of predictions, without a model.
    Score(score::Args),
    /// List the tasks and where their data is.
    Tasks(tasks::Args),
}

impl Command {
    /// Runs it.
    pub(crate) fn run(&self, global: &Global) -> Result<()> {
        match self {
            Command::Run(args) => run::run(args, global),
            Command::Report(args) => report::run(args, global),
            Command::Score(args) => score::run(args, global),
            Command::Tasks(args) => tasks::run(args, global),
        }
    }
}
