//! Where weights come from: the [`WeightSource`] seam, and safetensors files behind it.

mod files;
mod shard;

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_core::quantized::QTensor;
use minicache_config::shown;

use crate::families::HEAD;
use crate::{Error, ModelConfig, Result};

pub use files::Safetensors;
pub(crate) use files::other_weights;

/// Where weights come from, by Hugging Face tensor name. Matrices are `(out, in)`; query and key projections are in
/// the half-split rotary order.
pub trait WeightSource: Send + Sync {
    /// What errors call it: the file or folder.
    fn origin(&self) -> String;

    /// Names of all tensors.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor; `None` where there is none of that name.
    fn shape_of(&self, name: &str) -> Option<Vec<usize>>;

    /// A tensor in f32 on the CPU, dequantised if need be.
    ///
    /// # Errors
    /// No such tensor, another shape than `shape`, an unreadable type, numbers that are not finite.
    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// A tensor on the CPU in the float type it is stored in (f32, f16 or bf16); block-quantised ones in f32.
    ///
    /// # Errors
    /// As [`WeightSource::dense`].
    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.dense(name, shape)
    }

    /// A block-quantised tensor as stored, on the CPU; `None` where it is stored as floats.
    ///
    /// # Errors
    /// As [`WeightSource::dense`].
    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        let _ = (name, shape);
        Ok(None)
    }
}

/// Checks names and shapes of a whole model before anything is loaded.
///
/// Buffers that some tools save besides weights (rotary frequencies, masks) and a redundant `lm_head.weight` of a
/// model with tied embeddings are let through.
///
/// # Errors
/// One line that names missing, unexpected and misshaped tensors.
pub fn check(config: &ModelConfig, source: &dyn WeightSource) -> Result<()> {
    let held = source.names();
    // Before anything is made of each layer: a configuration may say any number.
    if config.least_tensors() > 2 * held.len() + 1000 {
        let experts = config.experts.map_or(String::new(), |e| format!(" of {} experts", e.count));
        return Err(Error::Weights(format!(
            "{} holds {} tensors, far fewer than the {} layers{experts} of its configuration",
            source.origin(),
            held.len(),
            config.layers
        )));
    }
    let wanted: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
    let mut missing = Vec::new();
    let mut misshaped = Vec::new();
    for (name, shape) in &wanted {
        match source.shape_of(name) {
            None => missing.push(name.clone()),
            Some(got) if got != *shape => {
                misshaped.push(format!("{name} is {got:?} where the configuration says {shape:?}"));
            }
            Some(_) => {}
        }
    }
    let tolerated = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || name.ends_with("attn.masked_bias")
            || (config.tied && name == HEAD)
    };
    let mut unexpected = held;
    unexpected.retain(|name| !wanted.contains_key(name) && !tolerated(name));
    unexpected.sort_unstable();

    let mut problems = Vec::new();
    for (what, names) in [("missing", missing), ("misshaped", misshaped), ("unexpected", unexpected)] {
        if !names.is_empty() {
            problems.push(format!("{what}: {}", listed(&names)));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Weights(format!(
        "{} does not hold a {} model of this configuration; {}",
        source.origin(),
        config.family.name(),
        problems.join("; ")
    )))
}

/// The first few names, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let first: Vec<String> = names.iter().take(SHOWN).map(|name| shown(name)).collect();
    let mut text = first.join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
