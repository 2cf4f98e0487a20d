//! Checks of a device: its caches against the host's, and how fast it reads them.

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use minicache_core::{CacheSpec, KvCache, ModelShape, Resources, build};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::driver::{Act, Acts, Memory, bytes_of};
use crate::kernels::Source;
use crate::method::Method;
use crate::ops::Ops;
use crate::{Arithmetic, Device, DeviceCache, DeviceStates, GroupStep, Result, Workspace};

/// What [`compare`] found: the largest differences, relative to the largest number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Of attention's outputs.
    pub outputs: f32,
    /// Of the states that attention sees.
    pub states: f32,
    /// Bytes of the cache on the device over those on the host.
    pub bytes: f64,
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

/// Takes sequences with caches of `spec` through a long prefill, ragged steps, a fork and single tokens, on random states,
/// on `device` and on the host.
///
/// # Errors
/// A method without kernels, errors of the device.
pub fn compare(device: &Arc<Device>, spec: &CacheSpec, shape: &ModelShape) -> Result<Comparison> {
    let arithmetic = Arithmetic { act: Act::F16, precise: false };
    let new = || -> Result<Both> {
        let host = build(spec, shape, &Resources::default())?;
        let parts = [(device.clone(), 0..shape.layers)];
        Ok(Both { host, device: DeviceCache::new(&parts, spec, shape, arithmetic)? })
    };
    let mut room = Workspace::new(device)?;
    let (mut a, mut b) = (new()?, new()?);
    let (mut outputs, mut states, mut seed) = (0f32, 0f32, 0);
    let mut run = |all: &mut [(&mut Both, usize)]| -> Result<()> {
        seed += 1;
        outputs = outputs.max(step(device, &mut room, all, shape, seed)?);
        Ok(())
    };
    run(&mut [(&mut a, 75)])?;
    states = states.max(restored(&a, shape)?);
    run(&mut [(&mut a, 1), (&mut b, 33)])?;
    let mut c = a.fork()?;
    // Beyond a tile of attention, and more than one part of the positions.
    run(&mut [(&mut a, 220), (&mut b, 1), (&mut c, 1)])?;
    for _ in 0..20 {
        run(&mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)])?;
    }
    for both in [&a, &b, &c] {
        states = states.max(restored(both, shape)?);
    }
    let bytes = a.device.footprint().total() as f64 / a.host.footprint().total() as f64;
    Ok(Comparison { outputs, states, bytes })
}

/// States of a layer: like those of the layer before, so that merging has something to share, some of them not.
fn noise(rng: &mut ChaCha8Rng, n: usize, before: &[f32]) -> Vec<f32> {
    let mut x: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
    if before.len() == n {
        x.iter_mut().zip(before).for_each(|(x, b)| *x = 0.3 * *x + 1.2 * b);
    }
    x
}

/// One step of all sequences; gives the largest difference of their outputs, relative to the largest output.
fn step(
    device: &Arc<Device>,
    room: &mut Workspace,
    all: &mut [(&mut Both, usize)],
    shape: &ModelShape,
    seed: u64,
) -> Result<f32> {
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
    let out = Memory::new(&device.driver, rows * q_dim * 2)?;
    let (mut worst, mut largest) = (0f32, 0f32);
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
            group.attend(layer, of(&now), Acts { high: out.address(), low: 0 })?;
            group.store(layer, of(&now), of(before.as_ref().unwrap_or(&now)))?;
            let mut got = vec![0u8; rows * q_dim * 2];
            device.driver.download(out.address(), &mut got)?;
            for (got, want) in got.as_chunks().0.iter().zip(wanted) {
                worst = worst.max(difference(f16::from_le_bytes(*got).to_f32(), *want));
                largest = largest.max(want.abs());
            }
            before = Some(now);
        }
    }
    all.iter_mut().for_each(|(both, _)| both.device.end());
    Ok(worst / largest)
}

/// Of numbers that are none at all an infinite one.
fn difference(a: f32, b: f32) -> f32 {
    let d = (a - b).abs();
    if d.is_nan() { f32::INFINITY } else { d }
}

/// The largest difference of restored states.
fn restored(both: &Both, shape: &ModelShape) -> Result<f32> {
    let mut all = 0f32;
    for layer in 0..shape.layers {
        let (want, got) = (both.host.restored(layer)?, both.device.restored(layer)?);
        if want.positions != got.positions {
            return Ok(f32::INFINITY);
        }
        for (want, got) in [(want.keys, got.keys), (want.values, got.values)] {
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            let worst = want.iter().zip(&got).map(|(a, b)| difference(*a, *b)).fold(0.0, f32::max);
            all = all.max(if want.len() == got.len() { worst / largest } else { f32::INFINITY });
        }
    }
    Ok(all)
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
        let mut cache = DeviceCache::new(&parts, spec, shape, arithmetic)?;
        let mut left = context;
        while left > 0 {
            let tokens = left.min(chunk);
            cache.begin(tokens)?;
            let mut group = GroupStep::new(device, vec![(&mut cache.parts_mut()[0], tokens)], &mut room)?;
            for layer in 0..shape.layers {
                group.store(layer, of(layer), of(layer + 1))?;
            }
            drop(group);
            cache.end();
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
/// A method without kernels.
pub fn sources(specs: &[&str], shapes: &[ModelShape]) -> Result<Vec<Source>> {
    let mut all = Vec::new();
    for act in [Act::F16, Act::Bf16] {
        all.push(crate::ops::source(act));
    }
    for (spec, shape) in specs.iter().flat_map(|spec| shapes.iter().map(move |shape| (spec, shape))) {
        let spec = CacheSpec::parse(spec).map_err(minicache_core::Error::from)?;
        let arithmetic = Arithmetic { act: Act::F16, precise: false };
        let method = Method::new(&spec, shape, 0..shape.layers, arithmetic)?;
        all.extend(method.files().iter().map(|file| method.source(*file)));
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|source| seen.insert(source.clone()));
    Ok(all)
}
