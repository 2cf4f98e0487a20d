//! The command `minicache`.

mod bench;
mod calibration;
mod call;
mod commands;
mod compare;
mod failure;
mod global;
mod output;
mod prompt;
mod shape;
mod shares;
mod signals;
mod slurm;
mod source;
mod tensors;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use crate::commands::Command;
use crate::global::Global;

/// Compresses KV caches across layers (MiniCache and beyond), and measures what that costs and saves.
#[derive(Debug, Parser)]
#[command(name = "minicache", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    failure::install_panic_hook();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return failure::report_clap(&e),
    };
    let run = || {
        signals::install().context("cannot set up the handling of signals")?;
        cli.global.prepare()?;
        cli.command.run(&cli.global)?;
        output::flush()
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(e)) => failure::report(&e),
        // The hook has already said what happened.
        Err(_) => ExitCode::from(failure::FAILED),
    }
}
