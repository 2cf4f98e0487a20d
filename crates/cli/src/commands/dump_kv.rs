//! `minicache dump-kv`: a prompt's keys and values as attention sees them.

use std::path::PathBuf;

use anyhow::Result;
use minicache_config::WeightMode;
use minicache_models::{LogitsFor, Step};

use crate::global::Global;
use crate::output;
use crate::source::{ModelArgs, TokensArgs, cache_or_exact, prepare};
use crate::tensors::{self, Tensor};

/// Options of `minicache dump-kv`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    /// The cache that the states are restored from: a method's name, such as minicache-4, or an inline table; by
    /// default full, in f32.
    #[arg(long, value_name = "SPEC")]
    cache: Option<String>,
    /// Where `layer.{i}.key` and `layer.{i}.value` go, f32 (kv_heads, tokens, head_dim).
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// Prefills the prompt and writes every layer's states, those that a window or the method dropped left out.
pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let spec = cache_or_exact(args.cache.as_deref())?;
    tensors::check_out(&args.out)?;
    args.tokens.check()?;
    let model = args.model.load(global, WeightMode::F32)?;
    let tokens = args.tokens.read(&model)?;
    let spec = &prepare(&model, std::slice::from_ref(&spec), global)?[0];
    let mut sequence = model.sequence(spec, tokens.len())?;
    let step = Step { tokens: &tokens, sequence: &mut sequence, logits: LogitsFor::None };
    model.decoder.forward(&mut [step])?;
    let shape = *sequence.shape();
    let mut states = Vec::with_capacity(2 * shape.layers);
    let mut held = 0;
    for layer in 0..shape.layers {
        let restored = sequence.restored(layer)?;
        held = restored.positions.len();
        for (side, x) in [("key", &restored.keys), ("value", &restored.values)] {
            let name = format!("layer.{layer}.{side}");
            states.push(Tensor::of_states(name, x, shape.kv_heads, shape.head_dim));
        }
    }
    tensors::write(&args.out, &states)?;
    output::line(format!(
        "{}: {} layers, {held} of {} tokens",
        args.out.display(),
        shape.layers,
        tokens.len()
    ))
}
