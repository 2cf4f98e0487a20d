//! `minicache device-check`: a GPU's kernels against the host, how much of its memory's bandwidth they use, and what a whole
//! model of random weights gains by compressed caches.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use minicache_core::{CacheSpec, ModelShape, Resources, Sequence};
use minicache_device::driver::Act;
use minicache_device::{Arithmetic, Device, Devices, check, kernels};
use minicache_models::{Decoder, LogitsFor, ModelConfig, Step, Target};
use serde_json::{Value, json};

use crate::failure::{OrUsage, usage};
use crate::global::Global;
use crate::output;

/// Options of `minicache device-check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to do: `kernels` against the host, the `attention` of decode steps timed, whole `models` of random weights.
    #[arg(long, value_delimiter = ',', default_value = "kernels,attention", value_name = "PART,..")]
    parts: Vec<Part>,
    /// Compare this cache, and others named so, with the host; every kind where none is given.
    #[arg(long, value_name = "SPEC")]
    cache: Vec<String>,
    /// A folder with the config.json of the model of which random weights are made; LLaMA-2-7B where none is given.
    #[arg(long, value_name = "DIR")]
    model: Option<std::path::PathBuf>,
    /// Tokens of each sequence of a whole model, before it decodes.
    #[arg(long, default_value_t = 512, value_name = "N")]
    context: usize,
    /// Sequences of a whole model; as many as the memory holds where not given.
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// Write the text of every kernel, in every specialisation that the methods use, to this folder, and do nothing else.
    #[arg(long, value_name = "DIR")]
    sources: Option<std::path::PathBuf>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Kernels,
    Attention,
    Models,
}

/// What is compared with the host, and within what.
const COMPARED: [&str; 25] = [
    "full",
    "{ method = \"full\", dtype = \"f32\" }",
    "kivi-2",
    "kivi-3",
    "kivi-4",
    "kivi-8",
    "rtn-2",
    "rtn-4",
    "mean",
    "max_norm",
    "minicache",
    "minicache-2",
    "minicache-4",
    "{ method = \"minicache\", granularity = \"head\", start_layer = 0, sinks = 3 }",
    "{ method = \"minicache\", retention = { rule = \"top_fraction\", gamma = 0.2, joint = true } }",
    "rank_one",
    "latent",
    "{ method = \"latent\", residual = 16, k = { bits = 2 }, v = { bits = 3 } }",
    "{ method = \"latent\", k = { rate = 2.0 }, v = { rate = 1.5 } }",
    "{ method = \"latent\", k = { rate = 2.0, trellis = true }, v = { rate = 1.5, trellis = true } }",
    "sinks",
    "h2o",
    "{ method = \"h2o\", dtype = \"f32\" }",
    "snapkv",
    "expected_attention",
];

/// Largest difference of outputs and of states, relative to the largest.
const TOLERANCE: f32 = 2e-3;

/// The largest share of states that may differ by more, where codes are of sums that are rounded otherwise.
const MOST_APART: f32 = 1e-3;

const LLAMA_2_7B: ModelShape = ModelShape {
    layers: 4,
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
    scale: 0.088_388_35,
    ..ModelShape::PLAIN
};
const LLAMA_3_8B: ModelShape = ModelShape { kv_heads: 8, ..LLAMA_2_7B };
const SMALL: ModelShape =
    ModelShape { layers: 4, heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, ..ModelShape::PLAIN };
const WINDOWED: ModelShape = ModelShape { window: Some(60), ..SMALL };

/// The caches whose attention is timed: deep merging in every layer, as a kernel of one layer has it.
const TIMED: [&str; 9] = [
    "full",
    "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, group = 32, residual = 32 } }",
    "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, group = 32, residual = 32 }, activation_bits = 8 }",
    "kivi-4",
    "{ method = \"kivi\", activation_bits = 8 }",
    "kivi-2",
    "{ method = \"minicache\", start_layer = 0 }",
    "latent",
    "{ method = \"latent\", k = { rate = 2.0, trellis = true }, v = { rate = 1.5, trellis = true } }",
];

const LLAMA_2_7B_CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": false}"#;

/// Checks and prints.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    if let Some(folder) = &args.sources {
        return write_sources(folder);
    }
    let targets = global.devices()?;
    let [Target::Device(device)] = &targets[..] else {
        return Err(usage("--device: a check is of one GPU, such as --device cuda:0"));
    };
    let (free, total) = device.driver.memory()?;
    let mut out = json!({
        "device": device.driver.name(),
        "description": device.driver.describe(),
        "memory_bytes": total,
        "free_bytes": free,
    });
    if !args.json {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (name, what) = (device.driver.name(), device.driver.describe());
        output::line(format!("{name}: {what}; {:.1} of {:.1} GiB free", gib(free), gib(total)))?;
    }
    let mut wrong = 0;
    for part in &args.parts {
        match part {
            Part::Kernels => out["kernels"] = compare(device, args, &mut wrong)?,
            Part::Attention => out["attention"] = attention(device, args.json)?,
            Part::Models => out["models"] = models(device, args)?,
        }
    }
    if args.json {
        output::line(out)?;
    }
    if wrong > 0 {
        bail!(
            "{wrong} caches differ from the host's, by more than {TOLERANCE}, in their bytes or in how far they go back"
        );
    }
    Ok(())
}

fn compare(device: &Arc<Device>, args: &Args, wrong: &mut usize) -> Result<Value> {
    let named: Vec<&str> = args.cache.iter().map(String::as_str).collect();
    let caches = if named.is_empty() { &COMPARED[..] } else { &named[..] };
    let mut rows = Vec::new();
    let shapes =
        [("LLaMA-3-8B", LLAMA_3_8B), ("LLaMA-2-7B", LLAMA_2_7B), ("SmolLM2", SMALL), ("windowed", WINDOWED)];
    for (name, shape) in shapes {
        for text in caches {
            let spec = CacheSpec::parse(text).or_usage(text)?;
            let arithmetic = Arithmetic { act: Act::F16, precise: false };
            let devices = Devices::new(vec![(device.clone(), 0..shape.layers)], arithmetic);
            let found =
                check::compare(&devices, &spec, &shape).with_context(|| format!("{text} ({name})"))?;
            // Where a number became another code, outputs are held to what that makes of them on the whole.
            let near = match found.states < TOLERANCE {
                true => found.outputs < TOLERANCE,
                false => found.apart < MOST_APART && found.spread < TOLERANCE,
            };
            // A method that drops tokens for a step's cannot take them back, and room for heavy hitters behind a sliding
            // window is that of the head which could have most.
            let whole = found.bytes == 1.0 && !found.stuck;
            let good = near && found.truncation.is_none() && (whole || spec.drops_tokens());
            *wrong += usize::from(!good);
            if !args.json {
                output::line(format!(
                    "{name:<12} {:<15} outputs {:.1e} (rms {:.1e})  states {:.1e} ({:.1e} of them apart)  bytes {:.4} of the host's  {}",
                    spec.label(),
                    found.outputs,
                    found.spread,
                    found.states,
                    found.apart,
                    found.bytes,
                    if good { "equal" } else { "DIFFERENT" }
                ))?;
                if let Some(truncation) = &found.truncation {
                    output::line(format!("{:<12} truncated {truncation}", ""))?;
                }
            }
            rows.push(json!({
                "shape": name,
                "cache": text,
                "outputs": found.outputs,
                "outputs_rms": found.spread,
                "states": found.states,
                "states_apart": found.apart,
                "bytes": found.bytes,
                "allocated": found.allocated,
                "truncation": found.truncation,
                "stuck": found.stuck,
                "equal": good,
            }));
        }
    }
    Ok(rows.into())
}

fn attention(device: &Arc<Device>, json: bool) -> Result<Value> {
    let (free, _) = device.driver.memory()?;
    let copy = check::copy_bandwidth(device, ((free / 8) as usize).min(1 << 30))?;
    if !json {
        output::line(format!("a copy reads and writes {:.0} GB/s", copy / 1e9))?;
    }
    let mut rows = Vec::new();
    let emulated = device.driver.name().starts_with("emulated");
    // An emulated device shows that this works, not how fast it is.
    let loads = if emulated { [(2, 300), (1, 500)] } else { [(32, 4096), (1, 32_768)] };
    for (name, shape) in [("LLaMA-2-7B", LLAMA_2_7B), ("LLaMA-3-8B", LLAMA_3_8B)] {
        for (batch, context) in loads {
            let mut full = None;
            for text in TIMED {
                let spec = CacheSpec::parse(text).or_usage(text)?;
                let read = check::time_attention(device, &spec, &shape, batch, context)
                    .with_context(|| format!("{text} ({name}, {batch} x {context})"))?;
                let full = *full.get_or_insert(read);
                let rate = read.bytes / read.seconds;
                let (faster, ratio) = (full.seconds / read.seconds, full.held as f64 / read.held as f64);
                let rounded = if spec.activation_bits() == Some(8) { ", a8" } else { "" };
                let label = spec.label() + rounded;
                if !json {
                    output::line(format!(
                        "{name:<12} {batch:>2} x {context:<6} {label:<15} {:>9.1} us a layer  {:>6.0} GB/s, {:>3.0} % of the copy  {faster:.2} x full's speed at {ratio:.2}x",
                        read.seconds * 1e6,
                        rate / 1e9,
                        100.0 * rate / copy,
                    ))?;
                }
                rows.push(json!({
                    "shape": name,
                    "batch": batch,
                    "context": context,
                    "cache": text,
                    "seconds": read.seconds,
                    "bytes_per_second": rate,
                    "share_of_copy": rate / copy,
                    "speed_over_full": faster,
                    "ratio": ratio,
                }));
            }
        }
    }
    Ok(json!({ "copy_bytes_per_second": copy, "rows": rows }))
}

/// Tokens that are decoded and timed.
const DECODED: usize = 32;

fn models(device: &Arc<Device>, args: &Args) -> Result<Value> {
    let config = match &args.model {
        Some(folder) => ModelConfig::from_dir(folder)?,
        None => ModelConfig::from_json(LLAMA_2_7B_CONFIG)?,
    };
    let decoder = Decoder::random(&config, device)?;
    let mut rows: Vec<Value> = Vec::new();
    for text in [
        "full",
        "kivi-4",
        "kivi-2",
        "minicache-4",
        "{ method = \"minicache\", start_layer = 0, quant = { bits = 4 } }",
    ] {
        let spec = CacheSpec::parse(text).or_usage(text)?;
        for batch in [args.batch.unwrap_or(16), 0] {
            // 0: as many as there is room for.
            if batch == 0 && args.batch.is_some() {
                continue;
            }
            let row = throughput(device, &decoder, &spec, text, args.context, batch)?;
            if !args.json {
                let of = |key: &str| row[key].as_f64().unwrap_or(0.0);
                output::line(format!(
                    "{:<12} {:>4} sequences of {}: {:>8.0} tokens/s decode, {:>8.0} prefill, caches {:.2} GB, device {:.2} GB in use",
                    spec.label(),
                    row["batch"],
                    args.context,
                    of("decode_tokens_per_s"),
                    of("prefill_tokens_per_s"),
                    of("cache_bytes") / 1e9,
                    of("used_bytes") / 1e9,
                ))?;
            }
            rows.push(row);
        }
    }
    Ok(rows.into())
}

/// Prefills sequences one by one, then decodes all of them together.
fn throughput(
    device: &Arc<Device>,
    decoder: &Decoder,
    spec: &CacheSpec,
    text: &str,
    context: usize,
    batch: usize,
) -> Result<Value> {
    let vocab = decoder.config().vocab as u32;
    let planned = context + DECODED + 8;
    let tokens: Vec<u32> = (0..context as u32).map(|i| (i * 7919 + 13) % vocab).collect();
    let mut sequences: Vec<Sequence> = Vec::new();
    let start = Instant::now();
    loop {
        let resources = Resources { rotary: Some(decoder.rotary(planned)), latent: None };
        let mut sequence = decoder.sequence(decoder.cache(spec, &resources)?, planned);
        let mut steps = [Step { tokens: &tokens, sequence: &mut sequence, logits: LogitsFor::None }];
        match decoder.forward(&mut steps) {
            Err(error) if error.is_out_of_memory() && !sequences.is_empty() => {
                break;
            }
            done => done?,
        };
        sequences.push(sequence);
        let each = sequences.iter().map(|s| s.footprint().total()).sum::<usize>() / sequences.len();
        let (room, pool) = (device.driver.memory()?.0 as usize, &device.pool);
        // What decoding adds to all in whole blocks, and the working memory of a step.
        let growth = each * sequences.len() * 128 / context + sequences.len() * vocab as usize * 4;
        let full = room + pool.reserved() - pool.held() < 2 * each + growth + (2 << 30);
        if sequences.len() == batch || (batch == 0 && (full || sequences.len() == 2048)) {
            break;
        }
    }
    device.driver.synchronise()?;
    let prefill = (sequences.len() * context) as f64 / start.elapsed().as_secs_f64();
    // Where the room does not last, with as many sequences as it lasts for.
    let seconds = loop {
        let timed = decode(decoder, &mut sequences, 4).and_then(|_| decode(decoder, &mut sequences, DECODED));
        match timed {
            Err(error) if error.is_out_of_memory() && sequences.len() > 1 => {
                sequences.truncate(sequences.len() * 9 / 10);
            }
            timed => break timed?,
        }
    };
    let held: usize = sequences.iter().map(|s| s.footprint().total()).sum();
    let (free, total) = device.driver.memory()?;
    Ok(json!({
        "cache": text,
        "batch": sequences.len(),
        "context": context,
        "decode_tokens_per_s": (sequences.len() * DECODED) as f64 / seconds,
        "prefill_tokens_per_s": prefill,
        "cache_bytes": held,
        "used_bytes": total - free,
    }))
}

/// Decodes so many tokens of all sequences, and gives the seconds that it takes.
fn decode(decoder: &Decoder, sequences: &mut [Sequence], tokens: usize) -> minicache_models::Result<f64> {
    let mut last = vec![5u32; sequences.len()];
    let start = Instant::now();
    for _ in 0..tokens {
        let steps = sequences.iter_mut().zip(&last).map(|(sequence, token)| Step {
            tokens: std::slice::from_ref(token),
            sequence,
            logits: LogitsFor::Last,
        });
        let next = decoder.forward_greedy(&mut steps.collect::<Vec<_>>())?;
        last = next;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Writes every kernel in every specialisation, for a compiler to look at.
fn write_sources(folder: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(folder).or_usage(folder.display())?;
    let shapes = [LLAMA_2_7B, LLAMA_3_8B, SMALL, ModelShape { head_dim: 96, ..LLAMA_2_7B }];
    let mut count = 0;
    // What latents upload has to be somewhere.
    let device = Device::open("emulated", 0)?;
    for source in check::sources(&device, &[&COMPARED[..], &TIMED].concat(), &shapes)? {
        let name = format!("{count:03}-{}", source.file.name());
        let path = folder.join(name);
        std::fs::write(&path, source.text(false)).with_context(|| path.display().to_string())?;
        count += 1;
    }
    output::line(format!(
        "{count} files of kernels ({} kinds) in {}",
        kernels::File::ALL.len(),
        folder.display()
    ))
}
