//! `minicache generate`: continues a prompt with any cache.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use minicache_config::WeightMode;
use minicache_core::{CacheSpec, Sequence};
use minicache_models::{LogitsFor, Model, Step};

use crate::failure::{OrUsage, usage};
use crate::global::Global;
use crate::prompt::{PromptArgs, Rendered, need_chat};
use crate::shape::at_least_one;
use crate::source::{ModelArgs, prepare};

/// Options of `minicache generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// The cache: a method's name, such as minicache-4, or an inline table.
    #[arg(long, default_value = "full", value_name = "SPEC")]
    cache: String,
    /// Tokens to generate, at most.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// Continue the prompt as it stands, without the model's chat template.
    #[arg(long)]
    raw: bool,
    /// Insist on the chat template: an error where the model has none.
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Sample at this temperature; 0 takes the most likely token.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "T")]
    temperature: f64,
    /// Sample from the most likely tokens that together have this probability.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Write the prompt's cache to this file.
    #[arg(long, value_name = "FILE")]
    save_cache: Option<PathBuf>,
    /// Go on from a cache that was saved of the same model and method, whose prompt this one begins with.
    #[arg(long, value_name = "FILE")]
    load_cache: Option<PathBuf>,
}

/// Generates, streaming to stdout; says on stderr what it took.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let spec = CacheSpec::parse(&args.cache).or_usage("--cache")?;
    at_least_one("--max-new-tokens", args.max_new_tokens)?;
    let sampling = sampling(args)?;
    let prompt = args.prompt.read()?;
    let model = args.model.load(global, WeightMode::Auto)?;
    let tokens = encode(args, &model, &prompt)?;
    let room = model.config.context.saturating_sub(tokens.len());
    if room == 0 {
        let (tokens, context) = (tokens.len(), model.config.context);
        return Err(usage(format!("the prompt has {tokens} tokens and the model's context is {context}")));
    }
    let planned_len = tokens.len() + args.max_new_tokens.min(room);
    let mut sampler = LogitsProcessor::from_sampling(args.seed, sampling);
    let spec = &prepare(&model, std::slice::from_ref(&spec), global)?[0];
    let mut sequence = match &args.load_cache {
        Some(path) => saved(&model, spec, planned_len, path, &tokens)?,
        None => model.sequence(spec, planned_len)?,
    };
    let loaded = sequence.len();

    let start = Instant::now();
    let mut next = forward(&model, &mut sequence, &tokens[loaded..], &mut sampler)?;
    let prefill = start.elapsed();
    if let Some(path) = &args.save_cache {
        model.save_sequence(&sequence, spec, &tokens, path)?;
    }

    let mut stream = model.need_tokenizer()?.stream(true);
    let mut stdout = std::io::stdout().lock();
    let mut say = |text: &str| -> Result<()> {
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to stdout")
    };
    let start = Instant::now();
    let mut steps = 0;
    let mut made = 0;
    while !model.stop_ids().contains(&next) {
        say(&stream.push(next)?)?;
        made += 1;
        if tokens.len() + made == planned_len {
            break;
        }
        next = forward(&model, &mut sequence, &[next], &mut sampler)?;
        steps += 1;
    }
    say(&stream.finish()?)?;
    say("\n")?;
    let decode = start.elapsed();
    if tokens.len() + made == planned_len && made < args.max_new_tokens {
        eprintln!("stopped after {made} tokens: the model's context of {planned_len} tokens is full");
    }
    eprintln!("{}", summary(spec, &sequence, (tokens.len() - loaded, prefill), (steps, decode)));
    Ok(())
}

/// The sequence of a saved cache that the prompt begins with.
fn saved(
    model: &Model,
    spec: &CacheSpec,
    planned_len: usize,
    path: &Path,
    prompt: &[u32],
) -> Result<Sequence> {
    let (sequence, tokens) = model.load_sequence(spec, planned_len, path)?;
    let alike = tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    if alike < tokens.len() {
        return Err(usage(format!(
            "{}: the prompt does not begin with the saved one: {alike} of its {} tokens are the same",
            path.display(),
            tokens.len()
        )));
    }
    if tokens.len() == prompt.len() {
        let message = "the saved prompt is all of this one; there is nothing to go on with";
        return Err(usage(format!("{}: {message}", path.display())));
    }
    Ok(sequence)
}

/// One step: the token that follows.
fn forward(
    model: &Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    sampler: &mut LogitsProcessor,
) -> Result<u32> {
    let step = Step { tokens, sequence, logits: LogitsFor::Last };
    let logits = model.decoder.forward(&mut [step])?.into_data();
    let words = logits.len();
    Ok(sampler.sample(&Tensor::from_vec(logits, words, &Device::Cpu)?)?)
}

fn sampling(args: &Args) -> Result<Sampling> {
    let (temperature, p) = (args.temperature, args.top_p);
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(usage(format!("--temperature: must be at least 0, not {temperature}")));
    }
    if !(p > 0.0 && p <= 1.0) {
        return Err(usage(format!("--top-p: must be above 0 and at most 1, not {p}")));
    }
    Ok(match (temperature, p) {
        (0.0, _) => Sampling::ArgMax,
        (_, 1.0) => Sampling::All { temperature },
        _ => Sampling::TopP { p, temperature },
    })
}

/// The prompt's tokens: as a chat where the model has a template, unless told otherwise.
fn encode(args: &Args, model: &Model, prompt: &str) -> Result<Vec<u32>> {
    let tokenizer = model.need_tokenizer()?;
    let template = match &model.chat {
        template if args.chat || args.system.is_some() => Some(need_chat(template.as_ref(), &model.name)?),
        template => template.as_ref().filter(|_| !args.raw),
    };
    let rendered = match template {
        Some(template) => Rendered::chat(tokenizer, template, prompt, args.system.as_deref())?,
        None => Rendered::plain(tokenizer, prompt)?,
    };
    Ok(rendered.tokens)
}

fn summary(
    spec: &CacheSpec,
    sequence: &Sequence,
    prefill: (usize, Duration),
    decode: (usize, Duration),
) -> String {
    let rate = |(tokens, time): (usize, Duration)| tokens as f64 / time.as_secs_f64().max(1e-9);
    let (held, full) = (sequence.footprint().total(), sequence.shape().full_bytes(sequence.len()));
    let decoded = match decode.0 {
        0 => String::new(),
        n => format!("; decode: {n} tokens, {:.1} tokens/s", rate(decode)),
    };
    format!(
        "prefill: {} tokens, {:.1} tokens/s{decoded}; {} cache: {} for {} tokens, {:.2}x",
        prefill.0,
        rate(prefill),
        spec.label(),
        indicatif::BinaryBytes(held as u64),
        sequence.len(),
        full as f64 / held.max(1) as f64
    )
}
