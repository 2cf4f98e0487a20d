//! Aligned merging: the same function in a basis in which adjacent layers' states point the same way.
//!
//! Merging shares directions between layers, and attention leaves each layer's basis free (`docs/mathematics.md`,
//! section 4): per KV head any invertible map of values that W_v takes and W_o gives back; per frequency of keys any
//! complex number that W_k takes and W_q gives back, since it commutes with RoPE (where norms of heads stand between, a
//! real number for all heads, which goes into the weights of the norms); and the order of KV heads with their query
//! heads. [`align`] chooses these maps on calibration text, layer after layer, so that every layer's states come close
//! to those of the layer below; [`Aligned`] folds them into the weights as they are read. The model computes what it
//! computed, at the same cost, and its cache merges better.

mod fold;
mod maps;
mod moments;
mod save;

use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

pub use fold::Aligned;
pub use save::save;

use crate::{Decoder, Error, LogitsFor, Result, Step, WeightSource};
use moments::Moments;

/// First positions of each chunk that are not counted: attention sinks are unlike any other token.
const SINKS: usize = 4;

/// Choices in aligning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AlignOptions {
    /// How far the energies of two layers' matched directions of values are brought together: 0 leaves them as the
    /// outputs weigh them, 1 makes them equal. SLERP loses about the same from 0 to 0.5; the best shared direction
    /// (`rank_one`) least at 0.
    pub level: f64,
}

impl Default for AlignOptions {
    fn default() -> Self {
        Self { level: minicache_config::ALIGN_LEVEL }
    }
}

/// The maps of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Alignment {
    pub(crate) layers: Vec<LayerMaps>,
    /// Tokens that they were chosen on.
    pub tokens: usize,
}

/// The maps of one layer. KV heads are in their new order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerMaps {
    /// The KV head of the model that each head was.
    pub(crate) order: Vec<usize>,
    /// Factor on each frequency of un-rotated keys, `(kv_heads, rotary_dim / 2)`, (re, im).
    pub(crate) keys: Vec<[f64; 2]>,
    /// Map of values `(kv_heads, head_dim, head_dim)`, row-major: v' = B v.
    pub(crate) values: Vec<f64>,
    /// Its inverse, likewise.
    pub(crate) inverse: Vec<f64>,
}

impl Alignment {
    /// A hash of the maps, 32 hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for layer in &self.layers {
            layer.order.iter().for_each(|h| hash.update((*h as u64).to_le_bytes()));
            layer.keys.iter().flatten().chain(&layer.values).for_each(|x| hash.update(x.to_le_bytes()));
        }
        hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

/// Chooses the maps of every layer on `chunks` of tokens, each run as a sequence of its own. `source` holds the weights
/// of `decoder`.
///
/// # Errors
/// As [`Decoder::forward`]; no token left to count; moments that are not finite.
pub fn align<'a>(
    decoder: &Decoder,
    source: &dyn WeightSource,
    chunks: impl Iterator<Item = &'a [u32]>,
    options: AlignOptions,
) -> Result<Alignment> {
    let (shape, rotary_dim) = (decoder.shape(), decoder.config().rope.rotary_dim);
    let moments = Arc::new(Mutex::new(Moments::new(shape, rotary_dim, SINKS)));
    for tokens in chunks.filter(|c| !c.is_empty()) {
        let collector = Moments::collector(&moments, decoder.rotary(tokens.len()))?;
        let mut sequence = decoder.sequence(collector, tokens.len());
        decoder.forward(&mut [Step { tokens, sequence: &mut sequence, logits: LogitsFor::None }])?;
    }
    let moments = moments.lock().unwrap_or_else(PoisonError::into_inner);
    if moments.tokens == 0 {
        let message = format!("the text has no chunk of more than {SINKS} tokens to align on");
        return Err(Error::Calibration(message));
    }
    let layers = maps::choose(&moments, decoder.config(), source, options)?;
    Ok(Alignment { layers, tokens: moments.tokens })
}
