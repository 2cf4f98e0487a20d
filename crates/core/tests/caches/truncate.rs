//! Going back: what follows is as if the forgotten tokens had never been there, or the cache refuses and is as it was.

use super::numbers::all;
use super::*;

/// A prompt, and tokens after it one at a time.
const PROMPT: usize = 70;
const MORE: usize = 60;

fn steps(shape: &ModelShape) -> Vec<Vec<StepStates>> {
    let mut rng = StdRng::seed_from_u64(21);
    let mut states = |tokens| (0..shape.layers).map(|_| random_states(&mut rng, shape, tokens)).collect();
    let mut out: Vec<Vec<StepStates>> = vec![states(PROMPT)];
    out.extend((0..MORE).map(|_| states(1)));
    out
}

#[test]
fn what_follows_is_as_if_the_forgotten_had_never_been_there() {
    let mut went_back = std::collections::BTreeMap::<String, usize>::new();
    for window in [None, Some(90)] {
        let shape = shape(2, 2, 32, window);
        let steps = steps(&shape);
        let other: Vec<Vec<StepStates>> = self::steps(&shape).into_iter().rev().collect();
        for (spec, resources) in all(&shape) {
            let mut cache = build(&spec, &shape, &resources).unwrap();
            let mut forks: Vec<Box<dyn KvCache>> = vec![cache.fork()];
            for layers in &steps {
                step(&mut *cache, layers);
                forks.push(cache.fork());
            }
            let held = PROMPT + MORE;
            assert_eq!(cache.len(), held);
            assert!(cache.truncate(held + 1).is_err());
            cache.truncate(held).unwrap();
            for (len, fork) in [
                (0, 0),
                (PROMPT, 1),
                (PROMPT + 1, 2),
                (PROMPT + 29, 30),
                (held - 3, MORE - 2),
                (held - 1, MORE),
                (30, usize::MAX),
            ] {
                let what = format!("{spec:?}, window {window:?}: {held} tokens back to {len}");
                let mut back = cache.fork();
                if let Err(e) = back.truncate(len) {
                    assert!(matches!(e, Error::Truncate { .. }), "{what}: {e}");
                    assert!(e.to_string().contains(&format!("back to {len} tokens")), "{e}");
                    assert_eq!(back.len(), held, "{what}");
                    assert_eq!(back.footprint(), cache.fork().footprint(), "{what}");
                    let mut whole = cache.fork();
                    assert_eq!(step(&mut *back, &other[0]), step(&mut *whole, &other[0]), "{what}");
                    continue;
                }
                assert_eq!(back.len(), len, "{what}");
                let mut never = match forks.get(fork) {
                    Some(fork) => fork.fork(),
                    None => {
                        let mut never = build(&spec, &shape, &resources).unwrap();
                        let width = [shape.heads * shape.head_dim, shape.kv_dim()];
                        let first = |x: &[f32], width: usize| x[..len * width].to_vec();
                        let layers: Vec<StepStates> = steps[0]
                            .iter()
                            .map(|s| StepStates {
                                q: first(&s.q, width[0]),
                                k: first(&s.k, width[1]),
                                v: first(&s.v, width[1]),
                            })
                            .collect();
                        step(&mut *never, &layers);
                        never
                    }
                };
                *went_back.entry(spec.name().to_string()).or_default() += 1;
                for layers in other.iter().skip(1).take(50).chain(&other[MORE..]) {
                    let [got, want] = [&mut back, &mut never].map(|cache| step(&mut **cache, layers));
                    if fork < forks.len() || spec.name() != "latent" {
                        assert_eq!(got, want, "{what}");
                    }
                    got.iter().zip(&want).for_each(|(got, want)| close(got, want, 3e-2, &what));
                }
                let bytes = [&back, &never].map(|c| c.footprint().total() as f64);
                assert!(bytes[0] < 1.05 * bytes[1], "{what}: {bytes:?} bytes");
            }
        }
    }
    // Every method can be emptied, and those that keep tokens apart can go back anywhere.
    for method in minicache_core::METHODS {
        let times = went_back.get(method.name).copied().unwrap_or(0);
        assert!(times >= 2, "{}: {times}", method.name);
    }
    for method in ["full", "fp8", "turboquant", "mean", "minicache", "rtn", "latent"] {
        assert!(went_back[method] >= 10, "{method}: {went_back:?}");
    }
}
