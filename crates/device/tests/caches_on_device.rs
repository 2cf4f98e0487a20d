//! Caches on the emulated device against the host's, on random states: ragged steps, forks, windows, and every way to
//! store.
#![allow(clippy::unwrap_used)]

#[path = "caches_on_device/evicting.rs"]
mod evicting;

use std::sync::Arc;

use minicache_core::settings::ModelShape;
use minicache_core::{
    Backend, CacheSpec, Host, KvCache, METHODS, Resources, Rotary, Sequence, States, build,
};
use minicache_device::check::compare;
use minicache_device::driver::{Act, Driver};
use minicache_device::{Arithmetic, Device, DeviceCache, Devices, Emulated, Result};

fn device() -> Arc<Device> {
    let driver: Arc<dyn Driver> = Arc::new(Emulated::new(0, 1 << 30).unwrap());
    Device::new(driver)
}

/// The device that has all layers, computed in f32 or in halves.
fn devices(shape: &ModelShape, precise: bool) -> Devices {
    Devices::new(vec![(device(), 0..shape.layers)], Arithmetic { act: Act::F16, precise })
}

fn on(device: &Arc<Device>, spec: &CacheSpec, shape: &ModelShape) -> Result<DeviceCache> {
    with(device, spec, shape, &Resources::default())
}

fn with(
    device: &Arc<Device>,
    spec: &CacheSpec,
    shape: &ModelShape,
    resources: &Resources,
) -> Result<DeviceCache> {
    let parts = [(device.clone(), 0..shape.layers)];
    DeviceCache::new(&parts, spec, shape, Arithmetic { act: Act::F16, precise: false }, resources)
}

/// Attends on both sides with queries, keys and values; the largest difference of the outputs.
fn attended_apart(
    host: &mut dyn KvCache,
    there: &mut dyn KvCache,
    layer: usize,
    [q, k, v]: [&[f32]; 3],
) -> f32 {
    let (mut want, mut got) = (vec![0.0; q.len()], vec![0.0; q.len()]);
    host.attend_into(layer, q, k, v, &mut want).unwrap();
    there.attend_into(layer, q, k, v, &mut got).unwrap();
    want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Whether this is left out under the sanitizer, with which everything takes ten times as long: where numbers lie goes by
/// the same formulas in heads of 8 and 24 numbers.
fn is_too_long(shape: &ModelShape) -> bool {
    shape.head_dim >= 64 && std::env::var_os("MINICACHE_EMULATED_FLAGS").is_some()
}

/// Prefills, ragged steps and a fork with one method.
fn check(spec: &str, shape: &ModelShape) {
    if is_too_long(shape) {
        return;
    }
    let spec = CacheSpec::parse(spec).unwrap();
    let found = compare(&devices(shape, true), &spec, shape).unwrap();
    let what = format!("{spec:?} with heads of {}: {found:?}", shape.head_dim);
    let same = if spec.name() == "latent" { found.apart < 1e-4 } else { found.states < 2e-3 };
    assert!(found.outputs < 1e-3 && same, "{what}");
    assert!(found.bytes == 1.0 && found.truncation.is_none() && !found.stuck, "{what}");
    // Pieces of memory are multiples of 256 bytes, and tables have room for 16 addresses at least.
    assert!(found.allocated.is_some_and(|times| times < 1.3), "{what}");
}

const SMALL: ModelShape =
    ModelShape { layers: 4, heads: 4, kv_heads: 2, head_dim: 8, scale: 0.35, ..ModelShape::PLAIN };
const ODD: ModelShape =
    ModelShape { layers: 2, heads: 3, kv_heads: 1, head_dim: 24, scale: 0.2, ..ModelShape::PLAIN };
const WIDE: ModelShape =
    ModelShape { layers: 2, heads: 2, kv_heads: 2, head_dim: 128, scale: 0.09, ..ModelShape::PLAIN };

#[test]
fn floats() {
    let halves = compare(&devices(&SMALL, false), &CacheSpec::default(), &SMALL).unwrap();
    assert!(halves.outputs < 2e-3, "{halves:?}");
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
    check(
        "{ method = \"kivi\", quant = { bits = 2, group = 32, residual = 16, keys = \"token\", values = \"channel\" } }",
        &ODD,
    );
    check("kivi-4", &ModelShape { window: Some(50), ..SMALL });
}

/// Queries and probabilities of one byte, which are rounded relative to other blocks than on the host: coarser than those of
/// two, and by no more than a byte is.
#[test]
fn rounded_activations() {
    for spec in
        ["{ method = \"kivi\", activation_bits = BITS }", "{ method = \"latent\", activation_bits = BITS }"]
    {
        let of = |bits: &str| {
            let spec = CacheSpec::parse(&spec.replace("BITS", bits)).unwrap();
            compare(&devices(&SMALL, true), &spec, &SMALL).unwrap()
        };
        let (fine, coarse) = (of("16"), of("8"));
        assert!(fine.outputs < 2e-3 && coarse.outputs > 2.0 * fine.outputs, "{fine:?} {coarse:?}");
        assert!(coarse.spread < 0.03, "{coarse:?}");
    }
}

#[test]
fn merged() {
    for method in ["mean", "max_norm", "minicache", "rank_one", "minicache-4", "minicache-2"] {
        check(method, &SMALL);
    }
    check("{ method = \"minicache\", granularity = \"head\", start_layer = 0, sinks = 3 }", &SMALL);
    check(
        "{ method = \"minicache\", start_layer = 1, retention = { rule = \"top_fraction\", gamma = 0.2, joint = true } }",
        &SMALL,
    );
    check(
        "{ method = \"minicache\", retention = { rule = \"as_printed\", gamma = 0.3 }, magnitudes = \"f32\", merge = \"values\" }",
        &SMALL,
    );
    check(
        "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, group = 32, residual = 32 } }",
        &WIDE,
    );
    check("minicache-4", &ModelShape { window: Some(50), ..SMALL });
    check("minicache-2", &ModelShape { heads: 4, kv_heads: 4, ..WIDE });
    check("minicache-2", &ModelShape { window: Some(60), head_dim: 64, scale: 0.125, ..SMALL });
}

#[test]
fn latents() {
    // The host rounds probabilities to 16 bits unless it is told otherwise, and so is itself a thousandth off.
    check("{ method = \"latent\", activation_bits = 24 }", &SMALL);
    check("latent-2", &ModelShape { window: Some(50), ..SMALL });
    check(
        "{ method = \"latent\", residual = 20, sinks = 3, k = { heads = \"all\" }, v = { heads = \"all\" } }",
        &SMALL,
    );
    check("{ method = \"latent\", k = { rate = 3.0 }, v = { rate = 2.5, group = 2 } }", &SMALL);
    check(
        "{ method = \"latent\", k = { bits = 16, group = 1 }, v = { bits = 16, rank = 21 }, sinks = 0 }",
        &ODD,
    );
    check(
        "{ method = \"latent\", dtype = \"f32\", activation_bits = 24, k = { bits = 8, group = 2 }, v = { bits = 3, group = 2 } }",
        &WIDE,
    );
}

#[test]
fn latents_of_a_trellis() {
    let rates = |k: f32, v: f32| {
        format!(
            "{{ method = \"latent\", k = {{ rate = {k}, trellis = true }}, v = {{ rate = {v}, trellis = true }} }}"
        )
    };
    check(&rates(2.0, 1.5), &SMALL);
    check(&rates(1.0, 3.0), &SMALL);
    check(&rates(3.0, 1.0), &ODD);
}

/// A method at a time on the host, many sequences together, is what each comes to for itself: to the last digit.
#[test]
fn the_host_is_a_backend() {
    let needs = |name: &str| ["xkv", "latent"].contains(&name);
    for method in METHODS.iter().filter(|method| !needs(method.name)) {
        let spec = (method.default)();
        let found = compare(&Host, &spec, &SMALL).unwrap();
        let what = format!("{spec:?}: {found:?}");
        assert!(found.outputs == 0.0 && found.states == 0.0 && found.apart == 0.0, "{what}");
        assert!(found.bytes == 1.0 && found.truncation.is_none() && !found.stuck, "{what}");
        assert_eq!(found.allocated, None);
    }
}

/// The layers of a model on two devices, pairs of them on either.
#[test]
fn two_devices() {
    let other = Device::new(Arc::new(Emulated::new(1, 1 << 30).unwrap()));
    let parts = vec![(device(), 0..2), (other, 2..4)];
    let devices = Devices::new(parts, Arithmetic { act: Act::F16, precise: true });
    for spec in ["minicache-4", "kivi-2", "h2o", "{ method = \"minicache\", start_layer = 0 }"] {
        let spec = CacheSpec::parse(spec).unwrap();
        let found = compare(&devices, &spec, &SMALL).unwrap();
        let what = format!("{spec:?}: {found:?}");
        assert!(found.outputs < 1e-3 && found.states < 2e-3, "{what}");
        assert!(found.truncation.is_none() && found.stuck == spec.drops_tokens(), "{what}");
    }
}

/// Steps that no backend begins, on one of them; the sequences go on.
fn refusals<B: Backend>(backend: &B) -> [String; 3] {
    let sequence = |shape: &ModelShape| {
        let cache = backend.cache(&CacheSpec::by_name("kivi-4").unwrap(), shape, &Resources::default());
        Sequence::new(cache.unwrap())
    };
    let (mut a, mut b) = (sequence(&SMALL), sequence(&ModelShape { heads: SMALL.kv_heads, ..SMALL }));
    let refused = |step: minicache_core::Result<B::Step<'_>>| step.err().map(|e| e.to_string());
    let all = [
        refused(backend.begin(vec![])),
        refused(backend.begin(vec![(&mut a, 0)])),
        refused(backend.begin(vec![(&mut a, 1), (&mut b, 1)])),
    ];
    backend.begin(vec![(&mut a, 1)]).unwrap();
    all.map(Option::unwrap)
}

#[test]
fn backends_refuse_the_same_steps() {
    let host = refusals(&Host);
    for (refused, what) in host.iter().zip(["sequences of a step", "tokens of a step", "one shape"]) {
        assert!(refused.contains(what), "{refused}");
    }
    assert_eq!(host, refusals(&devices(&SMALL, true)));
}

/// As whoever has states of their own uses a cache, in place of a decoder on the device.
#[test]
fn states_of_the_host_are_carried_over() {
    let device = device();
    for spec in ["minicache-4", "kivi-2", "{ method = \"minicache\", start_layer = 0 }"] {
        let spec = CacheSpec::parse(spec).unwrap();
        let mut host = build(&spec, &SMALL, &Resources::default()).unwrap();
        let mut there = on(&device, &spec, &SMALL).unwrap();
        let (q_dim, kv_dim) = (SMALL.heads * SMALL.head_dim, SMALL.kv_dim());
        for tokens in [60, 1, 1, 12, 1] {
            for layer in 0..SMALL.layers {
                let wave =
                    |n: usize, w: f32| (0..n).map(|i| ((i + layer) as f32 * w).sin()).collect::<Vec<_>>();
                let (q, k, v) =
                    (wave(tokens * q_dim, 0.37), wave(tokens * kv_dim, 0.73), wave(tokens * kv_dim, 0.91));
                let worst = attended_apart(&mut *host, &mut there, layer, [&q, &k, &v]);
                assert!(worst < 1e-3, "{spec:?}: {worst}");
            }
            host.finish_step().unwrap();
            there.finish_step().unwrap();
        }
        assert_eq!(host.len(), there.len());
        let (want, got) = (host.restored(3).unwrap(), there.restored(3).unwrap());
        let worst = want.keys.iter().zip(&got.keys).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-3, "{spec:?}: {worst}");
    }
}

#[test]
fn what_has_no_kernels_says_so() {
    let device = device();
    for (spec, part) in [("fp8", "`fp8`"), ("{ method = \"minicache\", residual = 8 }", "residual")] {
        let spec = CacheSpec::parse(spec).unwrap();
        let message = on(&device, &spec, &SMALL).unwrap_err().to_string();
        assert!(message.contains(part) && message.ends_with("has no kernels for a device"), "{message}");
    }
}
