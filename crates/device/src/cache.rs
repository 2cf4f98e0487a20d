//! A sequence's cache on a device or several.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use minicache_core::{CacheSpec, Footprint, KvCache, ModelShape, Resources, Restored, States};

use crate::device::Device;
use crate::driver::{Act, Acts, Address, Memory, bytes_of, bytes_of_mut};
use crate::method::{Arithmetic, Method};
use crate::part::PartCache;
use crate::step::{DeviceStates, GroupStep, Workspace};
use crate::{Error, Result};

/// A sequence's cache on the devices that a model's layers lie on.
///
/// A decoder on the same devices takes it through its steps ([`crate::GroupStep`]). Given states of the host's, as other
/// caches are, it carries them over layer by layer, which is slow.
#[derive(Debug)]
pub struct DeviceCache {
    parts: Vec<PartCache>,
    /// Keys and values of the host's that were stored last: a pair needs those of both its layers.
    last: Option<[Memory; 2]>,
    /// Working memory of a step with states of the host's, by part: latents need those of all layers of a group.
    rooms: Vec<Workspace>,
    arithmetic: Arithmetic,
}

impl DeviceCache {
    /// An empty cache of a model of `shape`, whose layers lie on `devices` and which is computed in `arithmetic`. Latents
    /// take their plan from `resources`.
    ///
    /// # Errors
    /// Settings that do not fit the shape, methods without kernels, no memory.
    pub fn new(
        devices: &[(Arc<Device>, Range<usize>)],
        spec: &CacheSpec,
        shape: &ModelShape,
        arithmetic: Arithmetic,
        resources: &Resources,
    ) -> Result<Self> {
        spec.validate_for(shape).map_err(|e| Error::Core(e.under("cache").into()))?;
        let part = |(device, layers): &(Arc<Device>, Range<usize>)| {
            let method = Method::new(device, spec, shape, layers.clone(), arithmetic, resources)?;
            let mut part = PartCache::new(device, &Arc::new(method))?;
            // `expected_attention` takes queries back to what they were before it.
            part.rotary.0.clone_from(&resources.rotary);
            Ok(part)
        };
        Ok(Self {
            parts: devices.iter().map(part).collect::<Result<_>>()?,
            last: None,
            rooms: Vec::new(),
            arithmetic,
        })
    }

    /// Whether its method drops tokens.
    pub(crate) fn drops_tokens(&self) -> bool {
        self.method().evicting.is_some()
    }

    /// Its parts, one for each device.
    pub fn parts(&self) -> &[PartCache] {
        &self.parts
    }

    /// As [`Self::parts`].
    pub fn parts_mut(&mut self) -> &mut [PartCache] {
        &mut self.parts
    }

    /// As [`KvCache::fork`].
    ///
    /// # Errors
    /// No memory for its tables.
    pub fn try_fork(&self) -> Result<Self> {
        let parts = self.parts.iter().map(PartCache::try_fork).collect::<Result<_>>()?;
        Ok(Self { parts, last: None, rooms: Vec::new(), arithmetic: self.arithmetic })
    }

    /// Makes room for a step of `tokens` tokens on every device.
    ///
    /// # Errors
    /// No memory: the cache is as it was. A step before that went wrong after it had begun to store.
    pub fn begin(&mut self, tokens: usize) -> Result<()> {
        let done = self.parts.iter_mut().try_for_each(|part| part.begin(tokens));
        if done.is_err() {
            self.give_up();
        }
        done
    }

    /// Takes back [`DeviceCache::begin`], before anything is stored.
    pub fn give_up(&mut self) {
        self.parts.iter_mut().for_each(|part| part.step = 0);
    }

    /// Ends a step: its tokens count as cached.
    ///
    /// # Errors
    /// Of the device.
    pub fn end(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(PartCache::end)
    }

    /// Bytes of its pieces of devices' memory, those that forks share in each of them: what a footprint counts, but in
    /// blocks rounded up and with tables of addresses in place of the host's lists.
    pub fn allocated(&self) -> usize {
        self.parts.iter().map(PartCache::allocated).sum()
    }

    /// See [`KvCache::truncate`].
    fn take_back(&mut self, len: usize) -> Result<()> {
        let held = self.len();
        if len > held {
            let (expected, got) = (format!("at most {held} tokens"), len.to_string());
            return Err(Error::Core(minicache_core::Error::Shape { what: "length", expected, got }));
        }
        // A step that went wrong may have left something of its tokens.
        if len == held && self.parts.iter().all(|part| part.step == 0) {
            return Ok(());
        }
        for part in &self.parts {
            if let Some(reason) = part.cannot_truncate(len)? {
                return Err(Error::Core(minicache_core::Error::Truncate { len, reason }));
            }
        }
        self.parts.iter_mut().try_for_each(|part| part.truncate(len))
    }

    /// Whether a step can be taken together with one of `other`.
    pub fn is_like(&self, other: &Self) -> bool {
        self.parts.iter().zip(&other.parts).all(|(a, b)| a.method == b.method)
    }

    fn method(&self) -> &Method {
        &self.parts[0].method
    }

    /// The part that has a layer.
    fn part_of(&self, layer: usize) -> Result<usize> {
        let layers = self.shape().layers;
        self.parts.iter().position(|part| part.method.layers.contains(&layer)).ok_or_else(|| {
            let (expected, got) = (format!("below {layers}"), layer.to_string());
            Error::Core(minicache_core::Error::Shape { what: "layer", expected, got })
        })
    }

    /// Attention of states of the host's.
    fn attend_host(&self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()> {
        // A step has a cache to itself, and this one is only looked at.
        let (mut copy, tokens) = (self.try_fork()?, states.tokens(self.shape()));
        let Arithmetic { act, precise } = self.arithmetic;
        let index = copy.part_of(layer)?;
        let part = &mut copy.parts[index];
        let device = part.device.clone();
        let mut room = Workspace::new(&device)?;
        let group = GroupStep::new(&device, vec![(part, tokens)], &mut room)?;
        let memory = |x: &[f32]| Memory::of(&device.driver, bytes_of(x));
        let (q, k, v) = (memory(states.q)?, memory(states.k)?, memory(states.v)?);
        let halves = Memory::new(&device.driver, out.len() * 4)?;
        let half = (out.len() * 2) as Address;
        let place = Acts { high: halves.address(), low: if precise { halves.address() + half } else { 0 } };
        let given = DeviceStates { q: q.address(), k: k.address(), v: v.address() };
        group.attend(layer, given, place)?;
        let mut bits = vec![0u16; 2 * out.len()];
        device.driver.download(halves.address(), bytes_of_mut(&mut bits))?;
        let widen = |bits: u16| match act {
            Act::F16 => f16::from_bits(bits).to_f32(),
            Act::Bf16 => bf16::from_bits(bits).to_f32(),
        };
        let (high, low) = bits.split_at(out.len());
        for (out, (high, low)) in out.iter_mut().zip(high.iter().zip(low)) {
            *out = widen(*high) + if precise { widen(*low) } else { 0.0 };
        }
        Ok(())
    }

    /// Stores states of the host's; the first layer begins a step.
    fn store_host(&mut self, layer: usize, states: States<'_>) -> Result<()> {
        let tokens = states.tokens(self.shape());
        if self.parts.iter().all(|part| part.step == 0) {
            self.begin(tokens)?;
        }
        let last = self.last.take();
        let index = self.part_of(layer)?;
        while self.rooms.len() <= index {
            self.rooms.push(Workspace::new(&self.parts[self.rooms.len()].device)?);
        }
        let (part, room) = (&mut self.parts[index], &mut self.rooms[index]);
        let device = part.device.clone();
        let memory = |x: &[f32]| Memory::of(&device.driver, bytes_of(x));
        let now = [memory(states.k)?, memory(states.v)?];
        // Methods that drop tokens look at the queries, where there are any.
        let queries = if states.q.is_empty() { None } else { Some(memory(states.q)?) };
        let q = queries.as_ref().map_or(0, Memory::address);
        let of = |m: &[Memory; 2]| DeviceStates { q, k: m[0].address(), v: m[1].address() };
        let mut group = GroupStep::new(&device, vec![(part, tokens)], room)?;
        group.store(layer, of(&now), of(last.as_ref().unwrap_or(&now)))?;
        // The states are given back with the next layer's.
        device.driver.synchronise()?;
        self.last = Some(now);
        Ok(())
    }
}

fn core_error(error: Error) -> minicache_core::Error {
    match error {
        Error::Core(error) => error,
        other => minicache_core::Error::Backend(other.to_string()),
    }
}

impl KvCache for DeviceCache {
    fn shape(&self) -> &ModelShape {
        &self.method().shape
    }

    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        _: &mut Vec<f32>,
    ) -> minicache_core::Result<()> {
        self.attend_host(layer, states, out).map_err(core_error)
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> minicache_core::Result<()> {
        self.store_host(layer, states).map_err(core_error)
    }

    fn finish_step(&mut self) -> minicache_core::Result<()> {
        self.last = None;
        self.rooms.clear();
        self.end().map_err(core_error)
    }

    fn len(&self) -> usize {
        self.parts[0].len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        self.parts.iter().for_each(|part| part.count(&mut total));
        total
    }

    fn restored(&self, layer: usize) -> minicache_core::Result<Restored> {
        let Some(part) = self.parts.iter().find(|part| part.method.layers.contains(&layer)) else {
            let (expected, got) = (format!("below {}", self.shape().layers), layer.to_string());
            return Err(minicache_core::Error::Shape { what: "layer", expected, got });
        };
        part.device.restored(part, layer).map_err(core_error)
    }

    fn truncate(&mut self, len: usize) -> minicache_core::Result<()> {
        self.take_back(len).map_err(core_error)
    }

    fn fork(&self) -> Box<dyn KvCache> {
        match self.try_fork() {
            Ok(fork) => Box::new(fork),
            // Whoever uses it is told so.
            Err(error) => Box::new(Broken { shape: *self.shape(), len: self.len(), why: error.to_string() }),
        }
    }

    fn as_any_mut(&mut self) -> Option<&mut dyn Any> {
        Some(self)
    }
}

/// A fork for which there was no memory.
struct Broken {
    shape: ModelShape,
    len: usize,
    why: String,
}

impl Broken {
    fn fail<T>(&self) -> minicache_core::Result<T> {
        Err(minicache_core::Error::Backend(self.why.clone()))
    }
}

impl KvCache for Broken {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }
    fn attend_held(
        &self,
        _: usize,
        _: States<'_>,
        _: &mut [f32],
        _: &mut Vec<f32>,
    ) -> minicache_core::Result<()> {
        self.fail()
    }
    fn store(&mut self, _: usize, _: States<'_>, _: &[f32]) -> minicache_core::Result<()> {
        self.fail()
    }
    fn finish_step(&mut self) -> minicache_core::Result<()> {
        self.fail()
    }
    fn len(&self) -> usize {
        self.len
    }
    fn footprint(&self) -> Footprint {
        Footprint::default()
    }
    fn restored(&self, _: usize) -> minicache_core::Result<Restored> {
        self.fail()
    }
    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self { shape: self.shape, len: self.len, why: self.why.clone() })
    }
}
