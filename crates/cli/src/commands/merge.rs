//! `minicache merge`: compresses one pair of layers outside a model.

use std::path::PathBuf;

use anyhow::Result;
use minicache_core::settings::Granularity;
use minicache_core::{CacheSpec, MergedPair, PairStates, merge_pair};
use serde_json::{Value, json};

use super::parts_json;
use crate::failure::OrUsage;
use crate::global::Global;
use crate::output;
use crate::tensors::{self, Tensor};

/// Options of `minicache merge`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// States of two adjacent layers: a.key, b.key, a.value, b.value, f32 (kv_heads, tokens, head_dim).
    #[arg(value_name = "PAIR.safetensors")]
    pair: PathBuf,
    /// The cache: a method's name, such as minicache-4, or an inline table.
    #[arg(long, default_value = "minicache", value_name = "SPEC")]
    cache: String,
    /// Where the restored states go, under the same names.
    #[arg(long, value_name = "RESTORED.safetensors")]
    out: PathBuf,
    /// Print retained positions and bytes as JSON.
    #[arg(long)]
    json: bool,
}

const NAMES: [&str; 4] = ["a.key", "b.key", "a.value", "b.value"];

/// Merges, writes what attention would see, and says what was kept.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    let spec = CacheSpec::parse(&args.cache).or_usage("--cache")?;
    tensors::check_out(&args.out)?;
    let read = tensors::read_states(&args.pair, &NAMES)?;
    let (kv_heads, tokens, head_dim) = (read[0].shape[0], read[0].shape[1], read[0].shape[2]);
    let states: Vec<Vec<f32>> = read.iter().map(Tensor::states).collect();
    let states = PairStates {
        kv_heads,
        head_dim,
        key_a: &states[0],
        key_b: &states[1],
        value_a: &states[2],
        value_b: &states[3],
    };
    let merged = merge_pair(&spec, &states).or_usage("--cache")?;
    let [a, b] = &merged.restored;
    let restored: Vec<Tensor> = NAMES
        .into_iter()
        .zip([&a.keys, &b.keys, &a.values, &b.values])
        .map(|(name, x)| Tensor::of_states(name, x, kv_heads, head_dim))
        .collect();
    tensors::write(&args.out, &restored)?;
    if args.json {
        return output::line(to_json(&merged, spec.pairing().unwrap_or_default().granularity, kv_heads));
    }
    print(&merged, &spec, tokens)
}

fn to_json(merged: &MergedPair, granularity: Granularity, kv_heads: usize) -> Value {
    let positions = |lanes: &[Vec<usize>]| positions(lanes, granularity, kv_heads);
    json!({
        "retained": { "key": positions(&merged.retained_keys), "value": positions(&merged.retained_values) },
        "bytes": {
            "before": merged.bytes_before,
            "after": merged.footprint.total(),
            "parts": parts_json(&merged.footprint),
        },
    })
}

/// One list where a whole token is retained, a list per KV head, however many there are, where heads are treated apart.
/// Of a side that is not merged there are no `lanes`.
fn positions(lanes: &[Vec<usize>], granularity: Granularity, kv_heads: usize) -> Value {
    let of_lane = |lane: usize| lanes.get(lane).map_or(&[][..], Vec::as_slice);
    match granularity {
        Granularity::Token => json!(of_lane(0)),
        Granularity::Head => (0..kv_heads).map(of_lane).collect(),
    }
}

fn print(merged: &MergedPair, spec: &CacheSpec, tokens: usize) -> Result<()> {
    let (before, after) = (merged.bytes_before, merged.footprint.total());
    output::line(format!(
        "{}: {tokens} tokens, {before} bytes as full FP16, {after} stored: {:.2}x",
        spec.label(),
        before as f64 / after as f64
    ))?;
    for (part, bytes) in merged.footprint.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
        output::line(format!("  {part:<11}{bytes:>12}"))?;
    }
    for (side, lanes) in [("keys", &merged.retained_keys), ("values", &merged.retained_values)] {
        let counts: Vec<String> = lanes.iter().map(|l| l.len().to_string()).collect();
        if !counts.is_empty() {
            output::line(format!("  retained {side}: {} of {tokens} tokens", counts.join(", ")))?;
        }
    }
    Ok(())
}
