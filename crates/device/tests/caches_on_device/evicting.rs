//! Methods that drop tokens: the same tokens stay as on the host.

use super::*;

/// Every method that drops tokens, with budgets of both kinds.
const ALL: [&str; 5] = [
    "sinks",
    "h2o",
    "snapkv",
    "{ method = \"h2o\", recent = 9, heavy = 11 }",
    "{ method = \"snapkv\", kept = 20, window = 8, kernel = 3 }",
];

#[test]
fn first_and_recent_tokens() {
    check("sinks", &SMALL);
    check("{ method = \"sinks\", sinks = 3, recent = 17 }", &ODD);
    check("{ method = \"sinks\", sinks = 0, recent = 40, dtype = \"f32\" }", &WIDE);
}

#[test]
fn heavy_hitters() {
    check("h2o", &SMALL);
    check("{ method = \"h2o\", recent = 9, heavy = 11, dtype = \"f32\" }", &ODD);
    check("{ method = \"h2o\", recent = 0.3, heavy = 0.33 }", &WIDE);
    check("{ method = \"h2o\", recent = 12, heavy = 30 }", &ModelShape { softcap: Some(3.0), ..SMALL });
}

#[test]
fn what_the_prompts_last_tokens_look_at() {
    check("snapkv", &SMALL);
    check("{ method = \"snapkv\", kept = 40, window = 8, kernel = 3 }", &ODD);
    check("{ method = \"snapkv\", kept = 0.5, window = 40, kernel = 9 }", &WIDE);
}

/// Heads of windowed layers hold different numbers of tokens.
#[test]
fn windows() {
    let some = ModelShape { window: Some(20), full_layers: [1].into_iter().collect(), ..SMALL };
    for spec in ALL {
        check(spec, &some);
        check(spec, &ModelShape { window: Some(50), ..SMALL });
    }
    check("{ method = \"sinks\", sinks = 5, recent = 30 }", &ModelShape { window: Some(20), ..SMALL });
}

/// Steps of every length from an empty cache on, with states that come with queries or, as from a file, without.
#[test]
fn states_of_the_host() {
    let device = device();
    for (spec, queries) in ALL.iter().flat_map(|spec| [(spec, true), (spec, false)]) {
        let spec = CacheSpec::parse(spec).unwrap();
        let mut host = build(&spec, &SMALL, &Resources::default()).unwrap();
        let mut there = on(&device, &spec, &SMALL).unwrap();
        for (step, tokens) in [1, 1, 44, 1, 300, 1, 2, 1].into_iter().enumerate() {
            for layer in 0..SMALL.layers {
                let wave = |n: usize, w: f32| -> Vec<f32> {
                    (0..n * tokens).map(|i| ((i * i % 977 + layer + 7 * step) as f32 * w).sin()).collect()
                };
                let (q, k, v) = (wave(32, 0.37), wave(16, 0.73), wave(16, 0.91));
                if !queries {
                    host.store(layer, States::new(&[], &k, &v), &[]).unwrap();
                    there.store(layer, States::new(&[], &k, &v), &[]).unwrap();
                    continue;
                }
                let (mut want, mut got) = (vec![0.0; q.len()], vec![0.0; q.len()]);
                host.attend_into(layer, &q, &k, &v, &mut want).unwrap();
                there.attend_into(layer, &q, &k, &v, &mut got).unwrap();
                let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-3, "{spec:?}, step {step}: {worst}");
            }
            host.finish_step().unwrap();
            there.finish_step().unwrap();
            for layer in 0..SMALL.layers {
                let (want, got) = (host.restored(layer).unwrap(), there.restored(layer).unwrap());
                assert_eq!(want.positions, got.positions, "{spec:?}, step {step}, layer {layer}");
                assert!(want.keys == got.keys && want.values == got.values, "{spec:?}, step {step}");
            }
        }
    }
}

/// A token's states that make it known again.
fn feed(cache: &mut dyn KvCache, len: usize, tokens: usize, seed: f32) {
    for layer in 0..SMALL.layers {
        let wave = |n: usize, w: f32| -> Vec<f32> {
            (len * n..(len + tokens) * n).map(|i| ((i * i % 1009) as f32 * w + seed).sin()).collect()
        };
        let mut out = vec![0.0; 32 * tokens];
        cache.attend_into(layer, &wave(32, 0.3), &wave(16, 0.7), &wave(16, 0.9), &mut out).unwrap();
    }
    cache.finish_step().unwrap();
}

fn feed_both(a: &mut Box<dyn KvCache>, b: &mut Box<dyn KvCache>, (len, tokens): (usize, usize), seed: f32) {
    feed(a.as_mut(), len, tokens, seed);
    feed(b.as_mut(), len, tokens, seed);
}

/// Forks go their own ways, share what neither has changed, and can begin again.
#[test]
fn forks_and_truncation() {
    let device = device();
    for spec in ALL {
        let spec = CacheSpec::parse(spec).unwrap();
        let mut host = build(&spec, &SMALL, &Resources::default()).unwrap();
        let mut there: Box<dyn KvCache> = Box::new(on(&device, &spec, &SMALL).unwrap());
        feed_both(&mut host, &mut there, (0, 90), 0.0);
        let mut forks = [host.fork(), there.fork()];
        for i in 0..6 {
            feed_both(&mut host, &mut there, (90 + i, 1), 0.0);
            let [host_fork, there_fork] = &mut forks;
            feed_both(host_fork, there_fork, (90 + i, 1), 1.5);
        }
        let [host_fork, there_fork] = &mut forks;
        for (host, there) in [(&host, &there), (host_fork, there_fork)] {
            for layer in 0..SMALL.layers {
                assert_eq!(host.restored(layer).unwrap(), there.restored(layer).unwrap(), "{spec:?}");
            }
        }
        assert!(there_fork.truncate(3).unwrap_err().to_string().contains("drops tokens for good"));
        for cache in [host_fork, there_fork] {
            cache.truncate(0).unwrap();
            assert_eq!((cache.len(), cache.footprint().total()), (0, 0));
            feed(cache.as_mut(), 0, 33, 0.2);
        }
        assert_eq!(forks[0].restored(2).unwrap(), forks[1].restored(2).unwrap());
    }
}

/// Rooms are whole blocks of 16 slots, where the host's grow by 16 from wherever a prompt ends.
#[test]
fn bytes_are_those_of_blocks() {
    let device = device();
    for (spec, held, beside) in [
        ("{ method = \"sinks\", sinks = 4, recent = 30 }", 34, 4),
        ("{ method = \"h2o\", recent = 16, heavy = 16 }", 32, 8),
        ("{ method = \"snapkv\", kept = 20, window = 8, kernel = 3 }", 23, 4),
    ] {
        let spec = CacheSpec::parse(spec).unwrap();
        let mut host = build(&spec, &SMALL, &Resources::default()).unwrap();
        let mut there: Box<dyn KvCache> = Box::new(on(&device, &spec, &SMALL).unwrap());
        for (len, tokens) in [(0, 90), (90, 1), (91, 1), (92, 1)] {
            feed_both(&mut host, &mut there, (len, tokens), 0.0);
        }
        let slots = usize::next_multiple_of(held, 16) * SMALL.layers * SMALL.kv_heads;
        let (want, got) = (host.footprint(), there.footprint());
        assert_eq!((got.states, got.state), (slots * 2 * 8 * 2, slots * beside), "{spec:?}");
        assert_eq!(got.total(), got.states + got.state);
        assert!(got.total() <= want.total() + 16 * (32 + beside) * 8, "{spec:?}: {want:?} on the host");
    }
}
