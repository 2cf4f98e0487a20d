//! A sequence's cache on a device or several.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use minicache_core::{CacheSpec, Footprint, KvCache, ModelShape, Resources, Restored, States};

use crate::backend::{attended, carried, part_of};
use crate::device::Device;
use crate::driver::Memory;
use crate::method::{Arithmetic, Method};
use crate::part::PartCache;
use crate::step::{DeviceStates, GroupStep, Workspace};
use crate::{Error, Result};

/// A sequence's cache on the devices that a model's layers lie on.
///
/// A decoder on the same devices takes it through its steps together with others ([`crate::Devices::step`]). Given states
/// of the host's, as other caches are, it carries them over layer by layer, which is slow.
#[derive(Debug)]
pub struct DeviceCache {
    parts: Vec<PartCache>,
    /// States of the host's that were stored last: a pair needs those of both its layers.
    last: Option<[Memory; 3]>,
    /// Working memory of a step with states of the host's, and of which part: latents need those of all layers of a group.
    room: Option<(usize, Workspace)>,
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
            room: None,
            arithmetic,
        })
    }

    /// A sequence's cache, if it lives on devices.
    pub fn of(sequence: &mut minicache_core::Sequence) -> Option<&mut Self> {
        sequence.cache_mut().as_any_mut()?.downcast_mut()
    }

    /// Compiles the kernels of its method, or finds them compiled: a second for each file of them that is not. Several
    /// may do so at once.
    ///
    /// # Errors
    /// Of the compiler.
    pub fn compile(&self) -> Result<()> {
        self.parts.iter().try_for_each(PartCache::compile)
    }

    /// Its parts, one for each device.
    pub(crate) fn parts(&self) -> &[PartCache] {
        &self.parts
    }

    /// As [`Self::parts`].
    pub(crate) fn parts_mut(&mut self) -> &mut [PartCache] {
        &mut self.parts
    }

    /// As [`KvCache::fork`].
    ///
    /// # Errors
    /// No memory for its tables.
    pub fn try_fork(&self) -> Result<Self> {
        let parts = self.parts.iter().map(PartCache::try_fork).collect::<Result<_>>()?;
        Ok(Self { parts, last: None, room: None, arithmetic: self.arithmetic })
    }

    /// Makes room for a step of `tokens` tokens on every device.
    ///
    /// # Errors
    /// No memory: the cache is as it was. A step before that went wrong after it had begun to store.
    fn begin(&mut self, tokens: usize) -> Result<()> {
        for at in 0..self.parts.len() {
            if let Err(error) = self.parts[at].begin(tokens) {
                self.parts[..at].iter_mut().for_each(PartCache::roll_back);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Ends a step: its tokens count as cached.
    ///
    /// # Errors
    /// Of the device.
    fn end(&mut self) -> Result<()> {
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
        part_of(self.parts.iter().map(|part| &part.method.layers), layer)
    }

    /// Attention of states of the host's.
    fn attend_host(&self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()> {
        // A step has a cache to itself, and this one is only looked at.
        let (mut copy, tokens) = (self.try_fork()?, states.tokens(self.shape()));
        let index = copy.part_of(layer)?;
        let part = &mut copy.parts[index];
        let device = part.device.clone();
        let group = GroupStep::new(&device, &[(part, tokens)], Workspace::new(&device)?)?;
        let (_held, given) = carried(&device, states)?;
        attended(&device, self.arithmetic, out, |acts| group.attend(layer, given, acts))
    }

    /// Stores states of the host's; the first layer begins a step.
    fn store_host(&mut self, layer: usize, states: States<'_>) -> Result<()> {
        let tokens = states.tokens(self.shape());
        if self.parts.iter().all(|part| part.step == 0) {
            self.begin(tokens)?;
        }
        let last = self.last.take();
        let index = self.part_of(layer)?;
        let part = &mut self.parts[index];
        let device = part.device.clone();
        let room = self.room.take().filter(|(other, _)| *other == index);
        let room = room.map_or_else(|| Workspace::new(&device), |(_, room)| Ok(room))?;
        let (now, given) = carried(&device, states)?;
        let before =
            last.as_ref().map_or(given, |[_, k, v]| DeviceStates { q: 0, k: k.address(), v: v.address() });
        let mut caches = [(part, tokens)];
        let group = GroupStep::new(&device, &caches, room)?;
        group.store(&mut caches, layer, given, before)?;
        // The states are given back with the next layer's.
        device.driver.synchronise()?;
        (self.last, self.room) = (Some(now), Some((index, group.into_room())));
        Ok(())
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
        Ok(self.attend_host(layer, states, out)?)
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> minicache_core::Result<()> {
        Ok(self.store_host(layer, states)?)
    }

    fn finish_step(&mut self) -> minicache_core::Result<()> {
        (self.last, self.room) = (None, None);
        Ok(self.end()?)
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
        let part = &self.parts[self.part_of(layer)?];
        Ok(part.device.restored(part, layer)?)
    }

    fn truncate(&mut self, len: usize) -> minicache_core::Result<()> {
        Ok(self.take_back(len)?)
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
