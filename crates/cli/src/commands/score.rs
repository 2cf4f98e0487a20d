//! `minicache score`: metrics of a file of predictions, without a model.

use std::path::PathBuf;

use anyhow::Result;
use minicache_eval::score::score_file;
use minicache_eval::tasks::Scale;

use crate::failure::usage;
use crate::global::Global;
use crate::output;

/// Options of `minicache score`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The task, such as `gsm8k` or `longbench/lcc`; `minicache tasks` lists them.
    #[arg(long, value_name = "TASK")]
    task: String,
    /// JSON lines: LongBench's (`pred`, `answers`, `all_classes`), samples of lm-evaluation-harness (`doc`, `resps`),
    /// or samples of `minicache run` (`reference`, `prediction`).
    #[arg(long, value_name = "FILE.jsonl")]
    predictions: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Scores the file and prints the metrics.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let scored = score_file(&args.task, &args.predictions).map_err(|e| usage(e.to_string()))?;
    if args.json {
        return output::line(serde_json::to_string(&scored)?);
    }
    output::line(format!("{}, {} samples", scored.task, scored.samples))?;
    let width = scored.metrics.keys().map(String::len).max().unwrap_or(0);
    for (name, value) in &scored.metrics {
        let decimals = if scored.scale == Scale::Percent { 2 } else { 4 };
        output::line(format!("{name:width$}  {value:.decimals$}"))?;
    }
    Ok(())
}
