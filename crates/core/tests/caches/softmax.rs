//! What today's models have in their softmax: capped scores, learned sinks, and windows in some layers only.

use minicache_core::settings::LayerSet;
use minicache_core::{ModelShape, States, build};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::numbers::all;
use crate::{close, random_states, reference, shape};

#[test]
fn attention_is_by_its_definition_with_caps_sinks_and_windows_of_some_layers() {
    let plain = shape(2, 2, 32, Some(40));
    let every_second: LayerSet = [1, 3].into_iter().collect();
    let shapes = [
        ModelShape { softcap: Some(0.3), window: None, ..plain },
        ModelShape { full_layers: every_second, ..plain },
    ];
    for (nth, shape) in shapes.into_iter().enumerate() {
        for (spec, resources) in all(&shape) {
            // Heads may then hold different numbers of tokens, which `restored` cannot show.
            if spec.needs_attention() && nth == 1 {
                continue;
            }
            let mut rng = StdRng::seed_from_u64(12);
            let mut cache = build(&spec, &shape, &resources).unwrap();
            for tokens in [90, 1, 1, 30, 1] {
                let len = cache.len();
                for layer in 0..shape.layers {
                    let sinks: Vec<f32> = (0..shape.heads).map(|_| rng.random_range(-2.0..2.0)).collect();
                    let s = random_states(&mut rng, &shape, tokens);
                    let want = reference(&shape, layer, &cache.restored(layer).unwrap(), len, &s, &sinks);
                    let mut out = vec![0.0; s.q.len()];
                    let states = States { sink_scores: &sinks, ..States::new(&s.q, &s.k, &s.v) };
                    states.check(&shape, layer, len, &out).unwrap();
                    let mut received = Vec::new();
                    cache.attend_held(layer, states, &mut out, &mut received).unwrap();
                    cache.store(layer, states, &received).unwrap();
                    // Coarse where activations are rounded to 8 bits.
                    let what = format!("{}, layer {layer}, {tokens} tokens at {len}", spec.label());
                    close(&out, &want, 2e-2, &what);
                }
                cache.finish_step().unwrap();
            }
        }
    }
}

#[test]
fn layers_with_a_window_drop_what_has_left_it_and_others_do_not() {
    let shape = ModelShape { full_layers: [1].into_iter().collect(), ..shape(2, 2, 32, Some(40)) };
    let mut rng = StdRng::seed_from_u64(13);
    let spec = minicache_core::CacheSpec::default();
    let mut cache = build(&spec, &shape, &Default::default()).unwrap();
    for _ in 0..30 {
        for layer in 0..shape.layers {
            let s = random_states(&mut rng, &shape, 20);
            cache.append(layer, &s.k, &s.v).unwrap();
        }
        cache.finish_step().unwrap();
    }
    let held = |layer| cache.restored(layer).unwrap().positions.len();
    assert_eq!([0, 1, 2, 3].map(held), [39, 600, 39, 39]);
    let whole = ModelShape { window: None, ..shape }.full_bytes(600);
    let (full, footprint) = (shape.full_bytes(600), cache.footprint().total());
    assert_eq!(full, whole / 4 / 600 * (600 + 3 * 40));
    assert!(footprint < whole / 2 && footprint > whole / 4, "{footprint} of {whole}");
    let counted = minicache_core::footprint(&spec, &shape, &Default::default(), 600, Default::default());
    assert!(counted.unwrap().total().abs_diff(footprint) < footprint / 3);
}
