//! `minicache align`: the same model in a basis in which adjacent layers' states point the same way.

use std::path::PathBuf;

use anyhow::Result;
use minicache_config::WeightMode;

use crate::calibration::CalibrationArgs;
use crate::global::Global;
use crate::output;
use crate::source::ModelArgs;

/// Options of `minicache align`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// A new folder for the aligned model: safetensors, config.json, and the tokenizer where there is one.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Aligns and writes.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    args.calibration.check()?;
    let model = args.model.load(global, WeightMode::Auto)?;
    let chunks = args.calibration.read(&model, global)?;
    let alignment = model.alignment(chunks.iter())?;
    minicache_models::align::save(&model, &alignment, &args.out)?;
    output::line(format!(
        "{}: {} aligned on {} tokens of {}",
        args.out.display(),
        model.name,
        alignment.tokens,
        chunks.text
    ))
}
