//! Loading a model, its layers where they are to lie.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device};
use minicache_config::WeightMode;
use rayon::prelude::*;

use super::{Decoder, Head, Layer, device, host};
use crate::devices::{self, DeviceMap};
use crate::families::{EMBEDDING, FINAL_NORM, HEAD};
use crate::linear::Loader;
use crate::rope::Rope;
use crate::{ModelConfig, Result, WeightSource, weights};

/// Weights up to which [`WeightMode::Auto`] computes in f32: they fit into a core's cache (8 MB), where quantised ones are
/// no faster.
const TINY: usize = 1 << 21;

/// Told how many of how many parts are loaded.
pub type Progress = Arc<dyn Fn(usize, usize) + Send + Sync>;

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

    use super::super::{LogitsFor, Step};
    use super::*;
    use crate::Safetensors;

    /// Logits of a batch of two sequences, one of them in two chunks.
    fn logits(decoder: &Decoder) -> Vec<f32> {
        let new = || {
            let cache = minicache_core::build(&CacheSpec::default(), decoder.shape(), &Resources::default());
            decoder.sequence(cache.unwrap(), 40)
        };
        let (mut a, mut b) = (new(), new());
        let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 200).collect();
        let mut all = Vec::new();
        for (tokens_a, tokens_b) in [(&tokens[..11], &tokens[..30]), (&tokens[11..], &tokens[30..31])] {
            let step = |tokens, sequence| Step { tokens, sequence, logits: LogitsFor::All };
            let mut steps = [step(tokens_a, &mut a), step(tokens_b, &mut b)];
            all.extend(decoder.forward(&mut steps).unwrap().into_data());
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
