//! `minicache align`: the same model in a basis in which adjacent layers' states point the same way.

use std::path::PathBuf;

use anyhow::Result;
use minicache_config::{ALIGN_LEVEL, WeightMode};
use minicache_core::settings::bounds::check_unit;
use minicache_models::align::AlignOptions;

use crate::calibration::CalibrationArgs;
use crate::failure::usage;
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
    /// How far the energies of layers' values are brought together, 0 to 1; 0 suits rank_one.
    #[arg(long, default_value_t = ALIGN_LEVEL, value_name = "SHARE")]
    level: f64,
    /// A new folder for the aligned model: safetensors, config.json, and the tokenizer where there is one.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Aligns and writes.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    args.calibration.check()?;
    check_unit("level", args.level).map_err(|e| usage(format!("--level: {}", e.message)))?;
    let model = args.model.load(global, WeightMode::Auto)?;
    let chunks = args.calibration.read(&model, global)?;
    let alignment = model.alignment(chunks.iter(), AlignOptions { level: args.level })?;
    minicache_models::align::save(&model, &alignment, &args.out)?;
    output::line(format!(
        "{}: {} aligned on {} tokens of {}",
        args.out.display(),
        model.name,
        alignment.tokens,
        chunks.text
    ))
}
