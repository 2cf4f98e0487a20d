//! The commands, one file each: an `Args` struct and `run(&Args, &Global) -> anyhow::Result<()>`.

mod report;
mod run;

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
}

impl Command {
    /// Runs it.
    pub(crate) fn run(&self, global: &Global) -> Result<()> {
        match self {
            Command::Run(args) => run::run(args, global),
            Command::Report(args) => report::run(args, global),
        }
    }
}
