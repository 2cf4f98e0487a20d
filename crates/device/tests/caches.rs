//! Caches on the emulated device against the host's, on random states: ragged steps, forks, windows, and every way to
//! store.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use half::f16;
use minicache_core::settings::ModelShape;
use minicache_core::{CacheSpec, KvCache, Resources, build};
use minicache_device::driver::{Act, Driver, Memory};
use minicache_device::{Device, DeviceCache, DeviceStates, Emulated, GroupStep, Workspace};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn device() -> Arc<Device> {
    let driver: Arc<dyn Driver> = Arc::new(Emulated::new(0, 1 << 30).unwrap());
    Device::new(driver)
}

/// A sequence on both sides.
struct Both {
    host: Box<dyn KvCache>,
    device: Box<dyn KvCache>,
}

impl Both {
    fn new(device: &Arc<Device>, spec: &CacheSpec, shape: &ModelShape) -> Self {
        let host = build(spec, shape, &Resources::default()).unwrap();
        Self { host, device: Box::new(device.cache(spec, shape, Act::F16).unwrap()) }
    }

    fn fork(&self) -> Self {
        Self { host: self.host.fork(), device: self.device.fork() }
    }
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// States of `rows` rows of a layer: like those of the layer before, so that merging has something to share, some of them
/// not.
fn states(rng: &mut ChaCha8Rng, n: usize, before: &[f32]) -> Vec<f32> {
    let mut x: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
    if before.len() == n {
        x.iter_mut().zip(before).for_each(|(x, b)| *x = 0.3 * *x + 1.2 * b);
    }
    x
}

/// One step of all sequences; gives the largest difference of their outputs, relative to the largest output.
fn step(device: &Arc<Device>, room: &mut Workspace, all: &mut [(&mut Both, usize)], shape: &ModelShape, seed: u64) -> f32 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rows: usize = all.iter().map(|(_, n)| n).sum();
    let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
    let memory = |x: &[f32]| Memory::of(&device.driver, &bytes(x)).unwrap();
    let out = Memory::new(&device.driver, rows * q_dim * 2).unwrap();
    let mut layers = Vec::new();
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for _ in 0..shape.layers {
        let q = states(&mut rng, rows * q_dim, &[]);
        (k, v) = (states(&mut rng, rows * kv_dim, &k), states(&mut rng, rows * kv_dim, &v));
        layers.push((q, k.clone(), v.clone()));
    }
    let (mut worst, mut largest) = (0f32, 0f32);
    let mut wanted = vec![vec![0.0; rows * q_dim]; shape.layers];
    for (layer, (q, k, v)) in layers.iter().enumerate() {
        let mut at = 0;
        for (both, n) in all.iter_mut() {
            let (rows, end) = (at, at + *n);
            both.host
                .attend_into(
                    layer,
                    &q[rows * q_dim..end * q_dim],
                    &k[rows * kv_dim..end * kv_dim],
                    &v[rows * kv_dim..end * kv_dim],
                    &mut wanted[layer][rows * q_dim..end * q_dim],
                )
                .unwrap();
            at = end;
        }
    }
    all.iter_mut().for_each(|(both, _)| both.host.finish_step().unwrap());

    let caches = all
        .iter_mut()
        .map(|(both, n)| (both.device.as_any_mut().unwrap().downcast_mut::<DeviceCache>().unwrap(), *n))
        .collect();
    let mut group = GroupStep::begin(device, caches, room).unwrap();
    let mut before = None;
    for (layer, (q, k, v)) in layers.iter().enumerate() {
        let now = [memory(q), memory(k), memory(v)];
        let [q, k, v] = [0, 1, 2].map(|i: usize| now[i].address());
        let states = DeviceStates { q, k, v };
        group.attend(layer, states, out.address()).unwrap();
        let last = before.as_ref().map_or(states, |m: &[Memory; 3]| {
            let [q, k, v] = [0, 1, 2].map(|i: usize| m[i].address());
            DeviceStates { q, k, v }
        });
        group.store(layer, states, last).unwrap();
        before = Some(now);
        let mut got = vec![0u8; rows * q_dim * 2];
        device.driver.download(out.address(), &mut got).unwrap();
        for (got, want) in got.chunks_exact(2).zip(&wanted[layer]) {
            let got = f16::from_le_bytes([got[0], got[1]]).to_f32();
            worst = worst.max((got - want).abs());
            largest = largest.max(want.abs());
        }
    }
    group.finish().unwrap();
    worst / largest
}

fn compare_restored(both: &Both, shape: &ModelShape, what: &str) {
    for layer in 0..shape.layers {
        let (want, got) = (both.host.restored(layer).unwrap(), both.device.restored(layer).unwrap());
        assert_eq!(want.positions, got.positions, "{what}, layer {layer}");
        for (side, want, got) in [("keys", want.keys, got.keys), ("values", want.values, got.values)] {
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            let apart = |(w, g): &(&f32, &f32)| (*w - *g).abs() > 2e-3 * largest;
            let first = want.iter().zip(&got).position(|pair| apart(&pair));
            let count = want.iter().zip(&got).filter(apart).count();
            assert!(
                first.is_none(),
                "{what}, layer {layer}, {side}: {count} of {} differ, the first at {:?}: {:?} {:?}",
                want.len(),
                first.map(|i| (i / shape.kv_dim(), i % shape.kv_dim())),
                first.map(|i| want[i]),
                first.map(|i| got[i]),
            );
        }
    }
}

/// Prefills, ragged steps and a fork with one method.
fn check(spec: &str, shape: &ModelShape) {
    let device = device();
    let spec = CacheSpec::parse(spec).unwrap();
    let what = format!("{spec:?} with heads of {}", shape.head_dim);
    let mut room = Workspace::new(&device).unwrap();
    let (mut a, mut b) = (Both::new(&device, &spec, shape), Both::new(&device, &spec, shape));
    let mut seed = 0;
    let mut run = |all: &mut [(&mut Both, usize)]| {
        seed += 1;
        let worst = step(&device, &mut room, all, shape, seed);
        assert!(worst < 1e-3, "{what}: outputs differ by {worst} in step {seed}");
    };
    run(&mut [(&mut a, 75)]);
    compare_restored(&a, shape, &what);
    run(&mut [(&mut a, 1), (&mut b, 33)]);
    let mut c = a.fork();
    run(&mut [(&mut a, 70), (&mut b, 1), (&mut c, 1)]);
    for _ in 0..20 {
        run(&mut [(&mut a, 1), (&mut b, 1), (&mut c, 1)]);
    }
    for both in [&a, &b, &c] {
        compare_restored(both, shape, &what);
    }
}

const SMALL: ModelShape = ModelShape { layers: 4, heads: 4, kv_heads: 2, head_dim: 8, scale: 0.35, ..ModelShape::PLAIN };
const ODD: ModelShape = ModelShape { layers: 2, heads: 3, kv_heads: 1, head_dim: 24, scale: 0.2, ..ModelShape::PLAIN };
const WIDE: ModelShape = ModelShape { layers: 2, heads: 2, kv_heads: 2, head_dim: 128, scale: 0.09, ..ModelShape::PLAIN };

#[test]
fn floats() {
    check("full", &SMALL);
    check("{ method = \"full\", dtype = \"f32\" }", &ODD);
    check("full", &WIDE);
    check("full", &ModelShape { window: Some(40), softcap: Some(3.0), ..SMALL });
}

#[test]
fn codes() {
    for bits in [2, 3, 4, 8] {
        check(&format!("kivi-{bits}"), &SMALL);
        check(&format!("rtn-{bits}"), &ODD);
    }
    check("{ method = \"kivi\", quant = { bits = 4, group = 64, residual = 0 } }", &WIDE);
    check("{ method = \"kivi\", quant = { bits = 2, group = 32, residual = 16, keys = \"token\", values = \"channel\" } }", &ODD);
    check("kivi-4", &ModelShape { window: Some(50), ..SMALL });
}

#[test]
fn merged() {
    for method in ["mean", "max_norm", "minicache", "rank_one", "minicache-4", "minicache-2"] {
        check(method, &SMALL);
    }
    check("{ method = \"minicache\", granularity = \"head\", start_layer = 0, sinks = 3 }", &SMALL);
    check("{ method = \"minicache\", start_layer = 1, retention = { rule = \"top_fraction\", gamma = 0.2, joint = true } }", &SMALL);
    check("{ method = \"minicache\", retention = { rule = \"as_printed\", gamma = 0.3 }, magnitudes = \"f32\", merge = \"values\" }", &SMALL);
    check("{ method = \"minicache\", start_layer = 0, quant = { bits = 4, group = 32, residual = 32 } }", &WIDE);
    check("minicache-4", &ModelShape { window: Some(50), ..SMALL });
}

#[test]
fn what_has_no_kernels_says_so() {
    let device = device();
    for (spec, part) in [("h2o", "`h2o`"), ("{ method = \"minicache\", residual = 8 }", "residual")] {
        let spec = CacheSpec::parse(spec).unwrap();
        let message = device.cache(&spec, &SMALL, Act::F16).unwrap_err().to_string();
        assert!(message.contains(part) && message.ends_with("has no kernels for a device"), "{message}");
    }
}
