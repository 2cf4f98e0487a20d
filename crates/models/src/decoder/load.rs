//! Loading a model, its layers where they are to lie.

use std::fmt;
use std::sync::Arc;

use candle_core::DType;
use minicache_config::WeightMode;
use minicache_device::Device;
use rayon::prelude::*;

use super::{Body, Decoder, gpu, host};
use crate::devices::{self, DeviceMap, Target};
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
    /// Where layers run: the CPU (as none at all means), or GPUs that they are spread over by free memory.
    pub devices: Vec<Target>,
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
        let gpus: Vec<_> = options
            .devices
            .iter()
            .filter_map(|target| match target {
                Target::Device(device) => Some(device.clone()),
                Target::Cpu => None,
            })
            .collect();
        let cpu = [Target::Cpu];
        let targets = if gpus.is_empty() { &cpu[..] } else { &options.devices[..] };
        let mut map = plan(config, source, options, targets)?;
        let tiny = config.parameters() <= TINY;
        // On a GPU nothing is gained by f32, and much is lost.
        let mode = match options.weights {
            WeightMode::Auto if tiny && gpus.is_empty() => WeightMode::F32,
            mode => mode,
        };
        let loader = Loader { source, mode, dtype: options.dtype };
        let done = std::sync::atomic::AtomicUsize::new(0);
        let tick = || {
            let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, config.layers + 2);
            }
        };
        let body = match &gpus[..] {
            [] => Body::Host(host_body(&loader, config, &tick)?),
            gpus => {
                Body::Gpu(gpu::Body::load(gpu::Weights::Stored(&loader), config, gpus, &map.layers, &tick)?)
            }
        };
        // From here on the map says what is really held; a tied projection shares the embedding's memory.
        map.bytes = match &body {
            Body::Host(body) => {
                let layers = body.layers.iter().map(|layer| layer.bytes() as u64).sum::<u64>();
                vec![layers + if config.tied { 0 } else { body.head.bytes() as u64 }]
            }
            Body::Gpu(body) => body.bytes(&gpus),
        };
        Ok(Self {
            shape: config.shape(),
            rope: Rope::new(config.rope.clone()),
            config: config.clone(),
            body,
            map,
        })
    }
}

impl Decoder {
    /// A model of random weights on a GPU: as large and as fast as one of this configuration, and as wise as none.
    ///
    /// # Errors
    /// No memory, errors of the device.
    pub fn random(config: &ModelConfig, device: &Arc<Device>) -> Result<Self> {
        config.validate()?;
        let gpus = [device.clone()];
        let layers = vec![0; config.layers];
        let body = gpu::Body::load(gpu::Weights::Random, config, &gpus, &layers, &|| ())?;
        let map =
            DeviceMap { devices: vec![device.driver.name().to_string()], layers, bytes: body.bytes(&gpus) };
        Ok(Self {
            shape: config.shape(),
            rope: Rope::new(config.rope.clone()),
            config: config.clone(),
            body: Body::Gpu(body),
            map,
        })
    }
}

fn host_body(loader: &Loader<'_>, config: &ModelConfig, tick: &(impl Fn() + Sync)) -> Result<host::Body> {
    let embedding = loader.embedding(EMBEDDING, config.vocab, config.hidden)?;
    tick();
    let layers: Result<Vec<_>> = (0..config.layers)
        .into_par_iter()
        .map(|index| {
            let layer = host::Layer::load(loader, config, index)?;
            tick();
            Ok(layer)
        })
        .collect();
    let layers = layers?;
    let head = match config.tied {
        true => embedding.tied(),
        false => {
            let name = HEAD.trim_end_matches(".weight").to_string();
            loader.linear(&[(name, config.vocab)], config.hidden, false)?
        }
    };
    let norm = loader.vector(FINAL_NORM, config.hidden)?;
    tick();
    Ok(host::Body { embedding, layers, norm, head })
}

/// Gives every layer a device.
fn plan(
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: &LoadOptions,
    targets: &[Target],
) -> Result<DeviceMap> {
    // Sizes in the type of floats: an upper bound for quantised weights.
    let width = match (options.weights, options.dtype) {
        (WeightMode::F32, _) => 4,
        _ if matches!(targets[0], Target::Device(_)) => 2,
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
    let indices = match targets {
        [Target::Cpu] => vec![0; config.layers],
        gpus => {
            let free = gpus.iter().map(devices::free_memory).collect::<Result<Vec<_>>>()?;
            devices::split_layers(&layers, last, &free)?
        }
    };
    let mut used = vec![0; targets.len()];
    for (device, size) in indices.iter().zip(&layers) {
        used[*device] += size;
    }
    used[indices[config.layers - 1]] += last;
    Ok(DeviceMap { devices: targets.iter().map(devices::label).collect(), layers: indices, bytes: used })
}
