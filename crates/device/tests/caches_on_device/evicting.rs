//! Methods that drop tokens: the same tokens stay as on the host.

use super::*;

/// As [`super::check`], but for bytes, of which tests of their own tell.
fn check(spec: &str, shape: &ModelShape) {
    if is_too_long(shape) {
        return;
    }
    let spec = CacheSpec::parse(spec).unwrap();
    let found = compare(&devices(shape, true), &spec, shape).unwrap();
    let what = format!("{spec:?} with heads of {}: {found:?}", shape.head_dim);
    assert!(found.outputs < 1e-3 && found.states < 2e-3 && found.truncation.is_none(), "{what}");
    // What is dropped for a step's tokens is gone.
    assert!(found.stuck, "{what}");
}

/// Every method that drops tokens, with budgets of both kinds.
const ALL: [&str; 6] = [
    "sinks",
    "h2o",
    "snapkv",
    "{ method = \"h2o\", recent = 9, heavy = 11 }",
    "{ method = \"snapkv\", kept = 20, window = 8, kernel = 3 }",
    "expected_attention",
];

/// RoPE of the first numbers of a head, with an attention factor.
struct Turns(usize);

impl Turns {
    fn turn(&self, position: usize, x: &mut [f32], sign: f32, factor: f32) {
        let mut angles = vec![0.0; self.0];
        self.angles_into(position, &mut angles);
        let half = self.0 / 2;
        for j in 0..half {
            let (cos, sin) = (angles[j] * factor, sign * angles[j + half] * factor);
            (x[j], x[j + half]) = (x[j] * cos - x[j + half] * sin, x[j + half] * cos + x[j] * sin);
        }
    }
}

impl Rotary for Turns {
    fn angles_into(&self, position: usize, out: &mut [f32]) {
        let half = self.0 / 2;
        for j in 0..half {
            let (sin, cos) = (position as f32 * 0.3_f32.powi(j as i32)).sin_cos();
            (out[j], out[j + half]) = (1.25 * cos, 1.25 * sin);
        }
    }
    fn rotate(&self, position: usize, x: &mut [f32]) {
        self.turn(position, x, 1.0, 1.0);
    }
    fn unrotate(&self, position: usize, x: &mut [f32]) {
        self.turn(position, x, -1.0, 1.0 / (1.25 * 1.25));
    }
    fn rotary_dim(&self) -> usize {
        self.0
    }
}

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

#[test]
fn what_queries_to_come_are_expected_to_look_at() {
    check("expected_attention", &SMALL);
    check("{ method = \"expected_attention\", kept = 40, sinks = 0, dtype = \"f32\" }", &ODD);
    check("{ method = \"expected_attention\", kept = 0.5, sinks = 7 }", &WIDE);
    // With queries that are taken back to what they were before RoPE, of all or of some numbers of a head.
    let device = device();
    for (shape, rotary) in [(&SMALL, 8), (&SMALL, 6), (&ODD, 24)] {
        for text in ["expected_attention", "{ method = \"expected_attention\", kept = 0.4, future = 9 }"] {
            let rotary: Arc<dyn Rotary> = Arc::new(Turns(rotary));
            let spec = CacheSpec::parse(text).unwrap();
            let resources = Resources { rotary: Some(rotary), latent: None };
            let mut host = build(&spec, shape, &resources).unwrap();
            let there = with(&device, &spec, shape, &resources).unwrap();
            let mut there: Box<dyn KvCache> = Box::new(there);
            for round in 0..2 {
                feed_both(&mut host, &mut there, shape, (0, 90 + round), round as f32);
                feed_both(&mut host, &mut there, shape, (90 + round, 1), 0.0);
                for layer in 0..shape.layers {
                    assert_eq!(host.restored(layer).unwrap(), there.restored(layer).unwrap(), "{text}");
                }
                host.truncate(0).unwrap();
                there.truncate(0).unwrap();
            }
        }
    }
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
                let worst = attended_apart(&mut *host, &mut there, layer, [&q, &k, &v]);
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

/// A step of a token's states that make it known again.
fn feed(cache: &mut dyn KvCache, shape: &ModelShape, (len, tokens): (usize, usize), seed: f32) {
    let (q_dim, kv_dim) = (shape.heads * shape.head_dim, shape.kv_dim());
    for layer in 0..shape.layers {
        let wave = |n: usize, w: f32| -> Vec<f32> {
            (len * n..(len + tokens) * n).map(|i| ((i * i % 1009) as f32 * w + seed).sin()).collect()
        };
        let mut out = vec![0.0; q_dim * tokens];
        cache
            .attend_into(layer, &wave(q_dim, 0.3), &wave(kv_dim, 0.7), &wave(kv_dim, 0.9), &mut out)
            .unwrap();
    }
    cache.finish_step().unwrap();
}

fn feed_both(
    a: &mut Box<dyn KvCache>,
    b: &mut Box<dyn KvCache>,
    shape: &ModelShape,
    step: (usize, usize),
    seed: f32,
) {
    feed(a.as_mut(), shape, step, seed);
    feed(b.as_mut(), shape, step, seed);
}

/// Forks go their own ways, share what neither has changed, and can begin again.
#[test]
fn forks_and_truncation() {
    let device = device();
    for spec in ALL {
        let spec = CacheSpec::parse(spec).unwrap();
        let mut host = build(&spec, &SMALL, &Resources::default()).unwrap();
        let mut there: Box<dyn KvCache> = Box::new(on(&device, &spec, &SMALL).unwrap());
        feed_both(&mut host, &mut there, &SMALL, (0, 90), 0.0);
        let mut forks = [host.fork(), there.fork()];
        for i in 0..6 {
            feed_both(&mut host, &mut there, &SMALL, (90 + i, 1), 0.0);
            let [host_fork, there_fork] = &mut forks;
            feed_both(host_fork, there_fork, &SMALL, (90 + i, 1), 1.5);
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
            feed(cache.as_mut(), &SMALL, (0, 33), 0.2);
        }
        assert_eq!(forks[0].restored(2).unwrap(), forks[1].restored(2).unwrap());
    }
}

/// Blocks of 16 slots, and the lists that find them: as many as on the host.
#[test]
fn bytes_are_those_of_the_host() {
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
            feed_both(&mut host, &mut there, &SMALL, (len, tokens), 0.0);
        }
        let slots = usize::next_multiple_of(held, 16) * SMALL.layers * SMALL.kv_heads;
        let (want, got) = (host.footprint(), there.footprint());
        assert_eq!(got, want, "{spec:?}");
        assert_eq!(got.state, slots * beside);
        assert!(got.states >= slots * 2 * 8 * 2 && got.total() == got.states + got.state, "{got:?}");
    }
}
