//! A device with its memory and its kernels of caches.

use std::sync::Arc;

use minicache_core::Restored;

use crate::cuda::Cuda;
use crate::driver::{Driver, Kernel, Memory, bytes_of_mut};
use crate::emulated::Emulated;
use crate::latents::Known;
use crate::method::Method;
use crate::params::{RestoreLatentsParams, RestoreParams, SequenceEntry, launch};
use crate::part::PartCache;
use crate::pool::Pool;
use crate::{Error, Result};

/// Memory of an emulated device.
const EMULATED: usize = 4 << 30;

/// A device.
#[derive(Debug)]
pub struct Device {
    /// What carries out its operations.
    pub driver: Arc<dyn Driver>,
    /// Memory of caches.
    pub pool: Arc<Pool>,
    pub(crate) latents: Known,
}

impl Device {
    /// Opens `cuda:N` or `emulated:N`.
    ///
    /// # Errors
    /// A device or a library that is not there.
    pub fn open(kind: &str, index: usize) -> Result<Arc<Self>> {
        let driver: Arc<dyn Driver> = match kind {
            "cuda" => Arc::new(Cuda::new(index)?),
            "emulated" => Arc::new(Emulated::new(index, EMULATED)?),
            other => return Err(Error::Missing(format!("{other} is no kind of device"))),
        };
        Ok(Self::new(driver))
    }

    /// A device of `driver`.
    pub fn new(driver: Arc<dyn Driver>) -> Arc<Self> {
        let pool = Pool::new(&driver);
        Arc::new(Self { driver, pool, latents: Known::default() })
    }

    /// The kernels of caches of a method, which is of this device.
    pub(crate) fn kernels(&self, method: &Method) -> Result<Kernels> {
        if let Some(known) = method.kernels.get() {
            return Ok(known.clone());
        }
        let mut all = Vec::new();
        for file in method.files() {
            let kernels = self.driver.compile(&method.source(*file))?;
            all.extend(file.kernels().iter().copied().zip(kernels));
        }
        Ok(method.kernels.get_or_init(|| Kernels(all.into())).clone())
    }

    /// See [`minicache_core::KvCache::restored`].
    pub(crate) fn restored(&self, cache: &PartCache, layer: usize) -> Result<Restored> {
        let method = cache.method();
        if method.evicting.is_some() {
            return cache.restored_slots(layer);
        }
        let shape = &method.shape;
        let positions = shape.first_seen(layer, cache.len())..cache.len();
        let numbers = positions.len() * shape.kv_dim();
        let kernels = self.kernels(method)?;
        let entry =
            SequenceEntry { tables: cache.tables(), len: cache.len() as i32, first: 0, rows: 0, pad: 0 };
        let sequence = Memory::of(&self.driver, crate::driver::bytes_of(&[entry]))?;
        let out = Memory::new(&self.driver, 2 * numbers * size_of::<f32>())?;
        let half = (numbers * size_of::<f32>()) as u64;
        let (grid, out_of) = ([positions.len() as u32, 1, 1], [out.address(), out.address() + half]);
        let (sequence, first) = (sequence.address(), positions.start as i32);
        if let Some(latents) = &method.latents {
            let groups = [0, 1].map(|side| latents.group(side, layer));
            let params = RestoreLatentsParams {
                sequence,
                out: out_of,
                sets: [0, 1].map(|side: usize| latents.sets(side, groups[side].0)),
                phases: latents.phases(),
                levels: latents.levels(),
                layers: groups.map(|(_, within)| within as i32),
                layer: (layer - method.layers.start) as i32,
                first,
            };
            // SAFETY: the cache's tables hold these positions, and `out` both sides of them.
            unsafe { launch(&*self.driver, kernels.of("restore_latents")?, grid, &params)? };
        } else {
            let places = [0, 1].map(|side: usize| method.sides[side].places[layer]);
            let params = RestoreParams { sequence, out: out_of, places, first, pad: 0 };
            // SAFETY: as above.
            unsafe { launch(&*self.driver, kernels.of("restore")?, grid, &params)? };
        }
        let mut all = vec![0f32; 2 * numbers];
        self.driver.download(out.address(), bytes_of_mut(&mut all))?;
        let values = all.split_off(numbers);
        Ok(Restored { positions: positions.collect(), keys: all, values })
    }
}

/// The kernels of caches, by name.
#[derive(Debug, Clone)]
pub(crate) struct Kernels(Arc<[(&'static str, Kernel)]>);

impl Kernels {
    /// One of them.
    pub(crate) fn of(&self, name: &str) -> Result<&Kernel> {
        let found = self.0.iter().find(|(other, _)| *other == name);
        found.map(|(_, kernel)| kernel).ok_or_else(|| Error::Missing(format!("the kernel {name} is missing")))
    }
}
