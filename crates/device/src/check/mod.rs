//! Checks of a device: its caches against the host's, and how fast it reads them.

mod basis;

use std::sync::Arc;
use std::time::Instant;

use minicache_core::{Backend, BackendStep, CacheSpec, KvCache, ModelShape, Sequence, States, build};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use self::basis::resources;
use crate::driver::{Act, Acts, Memory};
use crate::kernels::Source;
use crate::method::Method;
use crate::ops::Ops;
use crate::{Arithmetic, Device, DeviceCache, DeviceStates, Devices, Result};

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
    /// Bytes of a device's memory over those.
    pub allocated: Option<f64>,
    /// A step was given up in the middle and could not be taken back.
    pub stuck: bool,
    /// The first truncation that one side could do and the other could not, or for another reason.
    pub truncation: Option<String>,
}

/// A sequence on both sides.
struct Both {
    host: Box<dyn KvCache>,
    there: Sequence,
}

impl Both {
    fn fork(&self) -> Self {
        Self { host: self.host.fork(), there: self.there.fork() }
    }
}

/// Takes sequences with caches of `spec` through a long prefill, ragged steps, a fork, single tokens, truncations and steps
/// that are given up, on random states: together on `backend`, and each for itself on the host.
///
/// # Errors
/// A method that the backend does not have, its errors.
pub fn compare<B: Backend>(
    backend: &B,
    spec: &CacheSpec,
    shape: &ModelShape,
) -> minicache_core::Result<Comparison> {
    let made = resources(spec, shape, None)?;
    let new = || -> minicache_core::Result<Both> {
        let there = Sequence::new(backend.cache(spec, shape, &made)?);
        Ok(Both { host: build(spec, shape, &made)?, there })
    };
    let (mut a, mut b) = (new()?, new()?);
    let (mut outputs, mut states, mut seed) = (Outputs::default(), Restored::default(), 0u64);
    let mut run = |all: &mut [(&mut Both, usize)]| -> minicache_core::Result<()> {
        seed += 1;
        outputs.add(step(backend, all, shape, seed)?);
        Ok(())
    };
    run(&mut [(&mut a, 75)])?;
    states.compare(&a, shape)?;
    run(&mut [(&mut a, 1), (&mut b, 33)])?;
    let first = weighed(&a);
    let mut c = a.fork();
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
    let allocated = DeviceCache::of(&mut a.there).map(|cache| cache.allocated());
    let allocated = allocated.map(|bytes| bytes as f64 / a.host.footprint().total() as f64);
    for len in TRUNCATED.into_iter().map(|back| a.host.len() - back).chain([40, 0]) {
        let mut both = a.fork();
        let done = [both.host.truncate(len), both.there.truncate(len)].map(|d| d.map_err(|e| e.to_string()));
        if done[0] != done[1] {
            truncation
                .get_or_insert(format!("to {len} tokens: {:?} on the host, {:?} there", done[0], done[1]));
        } else if done[0].is_ok() {
            for tokens in [1, 30, 1] {
                seed += 1;
                outputs.add(step(backend, &mut [(&mut both, tokens)], shape, seed)?);
            }
            states.compare(&both, shape)?;
        }
    }
    let (mut d, mut e) = (a.fork(), b.fork());
    give_up(backend, &mut [(&mut d, 1), (&mut e, 20)], shape, seed)?;
    let mut stuck = false;
    for both in [&mut d, &mut e] {
        seed += 1;
        match step(backend, &mut [(both, 3)], shape, seed) {
            Ok(found) => outputs.add(found),
            Err(_) => stuck = true,
        }
        if !stuck {
            states.compare(both, shape)?;
        }
    }
    let (states, apart) = (states.largest, states.apart as f32 / states.all.max(1) as f32);
    let spread = (outputs.off / outputs.all).sqrt() as f32;
    Ok(Comparison { outputs: outputs.largest, spread, states, apart, bytes, allocated, truncation, stuck })
}

/// Bytes of the backend's cache over those of the host's: 1 if all parts are equal, and only then.
fn weighed(both: &Both) -> f64 {
    let (host, there) = (both.host.footprint(), both.there.footprint());
    let ratio = there.total() as f64 / host.total() as f64;
    if ratio == 1.0 && host != there { f64::INFINITY } else { ratio }
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

/// Queries, keys and values of every layer, of a step of `rows` tokens.
fn random(shape: &ModelShape, rows: usize, seed: u64) -> Vec<[Vec<f32>; 3]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
    let mut layers: Vec<[Vec<f32>; 3]> = Vec::new();
    for _ in 0..shape.layers {
        let q = noise(&mut rng, rows * q_dim, &[]);
        let last = layers.last();
        let k = noise(&mut rng, rows * kv_dim, last.map_or(&[], |l| &l[1]));
        let v = noise(&mut rng, rows * kv_dim, last.map_or(&[], |l| &l[2]));
        layers.push([q, k, v]);
    }
    layers
}

/// One step of all sequences; gives how their outputs differ.
fn step<B: Backend>(
    backend: &B,
    all: &mut [(&mut Both, usize)],
    shape: &ModelShape,
    seed: u64,
) -> minicache_core::Result<Outputs> {
    let rows: usize = all.iter().map(|(_, n)| n).sum();
    let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
    let layers = random(shape, rows, seed);
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
    let mut step = backend.begin(all.iter_mut().map(|(both, n)| (&mut both.there, *n)).collect())?;
    let (mut found, mut top) = (Outputs::default(), 0f32);
    let mut got = vec![0.0; rows * q_dim];
    for (layer, ([q, k, v], wanted)) in layers.iter().zip(&wanted).enumerate() {
        step.attend_host(layer, States::new(q, k, v), &mut got)?;
        for (got, want) in got.iter().zip(wanted) {
            let off = difference(*got, *want);
            found.largest = found.largest.max(off);
            found.off += f64::from(off).powi(2);
            found.all += f64::from(*want).powi(2);
            top = top.max(want.abs());
        }
    }
    step.finish()?;
    for (both, _) in all.iter_mut() {
        both.host.finish_step()?;
    }
    found.largest /= top;
    Ok(found)
}

/// A step of all sequences on the backend that is given up before its last layer.
fn give_up<B: Backend>(
    backend: &B,
    all: &mut [(&mut Both, usize)],
    shape: &ModelShape,
    seed: u64,
) -> minicache_core::Result<()> {
    let rows: usize = all.iter().map(|(_, n)| n).sum();
    let mut step = backend.begin(all.iter_mut().map(|(both, n)| (&mut both.there, *n)).collect())?;
    let mut out = vec![0.0; rows * shape.heads * shape.head_dim];
    let layers = random(shape, rows, seed);
    for (layer, [q, k, v]) in layers.iter().enumerate().take(shape.layers - 1) {
        step.attend_host(layer, States::new(q, k, v), &mut out)?;
    }
    Ok(())
}

/// Of numbers that are none at all an infinite one.
fn difference(a: f32, b: f32) -> f32 {
    let d = (a - b).abs();
    if d.is_nan() { f32::INFINITY } else { d }
}

/// How restored states differ.
#[derive(Debug, Default)]
struct Restored {
    largest: f32,
    apart: usize,
    all: usize,
}

impl Restored {
    /// Adds those of a sequence.
    fn compare(&mut self, both: &Both, shape: &ModelShape) -> minicache_core::Result<()> {
        for layer in 0..shape.layers {
            let (want, got) = (both.host.restored(layer)?, both.there.restored(layer)?);
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
    let devices = Devices::new(vec![(device.clone(), 0..shape.layers)], arithmetic);
    let mut caches = Vec::new();
    for _ in 0..batch {
        let mut cache = devices.empty(spec, shape, &made)?;
        let mut left = context;
        while left > 0 {
            let tokens = left.min(chunk);
            let mut step = devices.step(vec![(&mut cache, tokens)])?;
            (0..shape.layers).try_for_each(|layer| step.store(layer, of(layer)))?;
            step.end()?;
            left -= tokens;
        }
        caches.push(cache);
    }
    let held: usize = caches.iter().map(|cache| cache.footprint().total()).sum();
    let room_for_out = Memory::new(&device.driver, batch * shape.heads * shape.head_dim * 2)?;
    let out = Acts { high: room_for_out.address(), low: 0 };
    let stores = caches[0].parts()[0].method().sides[0].stores as f64;
    let step = devices.step(caches.iter_mut().map(|cache| (cache, 1)).collect())?;
    let run = |rounds: usize| -> Result<()> {
        for layer in (0..shape.layers).cycle().take(rounds) {
            step.look(layer, of(layer), out)?;
        }
        device.driver.synchronise()
    };
    let rounds = 5 * shape.layers;
    run(rounds)?;
    let start = Instant::now();
    run(rounds)?;
    let seconds = start.elapsed().as_secs_f64() / rounds as f64;
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
