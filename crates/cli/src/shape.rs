//! A model's shape and synthetic states: options of the commands that need no weights.

use std::path::Path;

use anyhow::Result;
use minicache_config::bounds::{MOST_SEQUENCES, MOST_TOKENS, check_number};
use minicache_core::{LayerSimilarity, ModelShape};
use minicache_models::{Gguf, ModelConfig, Registry};

use crate::failure::{OrUsage, usage};

/// A model's shape without its weights.
pub(crate) struct Shape {
    /// Its name.
    pub(crate) name: String,
    /// What a cache depends on.
    pub(crate) shape: ModelShape,
}

impl Shape {
    /// Finds what `--model` names: in the registry, or in the configuration of a folder or a `.gguf` file.
    pub(crate) fn find(model: &str) -> Result<Self> {
        let registry = Registry::load()?;
        if let Some(entry) = registry.find(model) {
            return Ok(Self { name: entry.name.clone(), shape: entry.shape() });
        }
        let path = Path::new(model);
        let config = if path.is_dir() {
            ModelConfig::from_dir(path)?
        } else if path.is_file() {
            Gguf::open(path)?.config()?
        } else {
            registry.get(model)?;
            return Err(usage(format!("--model: {model}: no such model")));
        };
        let full = path.canonicalize().or_usage(path.display())?;
        let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
        let name = name.map_or_else(|| model.to_string(), |n| n.to_string_lossy().into_owned());
        Ok(Self { name, shape: config.shape() })
    }
}

/// How alike the layers of synthetic states are.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SimilarityArgs {
    /// Mean cosine between adjacent layers of the synthetic states.
    #[arg(long, default_value_t = 0.85, allow_negative_numbers = true, value_name = "COS")]
    similarity: f32,
    /// Its standard deviation over tokens.
    #[arg(long, default_value_t = 0.05, value_name = "COS")]
    spread: f32,
}

impl SimilarityArgs {
    /// The values, checked.
    pub(crate) fn get(&self) -> Result<LayerSimilarity> {
        let Self { similarity: mean, spread } = *self;
        if !(-1.0..=1.0).contains(&mean) {
            return Err(usage(format!("--similarity: must be within -1 to 1, not {mean}")));
        }
        if !(0.0..=1.0).contains(&spread) {
            return Err(usage(format!("--spread: must be within 0 to 1, not {spread}")));
        }
        Ok(LayerSimilarity { mean, spread })
    }
}

/// Checks an option that counts tokens, or something of which there are fewer.
pub(crate) fn at_least_one(option: &str, n: usize) -> Result<()> {
    Ok(check_number(option, n, 1..=MOST_TOKENS)?)
}

/// Checks `--batch`.
pub(crate) fn check_batch(n: usize) -> Result<()> {
    Ok(check_number("--batch", n, 1..=MOST_SEQUENCES)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_default_similarity_is_the_cores() {
        let args = SimilarityArgs { similarity: 0.85, spread: 0.05 };
        assert_eq!(args.get().unwrap(), LayerSimilarity::default());
        assert!(SimilarityArgs { similarity: 1.5, ..args.clone() }.get().is_err());
        assert!(SimilarityArgs { spread: -0.1, ..args }.get().is_err());
    }
}
