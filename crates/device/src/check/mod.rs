//! Checks of a device: its caches against the host's, and how fast it reads them.

mod basis;

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use minicache_core::{CacheSpec, KvCache, ModelShape, build};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use self::basis::resources;
use crate::driver::{Act, Acts, Memory, bytes_of, bytes_of_mut};
use crate::kernels::Source;
use crate::method::Method;
use crate::ops::Ops;
use crate::{Arithmetic, Device, DeviceCache, DeviceStates, GroupStep, Result, Workspace};

/// What [`compare`] found: the largest differences, relative to the largest number.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Of attention's outputs.
    pub outputs: f32,
    /// The root mean square of their differences, relative to that of the outputs: a number that became another code moves
    /// what every later token sees of its head, and little on the whole.
    pub spread: f32,
    /// Of the states that attention sees.
    pub states: f32,
    /// The share of these states that differ by more than a thousandth. Sums behind codes are rounded otherwise, and so a
    /// number that lies between two codes may become the other one.
    pub apart: f32,
    /// Bytes of the cache on the device over those on the host; 1 if they are equal to the byte, part by part. Forks may
    /// differ by half a percent, see [`compare`].
    pub bytes: f64,
    /// The method drops tokens: room for those that stay grows otherwise than on the host, and bytes differ by it.
    pub rooms: bool,
    /// Bytes of the device's memory over those.
    pub allocated: f64,
    /// The first truncation that one side could do and the other could not, or for another reason.
    pub truncation: Option<String>,
}

/// A sequence on both sides.
struct Both {
    host: Box<dyn KvCache>,
    device: DeviceCache,
}

impl Both {
    fn fork(&self) -> Result<Self> {
        Ok(Self { host: self.host.fork(), device: self.device.try_fork()? })
    }
}

/// Takes sequences with caches of `spec` through a long prefill, ragged steps, a fork, single tokens and truncations, on
/// random states, on `device` and on the host. `precise`: computed there as in f32, else outputs are halves.
///
/// # Errors
/// A method without kernels, errors of the device.
pub fn compare(
    device: &Arc<Device>,
    spec: &CacheSpec,
    shape: &ModelShape,
    precise: bool,
) -> Result<Comparison> {
    let made = resources(spec, shape, None)?;
    let arithmetic = Arithmetic { act: Act::F16, precise };
    let new = || -> Result<Both> {
        let host = build(spec, shape, &made)?;
        let parts = [(device.clone(), 0..shape.layers)];
        Ok(Both { host, device: DeviceCache::new(&parts, spec, shape, arithmetic, &made)? })
    };
    let mut room = Workspace::new(device)?;
    let (mut a, mut b) = (new()?, new()?);
    let (mut outputs, mut states, mut seed) = (Outputs::default(), States::default(), 0u64);
    let mut run = |all: &mut [(&mut Both, usize)]| -> Result<()> {
        seed += 1;
        outputs.add(step(device, &mut room, all, shape, seed)?);
        Ok(())
    };
    run(&mut [(&mut a, 75)])?;
    states.compare(&a, shape)?;
    run(&mut [(&mut a, 1), (&mut b, 33)])?;
    let first = weighed(&a);
    let mut c = a.fork()?;
    // Beyond a tile of attention, and more than one part of the positions.
    run(&mut [(&mut a, 220), (&mut b, 150), (&mut c, 1)])?;
    for _ in 0..20 {
        run(&mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)])?;
    }
    for both in [&a, &b, &c] {
        states.compare(both, shape)?;
    }
    // Of forks, which of them has a list of kept positions to itself depends on who was the first to keep another.
    let (mut bytes, mut truncation) = (first, None);
    for (both, slack) in [(&a, 5e-3), (&c, 5e-3), (&b, 0.0)] {
        let ratio = weighed(both);
        if (ratio - 1.0).abs() > slack {
            bytes = ratio;
        }
    }
    let allocated = a.device.allocated() as f64 / a.host.footprint().total() as f64;
    for len in TRUNCATED.into_iter().map(|back| a.host.len() - back).chain([40, 0]) {
        let mut both = a.fork()?;
        let done = [both.host.truncate(len), both.device.truncate(len)].map(|d| d.map_err(|e| e.to_string()));
        if done[0] != done[1] {
            truncation.get_or_insert(format!(
                "to {len} tokens: {:?} on the host, {:?} on the device",
                done[0], done[1]
            ));
        } else if done[0].is_ok() {
            for tokens in [1, 30, 1] {
                seed += 1;
                outputs.add(step(device, &mut room, &mut [(&mut both, tokens)], shape, seed)?);
            }
            states.compare(&both, shape)?;
        }
    }
    let (states, apart) = (states.largest, states.apart as f32 / states.all.max(1) as f32);
    let rooms = a.device.drops_tokens();
    let spread = (outputs.off / outputs.all).sqrt() as f32;
    Ok(Comparison { outputs: outputs.largest, spread, states, apart, bytes, rooms, allocated, truncation })
}

/// Bytes of the device's cache over those of the host's: 1 if all parts are equal, and only then.
fn weighed(both: &Both) -> f64 {
    let (host, device) = (both.host.footprint(), both.device.footprint());
    let ratio = device.total() as f64 / host.total() as f64;
    if ratio == 1.0 && host != device { f64::INFINITY } else { ratio }
}

/// How many tokens are taken back.
const TRUNCATED: [usize; 4] = [1, 3, 19, 100];

/// States of a layer: like those of the layer before, so that merging has something to share, some of them not.
fn noise(rng: &mut ChaCha8Rng, n: usize, before: &[f32]) -> Vec<f32> {
    let mut x: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
    if before.len() == n {
        x.iter_mut().zip(before).for_each(|(x, b)| *x = 0.3 * *x + 1.2 * b);
    }
    x
}

/// How outputs differ.
#[derive(Debug, Default)]
struct Outputs {
    /// The largest difference, relative to the largest output of its step.
    largest: f32,
    /// Sums of the squares of differences and of outputs.
    off: f64,
    all: f64,
}

impl Outputs {
    fn add(&mut self, step: Self) {
        self.largest = self.largest.max(step.largest);
        self.off += step.off;
        self.all += step.all;
    }
}

/// One step of all sequences; gives how their outputs differ.
fn step(
    device: &Arc<Device>,
    room: &mut Workspace,
    all: &mut [(&mut Both, usize)],
    shape: &ModelShape,
    seed: u64,
) -> Result<Outputs> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rows: usize = all.iter().map(|(_, n)| n).sum();
    let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
    let mut layers: Vec<[Vec<f32>; 3]> = Vec::new();
    for _ in 0..shape.layers {
        let q = noise(&mut rng, rows * q_dim, &[]);
        let last = layers.last();
        let k = noise(&mut rng, rows * kv_dim, last.map_or(&[], |l| &l[1]));
        let v = noise(&mut rng, rows * kv_dim, last.map_or(&[], |l| &l[2]));
        layers.push([q, k, v]);
    }
    let mut wanted = vec![vec![0.0; rows * q_dim]; shape.layers];
    for (layer, [q, k, v]) in layers.iter().enumerate() {
        let mut at = 0;
        for (both, n) in all.iter_mut() {
            let cut = |width: usize| at * width..(at + *n) * width;
            let out = &mut wanted[layer][cut(q_dim)];
            both.host.attend_into(layer, &q[cut(q_dim)], &k[cut(kv_dim)], &v[cut(kv_dim)], out)?;
            at += *n;
        }
    }
    for (both, n) in all.iter_mut() {
        both.host.finish_step()?;
        both.device.begin(*n)?;
    }
    let out = Memory::new(&device.driver, rows * q_dim * 4)?;
    let precise = all[0].0.device.parts_mut()[0].method().precise;
    let low = if precise { out.address() + (rows * q_dim * 2) as u64 } else { 0 };
    let (mut found, mut top) = (Outputs::default(), 0f32);
    {
        let caches = all.iter_mut().map(|(both, n)| (&mut both.device.parts_mut()[0], *n)).collect();
        let mut group = GroupStep::new(device, caches, room)?;
        let mut before: Option<[Memory; 3]> = None;
        for (states, wanted) in layers.iter().zip(&wanted).enumerate().map(|(layer, (s, w))| ((layer, s), w))
        {
            let (layer, [q, k, v]) = states;
            let memory = |x: &Vec<f32>| Memory::of(&device.driver, bytes_of(x));
            let now = [memory(q)?, memory(k)?, memory(v)?];
            let of =
                |m: &[Memory; 3]| DeviceStates { q: m[0].address(), k: m[1].address(), v: m[2].address() };
            group.attend(layer, of(&now), Acts { high: out.address(), low })?;
            group.store(layer, of(&now), of(before.as_ref().unwrap_or(&now)))?;
            let mut got = vec![0u16; rows * q_dim * 2];
            device.driver.download(out.address(), bytes_of_mut(&mut got))?;
            let (high, low) = got.split_at(rows * q_dim);
            for ((high, low), want) in high.iter().zip(low).zip(wanted) {
                let left = if precise { f16::from_bits(*low).to_f32() } else { 0.0 };
                let off = difference(f16::from_bits(*high).to_f32() + left, *want);
                found.largest = found.largest.max(off);
                found.off += f64::from(off).powi(2);
                found.all += f64::from(*want).powi(2);
                top = top.max(want.abs());
            }
            before = Some(now);
        }
    }
    all.iter_mut().try_for_each(|(both, _)| both.device.end())?;
    found.largest /= top;
    Ok(found)
}

/// Of numbers that are none at all an infinite one.
fn difference(a: f32, b: f32) -> f32 {
    let d = (a - b).abs();
    if d.is_nan() { f32::INFINITY } else { d }
}

/// How restored states differ.
#[derive(Debug, Default)]
struct States {
    largest: f32,
    apart: usize,
    all: usize,
}

impl States {
    /// Adds those of a sequence.
    fn compare(&mut self, both: &Both, shape: &ModelShape) -> Result<()> {
        for layer in 0..shape.layers {
            let (want, got) = (both.host.restored(layer)?, both.device.restored(layer)?);
            if want.positions != got.positions {
                self.largest = f32::INFINITY;
            }
            for (want, got) in [(want.keys, got.keys), (want.values, got.values)] {
                let top = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                let differences = want.iter().zip(&got).map(|(a, b)| difference(*a, *b) / top);
                let worst = differences.clone().fold(0.0, f32::max);
                self.largest = self.largest.max(if want.len() == got.len() { worst } else { f32::INFINITY });
                self.apart += differences.filter(|d| *d > 1e-3).count();
                self.all += want.len();
            }
        }
        Ok(())
    }
}

/// Bytes per second that a copy on the device reads and writes.
///
/// # Errors
/// No memory.
pub fn copy_bandwidth(device: &Device, bytes: usize) -> Result<f64> {
    let (from, to) = (Memory::new(&device.driver, bytes)?, Memory::new(&device.driver, bytes)?);
    let rounds = 10;
    let run = || -> Result<()> {
        (0..rounds).try_for_each(|_| device.driver.copy(to.address(), from.address(), bytes))?;
        device.driver.synchronise()
    };
    run()?;
    let start = Instant::now();
    run()?;
    Ok((2 * bytes * rounds) as f64 / start.elapsed().as_secs_f64())
}

/// How fast decode attention is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Seconds of one layer, for all sequences.
    pub seconds: f64,
    /// Bytes of the cache that a layer reads, of all sequences.
    pub bytes: f64,
    /// Bytes held, of all layers and sequences.
    pub held: usize,
}

/// Times decode attention of `batch` sequences of `context` tokens, of random states.
///
/// # Errors
/// A method without kernels, no memory.
pub fn time_attention(
    device: &Arc<Device>,
    spec: &CacheSpec,
    shape: &ModelShape,
    batch: usize,
    context: usize,
) -> Result<Reading> {
    let made = resources(spec, shape, None)?;
    let arithmetic = Arithmetic { act: Act::F16, precise: false };
    let ops = Ops::new(device, Act::F16)?;
    let mut room = Workspace::new(device)?;
    let chunk = context.min(4096);
    let rows = chunk.max(batch);
    let states = |layers: usize| -> Result<Vec<[Memory; 3]>> {
        (0..layers)
            .map(|layer| {
                let widths = [shape.heads * shape.head_dim, shape.kv_dim(), shape.kv_dim()];
                let mut out = Vec::new();
                for (i, width) in widths.into_iter().enumerate() {
                    let memory = Memory::new(&device.driver, rows * width * 4)?;
                    ops.noise(&memory, (layer * 3 + i) as u32, 1.0, true)?;
                    out.push(memory);
                }
                <[Memory; 3]>::try_from(out).map_err(|_| unreachable!("three"))
            })
            .collect()
    };
    let states = states(2)?;
    let of = |layer: usize| {
        let [q, k, v] = &states[layer % 2];
        DeviceStates { q: q.address(), k: k.address(), v: v.address() }
    };
    let parts = [(device.clone(), 0..shape.layers)];
    let mut caches = Vec::new();
    for _ in 0..batch {
        let mut cache = DeviceCache::new(&parts, spec, shape, arithmetic, &made)?;
        let mut left = context;
        while left > 0 {
            let tokens = left.min(chunk);
            cache.begin(tokens)?;
            let mut group = GroupStep::new(device, vec![(&mut cache.parts_mut()[0], tokens)], &mut room)?;
            for layer in 0..shape.layers {
                group.store(layer, of(layer), of(layer + 1))?;
            }
            drop(group);
            cache.end()?;
            left -= tokens;
        }
        caches.push(cache);
    }
    let held: usize = caches.iter().map(|cache| cache.footprint().total()).sum();
    for cache in &mut caches {
        cache.begin(1)?;
    }
    let room_for_out = Memory::new(&device.driver, batch * shape.heads * shape.head_dim * 2)?;
    let out = Acts { high: room_for_out.address(), low: 0 };
    let step = caches.iter_mut().map(|cache| (&mut cache.parts_mut()[0], 1)).collect();
    let group = GroupStep::new(device, step, &mut room)?;
    let run = |rounds: usize| -> Result<()> {
        for layer in (0..shape.layers).cycle().take(rounds) {
            group.attend(layer, of(layer), out)?;
        }
        device.driver.synchronise()
    };
    let rounds = 5 * shape.layers;
    run(rounds)?;
    let start = Instant::now();
    run(rounds)?;
    let seconds = start.elapsed().as_secs_f64() / rounds as f64;
    let stores = group.stores() as f64;
    Ok(Reading { seconds, bytes: held as f64 / stores, held })
}

/// Every file of kernels in every specialisation that caches of `specs` have in models of `shapes`.
///
/// # Errors
/// A method without kernels; no memory on `device`, to which latents' maps go.
pub fn sources(device: &Device, specs: &[&str], shapes: &[ModelShape]) -> Result<Vec<Source>> {
    let mut all = Vec::new();
    for act in [Act::F16, Act::Bf16] {
        all.push(crate::ops::source(act));
    }
    for (spec, shape) in specs.iter().flat_map(|spec| shapes.iter().map(move |shape| (spec, shape))) {
        let spec = CacheSpec::parse(spec).map_err(minicache_core::Error::from)?;
        let arithmetic = Arithmetic { act: Act::F16, precise: false };
        let made = resources(&spec, shape, None)?;
        let method = Method::new(device, &spec, shape, 0..shape.layers, arithmetic, &made)?;
        all.extend(method.files().iter().map(|file| method.source(*file)));
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|source| seen.insert(source.clone()));
    Ok(all)
}
