//! A device with its memory and its kernels of caches.

use std::sync::Arc;

use minicache_core::Restored;

use crate::cuda::Cuda;
use crate::driver::{Driver, Kernel, Memory, bytes_of_mut};
use crate::emulated::Emulated;
use crate::kernels::File;
use crate::method::Method;
use crate::params::{RestoreParams, SequenceEntry, launch};
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
        Arc::new(Self { driver, pool })
    }

    /// The kernels of caches of a method.
    pub(crate) fn kernels(&self, method: &Method) -> Result<Kernels> {
        let take = |file| self.driver.compile(&method.source(file));
        let mut attention = take(File::Attention)?.into_iter();
        let mut store = take(File::Store)?.into_iter();
        let mut next = |of: usize| {
            let kernel = if of == 0 { attention.next() } else { store.next() };
            kernel.ok_or_else(|| Error::Missing("a kernel is missing".into()))
        };
        Ok(Kernels {
            attend_held: next(0)?,
            attend_step: next(0)?,
            join: next(0)?,
            merge: next(1)?,
            retain: next(1)?,
            settle: next(1)?,
            keep: next(1)?,
            pack: next(1)?,
            restore: next(1)?,
            evicting: match method.evicting {
                Some(_) => Some(self.slot_kernels(method)?),
                None => None,
            },
        })
    }

    fn slot_kernels(&self, method: &Method) -> Result<SlotKernels> {
        let mut all = self.driver.compile(&method.source(File::Slots))?;
        all.extend(self.driver.compile(&method.source(File::Evict))?);
        let all = <[Kernel; 5]>::try_from(all);
        let [attend_slots, weigh, receive, keep_slots, move_slots] =
            all.map_err(|_| Error::Missing("a kernel is missing".into()))?;
        let expecting = match method.files().contains(&File::Expect) {
            true => Some(self.expect_kernels(method)?),
            false => None,
        };
        Ok(SlotKernels { attend_slots, weigh, receive, keep_slots, move_slots, expecting })
    }

    fn expect_kernels(&self, method: &Method) -> Result<ExpectKernels> {
        let all = <[Kernel; 4]>::try_from(self.driver.compile(&method.source(File::Expect))?);
        let [mean, spread, logits, expect] = all.map_err(|_| Error::Missing("a kernel is missing".into()))?;
        Ok(ExpectKernels { mean, spread, logits, expect })
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
        let kernel = self.kernels(method)?.restore;
        let entry =
            SequenceEntry { tables: cache.tables(), len: cache.len() as i32, first: 0, rows: 0, pad: 0 };
        let sequence = Memory::of(&self.driver, crate::driver::bytes_of(&[entry]))?;
        let out = Memory::new(&self.driver, 2 * numbers * size_of::<f32>())?;
        let half = (numbers * size_of::<f32>()) as u64;
        let params = RestoreParams {
            sequence: sequence.address(),
            out: [out.address(), out.address() + half],
            places: [method.sides[0].places[layer], method.sides[1].places[layer]],
            first: positions.start as i32,
            pad: 0,
        };
        // SAFETY: the cache's tables hold these positions, and `out` both sides of them.
        unsafe { launch(&*self.driver, &kernel, [positions.len() as u32, 1, 1], &params)? };
        let mut all = vec![0f32; 2 * numbers];
        self.driver.download(out.address(), bytes_of_mut(&mut all))?;
        let values = all.split_off(numbers);
        Ok(Restored { positions: positions.collect(), keys: all, values })
    }
}

/// The kernels of caches.
#[derive(Debug, Clone)]
pub(crate) struct Kernels {
    pub(crate) attend_held: Kernel,
    pub(crate) attend_step: Kernel,
    pub(crate) join: Kernel,
    pub(crate) merge: Kernel,
    pub(crate) retain: Kernel,
    pub(crate) settle: Kernel,
    pub(crate) keep: Kernel,
    pub(crate) pack: Kernel,
    pub(crate) restore: Kernel,
    /// Of methods that drop tokens.
    pub(crate) evicting: Option<SlotKernels>,
}

/// The kernels of caches of methods that drop tokens.
#[derive(Debug, Clone)]
pub(crate) struct SlotKernels {
    pub(crate) attend_slots: Kernel,
    pub(crate) weigh: Kernel,
    pub(crate) receive: Kernel,
    pub(crate) keep_slots: Kernel,
    pub(crate) move_slots: Kernel,
    pub(crate) expecting: Option<ExpectKernels>,
}

/// The kernels that say what queries to come are expected to look at.
#[derive(Debug, Clone)]
pub(crate) struct ExpectKernels {
    pub(crate) mean: Kernel,
    pub(crate) spread: Kernel,
    pub(crate) logits: Kernel,
    pub(crate) expect: Kernel,
}
