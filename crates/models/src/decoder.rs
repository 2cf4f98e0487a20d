//! The decoder: tokens to logits, driven by a [`ModelConfig`], for every supported family.
//!
//! A forward pass takes the new tokens of several sequences side by side. Linear layers run over all of them at once;
//! attention runs per sequence, in that sequence's [`KvCache`]. Nothing is padded, so prefill of one sequence and
//! decode of others mix freely.

mod attention;
mod device;
mod host;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use minicache_config::WeightMode;
use minicache_core::ModelShape;
use minicache_core::{KvCache, Rotary};
use rayon::prelude::*;

use crate::devices::{self, DeviceMap};
use crate::families::{EMBEDDING, FINAL_NORM, HEAD};
use crate::linear::{DeviceLinear, Embedding, Linear, Loader};
use crate::rope::Rope;
use crate::{Error, ModelConfig, Result, WeightSource, weights};
use attention::Positions;

/// Weights up to which [`WeightMode::Auto`] computes in f32: they fit into a core's cache (8 MB), where quantised ones are
/// no faster.
const TINY: usize = 1 << 21;

/// Told how many of how many parts are loaded.
pub type Progress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// Shown the residual stream entering each layer.
type Observer<'a> = &'a mut dyn FnMut(usize, &Tensor);

/// How a model is loaded.
#[derive(Clone, Default)]
pub struct LoadOptions {
    /// Form of quantised weights.
    pub weights: WeightMode,
    /// Devices that layers are spread over, by free memory; none means the CPU.
    pub devices: Vec<Device>,
    /// Type that float weights are kept in; `None` means as stored. With [`WeightMode::F32`] it is ignored.
    pub dtype: Option<DType>,
    /// Called after each part.
    pub progress: Option<Progress>,
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("weights", &self.weights)
            .field("devices", &self.devices)
            .field("dtype", &self.dtype)
            .finish_non_exhaustive()
    }
}

/// Of which of a step's tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogitsFor {
    /// None: prefill of all but the last chunk.
    None,
    /// The last token.
    #[default]
    Last,
    /// Every token.
    All,
}

/// One sequence's part of a forward pass.
pub struct Step<'a> {
    /// New tokens, at least one.
    pub tokens: &'a [u32],
    /// The sequence's cache; the first new token's position is its length.
    pub cache: &'a mut dyn KvCache,
    /// Length that the sequence is going to have in the end, by which LongRoPE and dynamic RoPE choose frequencies;
    /// 0 where it is not known, which means its length after this step. Keep it the same for all steps of a sequence:
    /// cached keys are not rotated again.
    pub planned_len: usize,
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

    fn tensor(&self, hidden: usize) -> Result<Tensor> {
        Ok(match self {
            Stream::Host(data) => Tensor::from_slice(data, (data.len() / hidden, hidden), &Device::Cpu)?,
            Stream::Device(tensor) => tensor.to_device(&Device::Cpu)?,
        })
    }
}

impl Decoder {
    /// Loads a model after checking that `source` holds exactly its tensors.
    ///
    /// # Errors
    /// Missing, unexpected, misshaped or broken weights; a model that does not fit its devices.
    pub fn load(config: &ModelConfig, source: &dyn WeightSource, options: &LoadOptions) -> Result<Self> {
        config.validate()?;
        weights::check(config, source)?;
        let cpu = [Device::Cpu];
        let devices = if options.devices.is_empty() { &cpu[..] } else { &options.devices[..] };
        let map = plan(config, source, options, devices)?;
        Self::load_mapped(config, source, options, devices, map, false)
    }

    /// Loads a model with its layers on the devices that `map` says. `operations` puts layers on the CPU through
    /// candle operations too, as on an accelerator.
    fn load_mapped(
        config: &ModelConfig,
        source: &dyn WeightSource,
        options: &LoadOptions,
        devices: &[Device],
        mut map: DeviceMap,
        operations: bool,
    ) -> Result<Self> {
        let tiny = config.parameters() <= TINY;
        let mode =
            if options.weights == WeightMode::Auto && tiny { WeightMode::F32 } else { options.weights };
        let loader = Loader { source, mode, dtype: options.dtype };
        let done = std::sync::atomic::AtomicUsize::new(0);
        let parts = config.layers + 2;
        let tick = || {
            let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, parts);
            }
        };
        let embedding = loader.embedding(EMBEDDING, config.vocab, config.hidden)?;
        tick();
        let layers: Result<Vec<Layer>> = (0..config.layers)
            .into_par_iter()
            .map(|index| {
                let device = &devices[map.layers[index]];
                let layer = if device.is_cpu() && !operations {
                    Layer::Host(host::Layer::load(&loader, config, index)?)
                } else {
                    Layer::Device(device::Layer::load(&loader, config, index, device)?)
                };
                tick();
                Ok(layer)
            })
            .collect();
        let layers = layers?;
        let last = &devices[map.layers[config.layers - 1]];
        let projection = |name: &str| (name.trim_end_matches(".weight").to_string(), config.vocab);
        let head = if last.is_cpu() && !operations {
            Head::Host(if config.tied {
                embedding.tied()
            } else {
                loader.linear(&[projection(HEAD)], config.hidden, false)?
            })
        } else {
            let name = if config.tied { EMBEDDING } else { HEAD };
            let head = loader.device_linear(&[projection(name)], config.hidden, false, last)?;
            Head::Device(head, last.clone())
        };
        let norm = loader.vector(FINAL_NORM, config.hidden)?;
        tick();
        // From here on the map says what is really held; a tied projection shares the embedding's memory.
        map.bytes.fill(0);
        for (layer, device) in layers.iter().zip(&map.layers) {
            map.bytes[*device] += match layer {
                Layer::Host(layer) => layer.bytes() as u64,
                Layer::Device(layer) => layer.bytes() as u64,
            };
        }
        map.bytes[map.layers[config.layers - 1]] += match &head {
            Head::Host(_) if config.tied => 0,
            Head::Host(head) => head.bytes() as u64,
            Head::Device(head, _) => head.bytes() as u64,
        };
        Ok(Self {
            shape: config.shape(),
            rope: Rope::new(config.rope.clone()),
            config: config.clone(),
            embedding,
            layers,
            norm,
            head,
            map,
        })
    }

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

    /// The rotary embedding of a sequence that is going to have `planned_len` tokens.
    pub fn rotary(&self, planned_len: usize) -> Arc<dyn Rotary> {
        self.rope.for_length(planned_len)
    }

    /// Runs the new tokens of several sequences. Gives one f32 tensor on the CPU per step, `(n, vocab)` with n = 0, 1
    /// or the number of its tokens.
    ///
    /// # Errors
    /// A step without tokens, a token outside of the vocabulary, a sequence beyond the model's context, a cache of
    /// another model's shape: these leave every cache as it was. Errors of a cache, after which the caches of this
    /// call are not to be used any more.
    pub fn forward(&self, steps: &mut [Step<'_>]) -> Result<Vec<Tensor>> {
        // Inside the pool, so that the many small products of a step do not each wait to be handed over to it.
        rayon::scope(|_| self.run(steps, None))
    }

    /// [`Decoder::forward`] that shows `observer` the residual stream entering each layer: its index, and
    /// `(tokens, hidden)` f32 on the CPU, the tokens of all steps one after the other.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_observed(
        &self,
        steps: &mut [Step<'_>],
        observer: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Vec<Tensor>> {
        self.run(steps, Some(observer))
    }

    fn run(&self, steps: &mut [Step<'_>], mut observer: Option<Observer<'_>>) -> Result<Vec<Tensor>> {
        if steps.is_empty() {
            return Ok(Vec::new());
        }
        self.check(steps)?;
        let hidden = self.config.hidden;
        let positions = Positions::new(steps, &self.rope, self.config.rope.rotary_dim);
        let ids: Vec<u32> = steps.iter().flat_map(|s| s.tokens).copied().collect();
        let mut data = vec![0.0; ids.len() * hidden];
        self.embedding.rows_into(&ids, &mut data)?;

        let mut stream = Stream::Host(data);
        let mut scratch = host::Scratch::default();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(observer) = &mut observer {
                observer(index, &stream.tensor(hidden)?);
            }
            match layer {
                Layer::Host(layer) => {
                    layer.forward(&self.config, stream.host()?, steps, &positions, &mut scratch)?;
                }
                Layer::Device(layer) => {
                    let x = stream.device(hidden, layer.device())?;
                    *x = layer.forward(&self.config, x, steps, &positions)?;
                }
            }
        }
        match &mut *steps {
            [step] => step.cache.finish_step()?,
            _ => steps.par_iter_mut().try_for_each(|step| step.cache.finish_step())?,
        }
        self.logits(stream, steps, &positions)
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
            let shape = step.cache.shape();
            if *shape != self.shape {
                return bad(format!(
                    "the cache is for {}, the model has {}",
                    describe(shape),
                    describe(&self.shape)
                ));
            }
            let length = step.cache.len() + step.tokens.len();
            if length.max(step.planned_len) > self.config.context {
                return bad(format!(
                    "{} tokens exceed the model's context of {}",
                    length.max(step.planned_len),
                    self.config.context
                ));
            }
        }
        Ok(())
    }

    /// Final norm and output projection of the rows that are asked for.
    fn logits(&self, mut stream: Stream, steps: &[Step<'_>], positions: &Positions) -> Result<Vec<Tensor>> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        let wanted: Vec<Range<usize>> = steps
            .iter()
            .zip(positions.ranges())
            .map(|(step, range)| match step.logits {
                LogitsFor::None => range.end..range.end,
                LogitsFor::Last => range.end - 1..range.end,
                LogitsFor::All => range.clone(),
            })
            .collect();
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
        let mut tensors = Vec::with_capacity(steps.len());
        let mut first = 0;
        for range in &wanted {
            let n = range.len();
            tensors.push(if n == 0 {
                Tensor::zeros((0, vocab), DType::F32, &Device::Cpu)?
            } else if n == rows {
                Tensor::from_vec(std::mem::take(&mut logits), (n, vocab), &Device::Cpu)?
            } else {
                Tensor::from_slice(&logits[first * vocab..(first + n) * vocab], (n, vocab), &Device::Cpu)?
            });
            first += n;
        }
        Ok(tensors)
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

/// Gives every layer a device.
fn plan(
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: &LoadOptions,
    devices: &[Device],
) -> Result<DeviceMap> {
    // Sizes in the type of floats: an upper bound for quantised weights.
    let width = match (options.weights, options.dtype) {
        (WeightMode::F32, _) => 4,
        (_, Some(dtype)) => dtype.size_in_bytes() as u64,
        _ => {
            let shape = [config.hidden];
            source.stored(FINAL_NORM, &shape)?.dtype().size_in_bytes() as u64
        }
    };
    let bytes = |shape: &[usize]| shape.iter().product::<usize>() as u64 * width;
    let layers: Vec<u64> = (0..config.layers)
        .map(|layer| config.layer_tensors(layer).iter().map(|(_, shape)| bytes(shape)).sum())
        .collect();
    let last = bytes(&[config.vocab, config.hidden]);
    let indices = if devices.len() == 1 && devices[0].is_cpu() {
        vec![0; config.layers]
    } else {
        let free = devices.iter().map(devices::free_memory).collect::<Result<Vec<_>>>()?;
        devices::split_layers(&layers, last, &free)?
    };
    let mut used = vec![0; devices.len()];
    for (device, size) in indices.iter().zip(&layers) {
        used[*device] += size;
    }
    used[indices[config.layers - 1]] += last;
    Ok(DeviceMap { devices: devices.iter().map(devices::label).collect(), layers: indices, bytes: used })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use minicache_core::{CacheSpec, Resources};

    use super::*;
    use crate::Safetensors;

    /// Logits of a batch of two sequences, one of them in two chunks.
    fn logits(decoder: &Decoder) -> Vec<f32> {
        let new =
            || minicache_core::build(&CacheSpec::default(), decoder.shape(), &Resources::default()).unwrap();
        let (mut a, mut b) = (new(), new());
        let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 200).collect();
        let mut all = Vec::new();
        for (tokens_a, tokens_b) in [(&tokens[..11], &tokens[..30]), (&tokens[11..], &tokens[30..31])] {
            let step = |tokens, cache| Step { tokens, cache, planned_len: 40, logits: LogitsFor::All };
            for out in decoder.forward(&mut [step(tokens_a, a.as_mut()), step(tokens_b, b.as_mut())]).unwrap()
            {
                all.extend(out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            }
        }
        all
    }

    /// What layers on an accelerator do, run on the CPU: all layers, and a model split half and half.
    #[test]
    fn tensor_operations_equal_slices() {
        for name in ["llama2", "mistral-sliding", "phi3-longrope", "mixtral", "qwen2", "qwen3", "llama-tied"]
        {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
            let config = ModelConfig::from_json(&text).unwrap();
            let source = Safetensors::open(&dir).unwrap();
            let options = LoadOptions::default();
            let devices = [Device::Cpu];
            let map = plan(&config, &source, &options, &devices).unwrap();
            let load = |operations| {
                Decoder::load_mapped(&config, &source, &options, &devices, map.clone(), operations).unwrap()
            };
            let (slices, mut operations) = (load(false), load(true));
            let want = logits(&slices);
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            let check = |decoder: &Decoder| {
                let got = logits(decoder);
                let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4 * largest, "{name}: {worst} of {largest}");
            };
            check(&operations);
            for (layer, host) in operations.layers.iter_mut().zip(slices.layers).skip(2) {
                *layer = host;
            }
            check(&operations);
        }
    }
}
