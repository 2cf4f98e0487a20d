//! `minicache bench`: how fast a model decodes with each cache, and how near that is to what memory allows.

use std::io::IsTerminal;

use anyhow::Result;
use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use minicache_config::WeightMode;
use minicache_core::CacheSpec;
use serde_json::json;

use crate::bench::{Attention, MOST_STEPS, Measured, Whole, bandwidth_gb_s, bytes_wanted, measure};
use crate::failure::{OrUsage, usage};
use crate::global::Global;
use crate::output;
use crate::shape::{Shape, SimilarityArgs, at_least_one, check_batch};
use crate::source::{ModelArgs, prepare};

/// Options of `minicache bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A cache: a method's name, such as minicache-4, or an inline table; may be given again. By default full and
    /// minicache-4.
    #[arg(long, value_name = "SPEC")]
    cache: Vec<String>,
    /// Tokens of each sequence before the first decode step.
    #[arg(long, value_name = "N")]
    context: usize,
    /// Sequences that decode together.
    #[arg(long, default_value_t = 1, value_name = "B")]
    batch: usize,
    /// Run the caches alone, on synthetic states of the model's shape: needs no weights.
    #[arg(long)]
    attention_only: bool,
    #[command(flatten)]
    similarity: SimilarityArgs,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Measures all caches and prints them side by side.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    at_least_one("--context", args.context)?;
    check_batch(args.batch)?;
    let similarity = args.similarity.get()?;
    let texts: Vec<String> = match args.cache.as_slice() {
        [] => ["full", "minicache-4"].map(String::from).to_vec(),
        given => given.to_vec(),
    };
    let specs: Vec<CacheSpec> =
        texts.iter().map(|t| CacheSpec::parse(t).or_usage("--cache")).collect::<Result<_>>()?;

    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        bar
    });
    let progress = |text: &str| {
        if let Some(bar) = &bar {
            bar.set_message(text.to_string());
        }
    };
    let (name, shape, bandwidth, measured);
    if args.attention_only {
        let model = Shape::find(&args.model.model)?;
        for spec in &specs {
            spec.validate_for(&model.shape).map_err(|e| e.under("cache")).or_usage("--cache")?;
        }
        let memory = free_memory() / 10 * 7;
        // Merging takes two layers, and where fewer fit there is nothing to scale from.
        let least = model.shape.layers.min(2) as f64 / model.shape.layers as f64;
        check_memory(args, least * bytes_wanted(&model.shape, &specs, args.context, args.batch), memory)?;
        progress("measuring memory bandwidth");
        bandwidth = bandwidth_gb_s();
        let mut subject = Attention::new(&model.shape, &specs, args.context, args.batch, similarity, memory)?;
        let (layers, of) = subject.layers();
        measured = measure(&mut subject, &specs, bandwidth * 1e9, &progress)?;
        if layers < of {
            eprintln!("{layers} of {of} layers fit into memory; times and bytes are scaled to {of}");
        }
        (name, shape) = (model.name, model.shape);
    } else {
        let model = args.model.load(global, WeightMode::Auto)?;
        let context = model.config.context;
        if args.context + MOST_STEPS > context {
            let most = context.saturating_sub(MOST_STEPS);
            return Err(usage(format!(
                "--context: at most {most} for {}: its context is {context} and {MOST_STEPS} tokens are decoded",
                model.name
            )));
        }
        shape = *model.decoder.shape();
        check_memory(args, bytes_wanted(&shape, &specs, args.context, args.batch), free_memory() / 10 * 9)?;
        let specs = prepare(&model, &specs, global)?;
        progress("measuring memory bandwidth");
        bandwidth = bandwidth_gb_s();
        let mut subject = Whole::new(&model, args.context, args.batch);
        measured = measure(&mut subject, &specs, bandwidth * 1e9, &progress)?;
        name = model.name.clone();
    }
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let full = shape.full_bytes(args.context) as f64 * args.batch as f64;
    if args.json {
        let runs: Vec<_> = texts
            .iter()
            .zip(&measured)
            .map(|(text, m)| {
                json!({
                    "cache": text,
                    "prefill_tokens_per_s": m.prefill_tokens_per_s,
                    "decode_tokens_per_s": m.decode_tokens_per_s,
                    "cache_bytes": m.cache_bytes.round() as u64,
                    "ratio": full / m.cache_bytes,
                    "bandwidth_share": m.bandwidth_share,
                })
            })
            .collect();
        return output::line(json!({
            "model": name,
            "context": args.context,
            "batch": args.batch,
            "bandwidth_gb_s": bandwidth,
            "runs": runs,
        }));
    }
    let what = if args.attention_only { ", attention only" } else { "" };
    let (context, batch) = (args.context, args.batch);
    output::line(format!("{name}{what}: {batch} x {context} tokens; memory delivers {bandwidth:.1} GB/s"))?;
    table(&texts, &measured, full)
}

fn table(texts: &[String], measured: &[Measured], full: f64) -> Result<()> {
    let width = texts.iter().map(|t| t.chars().count()).max().unwrap_or(0).max("cache".len());
    let (prefill, decode) = ("prefill", "decode");
    output::line(format!(
        "{:width$}  {prefill:>10}  {decode:>10}  {:>12}  {:>7}  {:>9}",
        "cache", "bytes", "ratio", "bandwidth"
    ))?;
    output::line(format!("{:width$}  {:>10}  {:>10}", "", "tokens/s", "tokens/s"))?;
    for (text, m) in texts.iter().zip(measured) {
        output::line(format!(
            "{text:width$}  {:>10.1}  {:>10.1}  {:>12}  {:>6.2}x  {:>7.0} %",
            m.prefill_tokens_per_s,
            m.decode_tokens_per_s,
            BinaryBytes(m.cache_bytes as u64).to_string(),
            full / m.cache_bytes,
            100.0 * m.bandwidth_share
        ))?;
    }
    Ok(())
}

/// Refuses what would not fit into memory, rather than be killed half way.
fn check_memory(args: &Args, bytes: f64, memory: usize) -> Result<()> {
    if bytes <= memory as f64 {
        return Ok(());
    }
    let [bytes, memory] = [bytes as u64, memory as u64].map(BinaryBytes);
    Err(usage(format!(
        "--context {} with --batch {}: the caches take {bytes} together, and {memory} are free; lower one of them",
        args.context, args.batch
    )))
}

/// Bytes that can be allocated without swapping, as the kernel estimates it; 4 GiB where it does not.
fn free_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<usize>().ok());
    kib.map_or(4 << 30, |kib| kib << 10)
}
