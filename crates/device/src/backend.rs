//! The devices as a backend: steps of many sequences, whatever their methods.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use minicache_core::{
    Backend, BackendStep, CacheSpec, KvCache, ModelShape, Resources, Sequence, States, shape_of_step,
};
use rayon::prelude::*;

use crate::cache::DeviceCache;
use crate::device::Device;
use crate::driver::{Act, Acts, Address, Memory, bytes_of, bytes_of_mut};
use crate::method::Arithmetic;
use crate::part::PartCache;
use crate::step::{DeviceStates, GroupStep, Workspace};
use crate::{Error, Result};

/// The devices that a model's layers lie on, in order, as a place where caches live.
#[derive(Debug)]
pub struct Devices {
    parts: Vec<(Arc<Device>, Range<usize>)>,
    arithmetic: Arithmetic,
    /// Working memory of steps, kept from one to the next, by part.
    rooms: Vec<Mutex<Vec<Workspace>>>,
}

impl Devices {
    /// Devices with the layers that each of them has, of a model computed in `arithmetic`.
    pub fn new(parts: Vec<(Arc<Device>, Range<usize>)>, arithmetic: Arithmetic) -> Self {
        let rooms = parts.iter().map(|_| Mutex::default()).collect();
        Self { parts, arithmetic, rooms }
    }

    /// An empty cache, see [`DeviceCache::new`].
    ///
    /// # Errors
    /// As there.
    pub fn empty(&self, spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<DeviceCache> {
        DeviceCache::new(&self.parts, spec, shape, self.arithmetic, resources)
    }

    /// Begins a step of caches with the number of their new tokens. Neighbours of one method go through attention in the
    /// same launches.
    ///
    /// # Errors
    /// No memory; a cache whose last step went wrong and could not be taken back; kernels that do not compile. The caches
    /// are as they were.
    pub fn step<'c>(&'c self, caches: Vec<(&'c mut DeviceCache, usize)>) -> Result<DeviceStep<'c>> {
        let mut step =
            DeviceStep { devices: self, groups: Vec::new(), before: None, carried: None, finished: false };
        let mut first = 0;
        for (cache, tokens) in caches {
            let rows = first..first + tokens;
            first = rows.end;
            let last = step.groups.last_mut().filter(|group| group.is_like(cache));
            let parts = cache.parts_mut().iter_mut();
            if let Some(group) = last {
                group.rows.end = rows.end;
                parts.zip(&mut group.parts).for_each(|(part, to)| to.caches.push((part, tokens)));
            } else {
                let parts =
                    parts.map(|part| GroupPart { caches: vec![(part, tokens)], step: None }).collect();
                step.groups.push(Group { rows, parts });
            }
        }
        // Kernels that are new to a device take a second for each file. One cache speaks for all of its method.
        let parts = step.groups.iter().flat_map(|group| &group.parts);
        let methods: Vec<&PartCache> = parts.filter_map(|part| Some(&*part.caches.first()?.0)).collect();
        methods.par_iter().try_for_each(|cache| cache.compile())?;
        // From here on the step's end takes back what has been begun.
        for part in step.groups.iter_mut().flat_map(|group| &mut group.parts) {
            part.caches.iter_mut().try_for_each(|(cache, tokens)| cache.begin(*tokens))?;
        }
        for group in &mut step.groups {
            for (part, (index, (device, _))) in group.parts.iter_mut().zip(self.parts.iter().enumerate()) {
                let room = self.rooms(index).pop().map_or_else(|| Workspace::new(device), Ok)?;
                part.step = Some(GroupStep::new(device, &part.caches, room)?);
            }
        }
        Ok(step)
    }

    fn part_of(&self, layer: usize) -> Result<usize> {
        part_of(self.parts.iter().map(|(_, layers)| layers), layer)
    }

    fn rooms(&self, part: usize) -> MutexGuard<'_, Vec<Workspace>> {
        self.rooms[part].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Devices {
    type Step<'c> = DeviceStep<'c>;

    fn cache(
        &self,
        spec: &CacheSpec,
        shape: &ModelShape,
        resources: &Resources,
    ) -> minicache_core::Result<Box<dyn KvCache>> {
        Ok(Box::new(self.empty(spec, shape, resources)?))
    }

    fn begin<'c>(
        &'c self,
        sequences: Vec<(&'c mut Sequence, usize)>,
    ) -> minicache_core::Result<DeviceStep<'c>> {
        shape_of_step(&sequences)?;
        let caches = sequences.into_iter().map(|(sequence, tokens)| match DeviceCache::of(sequence) {
            Some(cache) => Ok((cache, tokens)),
            None => {
                Err(Error::Unsupported("a sequence's cache does not live on this model's devices".into()))
            }
        });
        Ok(self.step(caches.collect::<Result<_>>()?)?)
    }
}

/// A forward step on devices, see [`BackendStep`].
///
/// Dropped without [`DeviceStep::end`] it takes back what it has stored. Methods that drop tokens cannot take back a step
/// after their first, whose tokens lie where others have been: such a cache refuses its next step.
#[derive(Debug)]
pub struct DeviceStep<'c> {
    devices: &'c Devices,
    groups: Vec<Group<'c>>,
    /// The layer taken last, and its states, which a pair needs.
    before: Option<(usize, DeviceStates)>,
    /// These, if they have been carried over from the host.
    carried: Option<[Memory; 3]>,
    finished: bool,
}

/// Neighbours of one method.
#[derive(Debug)]
struct Group<'c> {
    rows: Range<usize>,
    /// By device.
    parts: Vec<GroupPart<'c>>,
}

#[derive(Debug)]
struct GroupPart<'c> {
    caches: Vec<(&'c mut PartCache, usize)>,
    step: Option<GroupStep>,
}

impl Group<'_> {
    /// Whether a cache's step can be taken together with those of these.
    fn is_like(&self, cache: &DeviceCache) -> bool {
        let own = self.parts.iter().flat_map(|part| part.caches.first());
        own.zip(cache.parts()).all(|((own, _), other)| own.method() == other.method())
    }
}

impl DeviceStep<'_> {
    /// Attention of a layer's new tokens over what is held and over themselves, into `out (rows, heads, head_dim)` of the
    /// type of linear layers; then their states are stored.
    ///
    /// # Errors
    /// Of a device, no memory for what is kept exact.
    pub fn attend(&mut self, layer: usize, states: DeviceStates, out: Acts) -> Result<()> {
        self.look(layer, states, out)?;
        self.store(layer, states)
    }

    /// Stores a layer's states, whose attention has been computed elsewhere.
    ///
    /// # Errors
    /// As [`DeviceStep::attend`].
    pub fn store(&mut self, layer: usize, states: DeviceStates) -> Result<()> {
        let part = self.devices.part_of(layer)?;
        // Of the first layer of a device none before it is needed.
        let before = self.before.filter(|(other, _)| other + 1 == layer).map_or(states, |(_, states)| states);
        for Group { rows, parts } in &mut self.groups {
            let GroupPart { caches, step: Some(step) } = &mut parts[part] else { continue };
            let (q_dim, kv_dim) = step.widths();
            let of = |states: DeviceStates| states.skip(rows.start, q_dim, kv_dim);
            step.store(caches, layer, of(states), of(before))?;
        }
        self.before = Some((layer, states));
        Ok(())
    }

    /// Attention alone.
    pub(crate) fn look(&self, layer: usize, states: DeviceStates, out: Acts) -> Result<()> {
        let part = self.devices.part_of(layer)?;
        for Group { rows, parts } in &self.groups {
            let Some(step) = &parts[part].step else { continue };
            let (q_dim, kv_dim) = step.widths();
            let out = out.from_row(rows.start, q_dim);
            step.attend(layer, states.skip(rows.start, q_dim, kv_dim), out)?;
        }
        Ok(())
    }

    /// Ends the step: its tokens count as cached.
    ///
    /// # Errors
    /// Of a device.
    pub fn end(mut self) -> Result<()> {
        self.caches().try_for_each(PartCache::end)?;
        self.finished = true;
        Ok(())
    }

    fn caches(&mut self) -> impl Iterator<Item = &mut PartCache> {
        let parts = self.groups.iter_mut().flat_map(|group| &mut group.parts);
        parts.flat_map(|part| part.caches.iter_mut().map(|(cache, _)| &mut **cache))
    }
}

impl Drop for DeviceStep<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.caches().for_each(PartCache::roll_back);
        }
        for group in &mut self.groups {
            for (index, part) in group.parts.iter_mut().enumerate() {
                let room = part.step.take().map(GroupStep::into_room);
                self.devices.rooms(index).extend(room);
            }
        }
    }
}

impl BackendStep for DeviceStep<'_> {
    type States<'s> = DeviceStates;
    type Out<'o> = Acts;

    fn attend(&mut self, layer: usize, states: DeviceStates, out: Acts) -> minicache_core::Result<()> {
        Ok(DeviceStep::attend(self, layer, states, out)?)
    }

    fn attend_host(
        &mut self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
    ) -> minicache_core::Result<()> {
        let devices = self.devices;
        let (device, _) = &devices.parts[devices.part_of(layer)?];
        let (now, given) = carried(device, states)?;
        attended(device, devices.arithmetic, out, |acts| DeviceStep::attend(self, layer, given, acts))?;
        // The states before these are given back only now.
        self.carried = Some(now);
        Ok(())
    }

    fn finish(self) -> minicache_core::Result<()> {
        Ok(self.end()?)
    }
}

/// The one of `parts`, of which each has so many layers, that has a layer.
pub(crate) fn part_of<'r>(parts: impl Iterator<Item = &'r Range<usize>>, layer: usize) -> Result<usize> {
    let mut end = 0;
    for (index, layers) in parts.enumerate() {
        if layers.contains(&layer) {
            return Ok(index);
        }
        end = layers.end;
    }
    let (expected, got) = (format!("below {end}"), layer.to_string());
    Err(Error::Core(minicache_core::Error::Shape { what: "layer", expected, got }))
}

/// States of the host's on a device.
pub(crate) fn carried(device: &Device, states: States<'_>) -> Result<([Memory; 3], DeviceStates)> {
    let memory = |x: &[f32]| Memory::of(&device.driver, bytes_of(x));
    let all = [memory(states.q)?, memory(states.k)?, memory(states.v)?];
    let [q, k, v] = all.each_ref().map(Memory::address);
    // Methods that drop tokens look at queries where there are any.
    let q = if states.q.is_empty() { 0 } else { q };
    Ok((all, DeviceStates { q, k, v }))
}

/// Fetches what `attend` writes to a device.
pub(crate) fn attended(
    device: &Device,
    arithmetic: Arithmetic,
    out: &mut [f32],
    attend: impl FnOnce(Acts) -> Result<()>,
) -> Result<()> {
    let Arithmetic { act, precise } = arithmetic;
    let halves = Memory::new(&device.driver, out.len() * 4)?;
    let half = (out.len() * 2) as Address;
    attend(Acts { high: halves.address(), low: if precise { halves.address() + half } else { 0 } })?;
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
