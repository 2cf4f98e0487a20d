//! `minicache footprint`: bytes of a cache in a model of any size, without its weights.

use anyhow::Result;
use minicache_core::{CacheSpec, Footprint, Resources, footprint, nominal, shared_bytes};
use serde_json::json;

use super::parts_json;
use crate::failure::OrUsage;
use crate::global::Global;
use crate::output;
use crate::shape::{Shape, SimilarityArgs, at_least_one, check_batch};

/// Options of `minicache footprint`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a name of `minicache models`, or a folder or .gguf file of which only the configuration is read.
    #[arg(long, value_name = "M")]
    model: String,
    /// The cache: a method's name, such as minicache-4, or an inline table.
    #[arg(long, default_value = "minicache", value_name = "SPEC")]
    cache: String,
    /// Tokens of each sequence.
    #[arg(long, value_name = "N")]
    context: usize,
    /// Sequences.
    #[arg(long, default_value_t = 1, value_name = "B")]
    batch: usize,
    #[command(flatten)]
    similarity: SimilarityArgs,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
pub(crate) fn run(args: &Args, _: &Global) -> Result<()> {
    at_least_one("--context", args.context)?;
    check_batch(args.batch)?;
    let spec = CacheSpec::parse(&args.cache).or_usage("--cache")?;
    let similarity = args.similarity.get()?;
    let model = Shape::find(&args.model)?;
    let one = footprint(&spec, &model.shape, &Resources::default(), args.context, similarity)
        .or_usage(format!("--cache for {}", model.name))?;
    let held = one.times(args.batch);
    let shared = shared_bytes(&spec, &model.shape, args.context).or_usage("--cache")?;
    let full = model.shape.full_bytes(args.context).saturating_mul(args.batch);
    let ratio = full as f64 / held.total() as f64;
    if args.json {
        let mut out = json!({
            "model": model.name,
            "context": args.context,
            "batch": args.batch,
            "full_bytes": full,
            "bytes": held.total(),
            "ratio": ratio,
            "parts": parts_json(&held),
        });
        // Not a part: it does not grow with sequences or tokens.
        if shared > 0 {
            out["once_per_model"] = shared.into();
        }
        return output::line(out);
    }
    print(args, &spec, &model, &held, (full, shared))
}

fn print(
    args: &Args,
    spec: &CacheSpec,
    model: &Shape,
    held: &Footprint,
    (full, shared): (usize, usize),
) -> Result<()> {
    let s = &model.shape;
    let total = held.total();
    let window = s.window.map_or(String::new(), |w| format!(", window {w}"));
    output::line(format!(
        "{}: {} layers, {} KV heads of {}{window}; {} of {} tokens",
        model.name,
        s.layers,
        s.kv_heads,
        s.head_dim,
        plural(args.batch, "sequence"),
        args.context
    ))?;
    let row = |name: &str, bytes: usize, note: String| {
        output::line(format!("  {name:<12}{bytes:>16}  {:>10}  {note}", size(bytes)).trim_end())
    };
    row("full FP16", full, String::new())?;
    row(&spec.label(), total, format!("{:.2}x", full as f64 / total as f64))?;
    for (part, bytes) in held.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
        row(&format!("  {part}"), bytes, format!("{:.1} %", 100.0 * bytes as f64 / total as f64))?;
    }
    if shared > 0 {
        row("once per model", shared, "basis and table of phases, whatever the batch".to_string())?;
    }
    let Some(nominal) = nominal(spec, s, args.context) else { return Ok(()) };
    output::line("On paper")?;
    for line in &nominal.lines {
        output::line(format!("  {line}"))?;
    }
    let measured = full as f64 / total as f64;
    if nominal.ratio / measured > 1.005 {
        output::line(format!(
            "  with all that is allocated beside it (magnitudes, retained tokens, residual window, lists): {measured:.2}x"
        ))?;
    }
    Ok(())
}

/// `1 sequence`, `4 sequences`.
fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Bytes in the unit that keeps them short.
fn size(bytes: usize) -> String {
    indicatif::BinaryBytes(bytes as u64).to_string()
}
