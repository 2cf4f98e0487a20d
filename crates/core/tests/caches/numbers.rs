//! Which numbers caches hold: the same on any number of threads, in the type asked for, and none beyond its range.

use minicache_core::settings::StoreType;
use minicache_core::{CacheSpec, Error, KvCache, ModelShape, Resources, build, on_one_thread};
use rand::{SeedableRng, rngs::StdRng};

use crate::{LATENTS, SPECS, StepStates, latent, random_states, shape, step};

/// Every kind of cache for a shape of an even number of heads, as it is and with activations rounded to 8 bits.
pub(super) fn all(shape: &ModelShape) -> Vec<(CacheSpec, Resources)> {
    let mut out = Vec::new();
    for text in SPECS {
        out.push((CacheSpec::parse(text).unwrap(), Resources::default()));
    }
    let rounded = "{ method = \"turboquant\", bits = 3, inner_product = true, activation_bits = 8 }";
    out.push((CacheSpec::parse(rounded).unwrap(), Resources::default()));
    for text in LATENTS {
        for heads in ["1", "\"all\""] {
            let grouped = format!("{{ group = 2, heads = {heads},");
            let text =
                text.replace("k = {", &format!("k = {grouped}")).replace("v = {", &format!("v = {grouped}"));
            let resources = Resources { latent: Some(latent::plan(&text, shape)), rotary: None };
            out.push((CacheSpec::parse(&text).unwrap(), resources));
            let text = text.replace("{ method", "{ activation_bits = 8, method");
            let resources = Resources { latent: Some(latent::plan(&text, shape)), rotary: None };
            out.push((CacheSpec::parse(&text).unwrap(), resources));
        }
    }
    let rounded = |(spec, _): &(CacheSpec, Resources)| {
        spec.quantisation()?;
        let mut json = serde_json::to_value(spec).unwrap();
        json["activation_bits"] = 8.into();
        Some((serde_json::from_value(json).unwrap(), Resources::default()))
    };
    let rounded: Vec<_> = out.iter().filter_map(rounded).collect();
    out.extend(rounded);
    out
}

fn states(rng: &mut StdRng, shape: &ModelShape, tokens: usize) -> Vec<StepStates> {
    (0..shape.layers).map(|_| random_states(rng, shape, tokens)).collect()
}

fn fill(cache: &mut dyn KvCache, layers: &[StepStates]) {
    for (layer, s) in layers.iter().enumerate() {
        cache.append(layer, &s.k, &s.v).unwrap();
    }
    cache.finish_step().unwrap();
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // A window makes parts begin elsewhere; every kind of cache meets one of the two.
    for (nth, shape) in [shape(2, 2, 32, None), shape(2, 2, 32, Some(2100))].into_iter().enumerate() {
        let mut rng = StdRng::seed_from_u64(11);
        // Long enough for several parts, the last of them cut short; then steps of many tokens, of few and of one.
        let past = states(&mut rng, &shape, 2700);
        let steps = [45, 1, 3, 1].map(|tokens| states(&mut rng, &shape, tokens));
        for (spec, resources) in all(&shape).into_iter().skip(nth).step_by(2) {
            let mut filled = build(&spec, &shape, &resources).unwrap();
            fill(&mut *filled, &past);
            let run =
                |mut cache: Box<dyn KvCache>| steps.iter().map(|s| step(&mut *cache, s)).collect::<Vec<_>>();
            let want = on_one_thread(|| run(filled.fork()));
            for threads in 1..=4 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let cache = filled.fork();
                assert!(pool.install(|| run(cache)) == want, "{spec:?} with {threads} threads");
            }
        }
    }
}

#[test]
fn what_f16_cannot_hold_is_its_largest_number_in_every_cache() {
    const BEYOND: f32 = 1e5;
    let shape = shape(2, 2, 32, None);
    for (spec, resources) in all(&shape) {
        let mut rng = StdRng::seed_from_u64(12);
        let mut cache = build(&spec, &shape, &resources).unwrap();
        for tokens in [80, 1, 1, 30, 1] {
            let mut layers = states(&mut rng, &shape, tokens);
            for s in &mut layers {
                for x in [&mut s.k, &mut s.v] {
                    x.iter_mut().step_by(3).for_each(|x| *x = BEYOND.copysign(*x));
                }
            }
            for (layer, out) in step(&mut *cache, &layers).iter().enumerate() {
                assert!(out.iter().all(|x| x.is_finite()), "{spec:?}: output of layer {layer}");
            }
        }
        let f32s = spec.dtype() == StoreType::F32;
        for layer in 0..shape.layers {
            let restored = cache.restored(layer).unwrap();
            let all = restored.keys.iter().chain(&restored.values);
            let top = all.fold(0.0f32, |top, x| if x.is_nan() { f32::NAN } else { top.max(x.abs()) });
            assert!(top.is_finite() && top > 1e4, "{spec:?}: layer {layer} up to {top}");
            // What is stored as it is comes back as the nearest number that there is.
            if matches!(spec, CacheSpec::Full(_)) || spec.drops_tokens() {
                assert_eq!(top, if f32s { BEYOND } else { 65504.0 }, "{spec:?}");
            }
        }
        // NaN and infinity are still the weights' fault, and said to be.
        for bad in [f32::NAN, f32::INFINITY] {
            let mut s = random_states(&mut rng, &shape, 1);
            s.k[5] = bad;
            let mut out = vec![0.0; s.q.len()];
            let e = cache.attend_into(0, &s.q, &s.k, &s.v, &mut out).unwrap_err();
            assert!(matches!(e, Error::NotFinite { side: "key", layer: 0, .. }), "{spec:?}: {e}");
        }
    }
}

#[test]
fn states_that_are_not_quantised_are_kept_in_the_type_asked_for() {
    let shape = shape(2, 2, 32, None);
    let mut rng = StdRng::seed_from_u64(13);
    let past = states(&mut rng, &shape, 100);
    for text in [
        "full",
        "kivi-4",
        "{ method = \"rtn\", quant = { bits = 4, residual = 20 } }",
        "h2o",
        "{ method = \"sinks\", recent = 30 }",
        "{ method = \"minicache\", start_layer = 2, quant = { bits = 4 } }",
    ] {
        let spec = CacheSpec::parse(text).unwrap();
        let bytes = [StoreType::F16, StoreType::F32].map(|dtype| {
            let mut cache = build(&spec.clone().with_dtype(dtype), &shape, &Resources::default()).unwrap();
            fill(&mut *cache, &past);
            // The newest token of an unmerged layer.
            let restored = cache.restored(0).unwrap();
            let width = shape.kv_dim();
            let newest = |x: &[f32]| x[x.len() - width..].to_vec();
            let rounded = |x: &f32| match dtype {
                StoreType::F16 => half::f16::from_f32(*x).to_f32(),
                StoreType::F32 => *x,
            };
            let want = |x: &[f32]| newest(x).iter().map(rounded).collect::<Vec<_>>();
            assert_eq!(newest(&restored.keys), want(&past[0].k), "{text}, {dtype:?}");
            assert_eq!(newest(&restored.values), want(&past[0].v), "{text}, {dtype:?}");
            let held = cache.footprint();
            if spec.quantisation().is_some() { held.residual } else { held.states }
        });
        let growth = bytes[1] as f64 / bytes[0] as f64;
        assert!((1.7..=2.01).contains(&growth), "{text}: {bytes:?}");
    }
}
