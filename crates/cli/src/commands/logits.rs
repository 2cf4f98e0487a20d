//! `minicache logits`: what a model with a cache predicts, for comparison with other implementations.

use std::path::PathBuf;

use anyhow::Result;
use minicache_config::WeightMode;
use minicache_models::{LogitsFor, Step};

use crate::failure::usage;
use crate::global::Global;
use crate::output;
use crate::source::{ModelArgs, TokensArgs, cache_or_exact, prepare};
use crate::tensors::{self, Tensor};

/// Options of `minicache logits`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    /// The cache: a method's name, such as minicache-4, or an inline table; by default full, in f32.
    #[arg(long, value_name = "SPEC")]
    cache: Option<String>,
    /// Tokens that are prefilled and compressed at once; the others follow one at a time. By default all of them.
    #[arg(long, value_name = "N")]
    prefill: Option<usize>,
    /// Where `logits`, f32 (tokens, vocab), goes.
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// Runs the tokens and writes the logits of every one.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let spec = cache_or_exact(args.cache.as_deref())?;
    tensors::check_out(&args.out)?;
    args.tokens.check()?;
    let model = args.model.load(global, WeightMode::F32)?;
    let tokens = args.tokens.read(&model)?;
    let prefill = args.prefill.unwrap_or(tokens.len());
    if prefill > tokens.len() {
        return Err(usage(format!("--prefill: {prefill} of {} tokens; it may be at most all", tokens.len())));
    }
    let spec = &prepare(&model, std::slice::from_ref(&spec), global)?[0];
    let mut sequence = model.sequence(spec, tokens.len())?;
    let mut data = Vec::with_capacity(tokens.len() * model.config.vocab);
    let (first, rest) = tokens.split_at(prefill);
    for tokens in std::iter::once(first).filter(|f| !f.is_empty()).chain(rest.chunks(1)) {
        let step = Step { tokens, sequence: &mut sequence, logits: LogitsFor::All };
        data.extend(model.decoder.forward(&mut [step])?.into_data());
    }
    let shape = vec![tokens.len(), model.config.vocab];
    tensors::write(&args.out, &[Tensor { name: "logits".to_string(), shape, data }])?;
    output::line(format!("{}: logits of {} tokens", args.out.display(), tokens.len()))
}
