//! A batch is its sequences' steps, and nothing where it is not finished.

use minicache_core::{Batch, Sequence, States, build};
use rand::{SeedableRng, rngs::StdRng};

use crate::numbers::all;
use crate::{StepStates, random_states, shape, step};

/// All layers of a step of several sequences; gives each layer's output, or nothing where it is dropped after `layers`.
fn batch(sequences: &mut [Sequence], steps: &[Vec<StepStates>], layers: usize) -> Option<Vec<Vec<f32>>> {
    let shape = *sequences[0].shape();
    let tokens = |s: &StepStates| s.k.len() / shape.kv_dim();
    let counts = steps.iter().map(|layers| tokens(&layers[0]));
    let mut batch = Batch::begin(sequences.iter_mut().zip(counts)).unwrap();
    let mut outs = Vec::new();
    for layer in 0..layers {
        let all = |of: fn(&StepStates) -> &Vec<f32>| -> Vec<f32> {
            steps.iter().flat_map(|layers| of(&layers[layer]).iter().copied()).collect()
        };
        let (q, k, v) = (all(|s| &s.q), all(|s| &s.k), all(|s| &s.v));
        let mut out = vec![0.0; q.len()];
        batch.attend(layer, States::new(&q, &k, &v), &mut out).unwrap();
        outs.push(out);
    }
    (layers == shape.layers).then(|| batch.finish().unwrap()).map(|()| outs)
}

#[test]
fn a_batch_is_its_sequences_steps_and_leaves_nothing_unless_it_is_finished() {
    let shape = shape(2, 2, 32, None);
    let mut rng = StdRng::seed_from_u64(8);
    let mut states = |tokens: usize| -> Vec<StepStates> {
        (0..shape.layers).map(|_| random_states(&mut rng, &shape, tokens)).collect()
    };
    // Ragged steps: prompts, single tokens, a few; long and short sequences side by side.
    let steps: Vec<Vec<Vec<StepStates>>> = [[70, 3, 1], [1, 1, 1], [1, 40, 1], [9, 1, 8], [1, 1, 1]]
        .map(|step| step.map(&mut states).into())
        .into();
    for (spec, resources) in all(&shape) {
        let new = || Sequence::new(build(&spec, &shape, &resources).unwrap());
        let mut sequences = [new(), new(), new()];
        let mut alone = [new(), new(), new()];
        for step_states in &steps {
            // Given up in the first layer, in the middle, and after the last.
            let before: Vec<_> = sequences.iter().map(|s| (s.len(), s.footprint().total())).collect();
            for layers in [0, 2, 4] {
                if layers < 4 {
                    batch(&mut sequences, step_states, layers);
                } else {
                    let mut dropped = sequences.each_ref().map(Sequence::fork);
                    batch(&mut dropped, step_states, 4);
                }
                for (sequence, (len, bytes)) in sequences.iter().zip(&before) {
                    // What was put back has no room to grow left over.
                    let now = sequence.footprint().total();
                    assert!(now <= *bytes, "{}: {now} of {bytes}", spec.label());
                    assert_eq!(sequence.len(), *len);
                }
            }
            let got = batch(&mut sequences, step_states, 4).unwrap();
            let each: Vec<Vec<Vec<f32>>> = alone
                .iter_mut()
                .zip(step_states)
                .map(|(sequence, states)| step(sequence.cache_mut(), states))
                .collect();
            for (layer, got) in got.iter().enumerate() {
                let want: Vec<f32> = each.iter().flat_map(|layers| layers[layer].iter().copied()).collect();
                assert_eq!(*got, want, "{}, layer {layer}", spec.label());
            }
        }
        for (got, want) in sequences.iter().zip(&alone) {
            assert_eq!((got.len(), got.restored(3).unwrap()), (want.len(), want.restored(3).unwrap()));
        }
    }
}

#[test]
fn batches_that_cannot_be_are_refused() {
    let shape = shape(2, 2, 32, None);
    let new = |shape| {
        Sequence::new(build(&minicache_core::CacheSpec::default(), shape, &Default::default()).unwrap())
    };
    let (mut a, mut b) = (new(&shape), new(&minicache_core::ModelShape { heads: 2, ..shape }));
    let refused = |batch: minicache_core::Result<Batch<'_>>| batch.err().unwrap().to_string();
    assert!(refused(Batch::begin([])).contains("at least one"));
    assert!(refused(Batch::begin([(&mut a, 0)])).contains("tokens of a step"));
    assert!(refused(Batch::begin([(&mut a, 1), (&mut b, 1)])).contains("one shape"));
    let mut batch = Batch::begin([(&mut a, 2)]).unwrap();
    let (q, k) = (vec![0.0; 2 * 128], vec![0.0; 2 * 64]);
    let e = batch.attend(0, States::new(&q[1..], &k, &k), &mut vec![0.0; 256]).unwrap_err().to_string();
    assert!(e.contains("queries") && e.contains("255"), "{e}");
    let e = batch.attend(4, States::new(&q, &k, &k), &mut vec![0.0; 256]).unwrap_err().to_string();
    assert!(e.contains("layer"), "{e}");
    let mut bad = k.clone();
    bad[70] = f32::NAN;
    let e = batch.attend(0, States::new(&q, &k, &bad), &mut vec![0.0; 256]).unwrap_err().to_string();
    assert!(e.contains("value") && e.contains("position 1"), "{e}");
}
