//! The decoder: tokens to logits, driven by a [`ModelConfig`], for every supported family.
//!
//! A forward pass takes the new tokens of several sequences side by side. Linear layers run over all of them at once;
//! attention runs per sequence, in that sequence's [`KvCache`]. Nothing is padded, so prefill of one sequence and
//! decode of others mix freely.

mod attention;
mod device;
mod host;
mod load;
mod logits;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use minicache_core::{Batch, KvCache, ModelShape, Rotary, Sequence};

use crate::devices::DeviceMap;
use crate::linear::{DeviceLinear, Embedding, Linear};
use crate::rope::{Frequencies, Rope};
use crate::{Error, ModelConfig, Result};
pub use load::{LoadOptions, Progress};
pub use logits::{Logits, LogitsFor};

use attention::Positions;

/// Shown the residual stream entering each layer.
type Observer<'a> = &'a mut dyn FnMut(usize, &[f32]);

/// One sequence's part of a forward pass.
pub struct Step<'a> {
    /// New tokens, at least one.
    pub tokens: &'a [u32],
    /// The sequence, as [`Decoder::sequence`] made it; the first new token's position is its length.
    pub sequence: &'a mut Sequence,
    /// Of which tokens logits are wanted.
    pub logits: LogitsFor,
}

/// A loaded model.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    shape: ModelShape,
    rope: Rope,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Head,
    map: DeviceMap,
}

/// A layer where it lies.
#[derive(Debug)]
enum Layer {
    Host(host::Layer),
    Device(device::Layer),
}

/// The output projection.
#[derive(Debug)]
enum Head {
    Host(Linear),
    Device(DeviceLinear, Device),
}

/// The residual stream of all new tokens, `(tokens, hidden)`, where the current layer wants it.
pub(crate) enum Stream {
    Host(Vec<f32>),
    Device(Tensor),
}

impl Stream {
    fn host(&mut self) -> Result<&mut Vec<f32>> {
        if let Stream::Device(tensor) = self {
            *self = Stream::Host(tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?);
        }
        match self {
            Stream::Host(data) => Ok(data),
            Stream::Device(_) => unreachable!("just moved"),
        }
    }

    fn device(&mut self, hidden: usize, device: &Device) -> Result<&mut Tensor> {
        if let Stream::Host(data) = self {
            *self = Stream::Device(Tensor::from_slice(data, (data.len() / hidden, hidden), device)?);
        }
        match self {
            Stream::Device(tensor) => {
                if !tensor.device().same_device(device) {
                    *tensor = tensor.to_device(device)?;
                }
                Ok(tensor)
            }
            Stream::Host(_) => unreachable!("just moved"),
        }
    }
}

impl Decoder {
    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a cache has to know.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Which layers lie on which device.
    pub fn device_map(&self) -> &DeviceMap {
        &self.map
    }

    /// Bytes of all weights, embedding included, in the forms in which they are kept.
    pub fn weight_bytes(&self) -> usize {
        self.map.bytes.iter().sum::<u64>() as usize + self.embedding.bytes()
    }

    /// A sequence of this model with a cache, which is going to have `planned_len` tokens in the end; 0 where that is not
    /// known. LongRoPE and dynamic RoPE choose frequencies by it.
    pub fn sequence(&self, cache: Box<dyn KvCache>, planned_len: usize) -> Sequence {
        Sequence::rotated(cache, self.rotary(planned_len), planned_len)
    }

    /// The rotary embedding of a sequence that is going to have `planned_len` tokens.
    pub fn rotary(&self, planned_len: usize) -> Arc<Frequencies> {
        self.rope.for_length(planned_len)
    }

    /// Runs the new tokens of several sequences, and gives the logits that their steps ask for.
    ///
    /// # Errors
    /// A step without tokens, a token outside of the vocabulary, a sequence beyond the model's context, a cache of
    /// another model's shape; errors of a cache. All leave every sequence as it was.
    pub fn forward(&self, steps: &mut [Step<'_>]) -> Result<Logits> {
        // Inside the pool, so that the many small products of a step do not each wait to be handed over to it.
        rayon::scope(|_| self.run(steps, None))
    }

    /// [`Decoder::forward`] that shows `observer` the residual stream entering each layer: its index, and
    /// `(tokens, hidden)`, the tokens of all steps one after the other.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_observed(
        &self,
        steps: &mut [Step<'_>],
        observer: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Logits> {
        self.run(steps, Some(observer))
    }

    fn run(&self, steps: &mut [Step<'_>], mut observer: Option<Observer<'_>>) -> Result<Logits> {
        if steps.is_empty() {
            return Ok(Logits::default());
        }
        self.check(steps)?;
        let hidden = self.config.hidden;
        let positions = Positions::new(steps, self.config.rope.rotary_dim);
        let wanted = steps.iter().zip(positions.ranges()).map(|(step, range)| step.logits.rows(range));
        let wanted: Vec<Range<usize>> = wanted.collect();
        let ids: Vec<u32> = steps.iter().flat_map(|s| s.tokens).copied().collect();
        let mut data = vec![0.0; ids.len() * hidden];
        self.embedding.rows_into(&ids, &mut data)?;

        let mut batch = Batch::begin(steps.iter_mut().map(|s| (&mut *s.sequence, s.tokens.len())))?;
        let mut stream = Stream::Host(data);
        let mut scratch = host::Scratch::default();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(observer) = &mut observer {
                observer(index, stream.host()?);
            }
            match layer {
                Layer::Host(layer) => {
                    layer.forward(&self.config, stream.host()?, &mut batch, &positions, &mut scratch)?;
                }
                Layer::Device(layer) => {
                    let x = stream.device(hidden, layer.device())?;
                    *x = layer.forward(&self.config, x, &mut batch, &positions)?;
                }
            }
        }
        batch.finish()?;
        self.logits(stream, &wanted)
    }

    /// Everything that a caller can get wrong, before any cache is touched.
    fn check(&self, steps: &[Step<'_>]) -> Result<()> {
        let vocab = self.config.vocab;
        for (index, step) in steps.iter().enumerate() {
            let bad = |message: String| Err(Error::Input(format!("sequence {index}: {message}")));
            if step.tokens.is_empty() {
                return bad("a step needs at least one token".into());
            }
            if let Some(id) = step.tokens.iter().find(|id| **id as usize >= vocab) {
                return bad(format!("token {id} is outside of the vocabulary of {vocab}"));
            }
            let shape = step.sequence.shape();
            if *shape != self.shape {
                return bad(format!(
                    "the cache is for {}, the model has {}",
                    describe(shape),
                    describe(&self.shape)
                ));
            }
            if step.sequence.rotary().map(Rotary::rotary_dim) != Some(self.config.rope.rotary_dim) {
                return bad(
                    "it has no rotary embedding of this model; `Decoder::sequence` gives it one".into()
                );
            }
            let length = (step.sequence.len() + step.tokens.len()).max(step.sequence.planned_len());
            if length > self.config.context {
                return bad(format!("{length} tokens exceed the model's context of {}", self.config.context));
            }
        }
        Ok(())
    }

    /// Final norm and output projection of the rows that are asked for.
    fn logits(&self, mut stream: Stream, wanted: &[Range<usize>]) -> Result<Logits> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        let rows: usize = wanted.iter().map(Range::len).sum();
        let mut logits = Vec::new();
        if rows > 0 {
            let data = stream.host()?;
            let mut normed = vec![0.0; rows * hidden];
            let sources = wanted.iter().cloned().flatten();
            for (row, out) in sources.zip(normed.chunks_exact_mut(hidden)) {
                let x = &data[row * hidden..(row + 1) * hidden];
                host::rms_norm_row(x, &self.norm, self.config.rms_eps, out);
            }
            match &self.head {
                Head::Host(head) => {
                    logits = vec![0.0; rows * vocab];
                    head.apply(&normed, rows, &mut logits)?;
                }
                Head::Device(head, device) => {
                    let x = Tensor::from_vec(normed, (rows, hidden), device)?;
                    logits = head.forward(&x)?.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
                }
            }
        }
        Ok(Logits::new(logits, vocab, wanted.iter().map(Range::len)))
    }
}

/// A shape in words.
fn describe(shape: &ModelShape) -> String {
    let window = shape.window.map_or("no window".into(), |w| format!("a window of {w}"));
    format!(
        "{} layers, {} heads, {} KV heads of {}, {window}, scale {}",
        shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.scale
    )
}
