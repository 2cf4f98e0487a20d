//! `minicache calibrate`: the basis of latent caches, from text.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use minicache_config::WeightMode;
use minicache_core::latent::Grouping;
use minicache_core::settings::Heads;
use minicache_models::calibrate::{self, BasisOptions, CalibrationInfo};

use crate::calibration::CalibrationArgs;
use crate::failure::usage;
use crate::global::Global;
use crate::output;
use crate::shape::at_least_one;
use crate::source::ModelArgs;
use crate::tensors;

/// Options of `minicache calibrate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Sizes of the groups of layers that caches may ask for, such as 1,2,4.
    #[arg(long, value_delimiter = ',', default_value = "4", value_name = "G,..")]
    groups: Vec<usize>,
    /// Numbers of KV heads that share a latent in caches (`heads`), such as all,1.
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "all|H,..", value_parser = heads)]
    heads: Vec<Heads>,
    /// First tokens of each sequence that are not counted, as caches store them exactly.
    #[arg(long, default_value_t = 4, value_name = "N")]
    sinks: usize,
    /// Where the basis goes; caches take it as `basis = "FILE"`.
    #[arg(long, value_name = "BASIS.safetensors")]
    out: PathBuf,
}

fn heads(text: &str) -> std::result::Result<Heads, String> {
    match text.parse() {
        Ok(0) => Err("must be \"all\" or at least 1 KV head".to_string()),
        Ok(number) => Ok(Heads::Number(number)),
        Err(_) if text == "all" => Ok(Heads::All),
        Err(_) => Err("must be \"all\" or a number of KV heads".to_string()),
    }
}

/// Calibrates and writes.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let groups: Vec<usize> = args.groups.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    for &group in &groups {
        at_least_one("--groups", group)?;
    }
    args.calibration.check()?;
    tensors::check_out(&args.out)?;
    let model = args.model.load(global, WeightMode::Auto)?;
    let layers = model.config.layers;
    if let Some(group) = groups.iter().find(|g| **g > layers) {
        return Err(usage(format!("--groups: at most the model's {layers} layers, not {group}")));
    }
    let chunks = args.calibration.read(&model, global)?;
    let start = Instant::now();
    let widths: BTreeSet<usize> = args.heads.iter().map(|h| h.of(model.config.kv_heads)).collect();
    let grouping = |&layers: &usize| widths.iter().map(move |&heads| Grouping { layers, heads });
    let groupings: Vec<Grouping> = groups.iter().flat_map(grouping).collect();
    let options = BasisOptions::default();
    let (basis, tokens) = model.calibrate(chunks.iter(), &groupings, &groupings, args.sinks, options)?;
    let info = CalibrationInfo {
        model: model.fingerprint.clone(),
        text: chunks.text,
        tokens,
        sinks: args.sinks,
        options,
    };
    calibrate::save(&basis, &info, &args.out)?;
    output::line(format!(
        "{}: {} calibrated on {} tokens of {} in {:.0} s",
        args.out.display(),
        model.name,
        info.tokens,
        info.text,
        start.elapsed().as_secs_f64()
    ))
}
