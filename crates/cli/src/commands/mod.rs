//! The commands, one file each: an `Args` struct and `run(&Args, &Global) -> anyhow::Result<()>`.

mod align;
mod asked;
mod bench;
mod calibrate;
mod compare;
mod device_check;
mod dump_kv;
mod footprint;
mod generate;
mod logits;
mod merge;
mod methods;
mod models;
mod report;
mod run;
mod score;
mod status;
mod submit;
mod tasks;
mod tokens;

use anyhow::Result;
use clap::Subcommand;
use minicache_core::Footprint;

use crate::global::Global;

/// One command of the binary.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run experiment files: measure, and write CSV, figures and a report.
    Run(run::Args),
    /// Run experiments as jobs of Slurm: as many at once as there is room for, whatever becomes of one of them.
    Submit(submit::Args),
    /// Say how far the runs in a results folder have come.
    Status(status::Args),
    /// Rebuild figures and reports from the CSV of earlier runs.
    Report(report::Args),
    /// Compare two results folders cell by cell, within what machines may differ by.
    Compare(compare::Args),
    /// Score a file of predictions, without a model.
    Score(score::Args),
    /// List the tasks and where their data is.
    Tasks(tasks::Args),
    /// Continue a prompt, with any cache.
    Generate(generate::Args),
    /// Print a prompt as a model reads it: its text and its token ids.
    Tokens(tokens::Args),
    /// Write a model's logits for given tokens, with any cache.
    Logits(logits::Args),
    /// Write a prompt's keys and values as attention sees them.
    DumpKv(dump_kv::Args),
    /// Measure how fast a model decodes with each cache.
    Bench(bench::Args),
    /// Write the same model in a basis in which adjacent layers merge better.
    Align(align::Args),
    /// Calibrate the basis of latent caches on text.
    Calibrate(calibrate::Args),
    /// Compress one pair of layers from a file, and write what attention would see.
    Merge(merge::Args),
    /// Measure what a cache holds in a model of any size, without its weights.
    Footprint(footprint::Args),
    /// Check a GPU: its kernels against the host, and the share of its memory's bandwidth that they use.
    DeviceCheck(device_check::Args),
    /// List the models that have a name.
    Models(models::Args),
    /// List the cache methods and the settings that each reads.
    Methods(methods::Args),
}

impl Command {
    /// Runs it.
    pub(crate) fn run(&self, global: &Global) -> Result<()> {
        match self {
            Command::Run(args) => run::run(args, global),
            Command::Submit(args) => submit::run(args, global),
            Command::Status(args) => status::run(args, global),
            Command::Report(args) => report::run(args, global),
            Command::Compare(args) => compare::run(args, global),
            Command::Score(args) => score::run(args, global),
            Command::Tasks(args) => tasks::run(args, global),
            Command::Generate(args) => generate::run(args, global),
            Command::Tokens(args) => tokens::run(args, global),
            Command::Logits(args) => logits::run(args, global),
            Command::DumpKv(args) => dump_kv::run(args, global),
            Command::Bench(args) => bench::run(args, global),
            Command::Align(args) => align::run(args, global),
            Command::Calibrate(args) => calibrate::run(args, global),
            Command::Merge(args) => merge::run(args, global),
            Command::Footprint(args) => footprint::run(args, global),
            Command::DeviceCheck(args) => device_check::run(args, global),
            Command::Models(args) => models::run(args, global),
            Command::Methods(args) => methods::run(args, global),
        }
    }
}

/// Bytes by part, as JSON prints them.
fn parts_json(footprint: &Footprint) -> serde_json::Map<String, serde_json::Value> {
    footprint.parts().into_iter().map(|(part, bytes)| (part.to_string(), bytes.into())).collect()
}
