//! Speed of decoding with several caches, measured side by side.
//!
//! All caches are filled first and then take turns, a few steps each, so that what else the machine does meets all of
//! them alike; the median over all steps counts.

mod attention;
mod bandwidth;
mod whole;

use std::time::Instant;

use anyhow::Result;
use minicache_core::{CacheSpec, ModelShape, Sequence, nominal};

pub(crate) use attention::Attention;
pub(crate) use bandwidth::bandwidth_gb_s;
pub(crate) use whole::Whole;

/// Rounds in which every cache gets its turn.
const ROUNDS: usize = 5;
/// Steps before the first round that are not counted.
const WARM_UP: usize = 2;
/// A turn has as many steps as fit into this many seconds, within limits.
const TURN: f64 = 0.4;
const TURN_STEPS: std::ops::RangeInclusive<usize> = 2..=12;

/// Steps that a cache takes at most, for which there has to be room after the context.
pub(crate) const MOST_STEPS: usize = WARM_UP + ROUNDS * *TURN_STEPS.end();

/// Bytes that the caches of all `specs` take at once, about.
pub(crate) fn bytes_wanted(shape: &ModelShape, specs: &[CacheSpec], context: usize, batch: usize) -> f64 {
    let full = shape.full_bytes(context + MOST_STEPS) as f64 * batch as f64;
    let ratio = |spec| nominal(spec, shape, context).map_or(1.0, |n| n.ratio);
    specs.iter().map(|s| 1.1 * full / ratio(s)).sum()
}

/// What is timed: a model with its caches, or the caches alone.
pub(crate) trait Subject {
    /// Sequences with the context in their caches, and the tokens per second of prefilling one.
    fn fill(&mut self, spec: &CacheSpec) -> Result<(Vec<Sequence>, f64)>;
    /// One decode step of all sequences.
    fn step(&mut self, sequences: &mut [Sequence]) -> Result<()>;
    /// Bytes that a step reads besides the caches.
    fn weight_bytes(&self) -> usize;
    /// Model layers per layer that is really there: times and bytes are multiplied by it.
    fn scale(&self) -> f64;
}

/// What was measured of one cache, all sequences together.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_tokens_per_s: f64,
    /// Bytes held at the end of the prefill.
    pub(crate) cache_bytes: f64,
    /// Bytes of weights and caches over what memory could have delivered in the time of a step.
    pub(crate) bandwidth_share: f64,
}

/// A cache under measurement.
struct Lane {
    sequences: Vec<Sequence>,
    prefill: f64,
    bytes: f64,
    turn: usize,
    times: Vec<f64>,
}

/// Measures all `specs`, in their order. `bandwidth` is in bytes per second.
pub(crate) fn measure(
    subject: &mut dyn Subject,
    specs: &[CacheSpec],
    bandwidth: f64,
    progress: &dyn Fn(&str),
) -> Result<Vec<Measured>> {
    let mut lanes = Vec::with_capacity(specs.len());
    for spec in specs {
        progress(&format!("filling {}", spec.label()));
        let (sequences, prefill) = subject.fill(spec)?;
        let bytes = sequences.iter().map(|s| s.footprint().total() as f64).sum::<f64>() * subject.scale();
        lanes.push(Lane { sequences, prefill, bytes, turn: 1, times: Vec::new() });
    }
    progress("decoding");
    for lane in &mut lanes {
        let mut last = 0.0;
        for _ in 0..WARM_UP {
            last = timed(subject, &mut lane.sequences)?;
        }
        lane.turn = ((TURN / last) as usize).clamp(*TURN_STEPS.start(), *TURN_STEPS.end());
    }
    for _ in 0..ROUNDS {
        for lane in &mut lanes {
            for _ in 0..lane.turn {
                let time = timed(subject, &mut lane.sequences)?;
                lane.times.push(time);
            }
        }
    }
    let weights = subject.weight_bytes() as f64;
    let finish = |lane: &mut Lane| {
        let step = median(&mut lane.times) * subject.scale();
        Measured {
            prefill_tokens_per_s: lane.prefill,
            decode_tokens_per_s: lane.sequences.len() as f64 / step,
            cache_bytes: lane.bytes,
            bandwidth_share: (weights + lane.bytes) / (step * bandwidth),
        }
    };
    Ok(lanes.iter_mut().map(finish).collect())
}

fn timed(subject: &mut dyn Subject, sequences: &mut [Sequence]) -> Result<f64> {
    let start = Instant::now();
    subject.step(sequences)?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len().is_multiple_of(2) { (times[middle - 1] + times[middle]) / 2.0 } else { times[middle] }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use minicache_core::{ModelShape, Resources, build};

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    /// Steps of a known length.
    struct Sleeper {
        steps: usize,
    }

    const SHAPE: ModelShape =
        ModelShape { layers: 1, heads: 1, kv_heads: 1, head_dim: 32, scale: 1.0, ..ModelShape::PLAIN };

    impl Subject for Sleeper {
        fn fill(&mut self, spec: &CacheSpec) -> Result<(Vec<Sequence>, f64)> {
            let mut cache = build(spec, &SHAPE, &Resources::default())?;
            cache.append(0, &[1.0; 32 * 64], &[1.0; 32 * 64])?;
            cache.finish_step()?;
            let sequence = Sequence::new(cache);
            Ok((vec![sequence.fork(), sequence], 7.0))
        }
        fn step(&mut self, _: &mut [Sequence]) -> Result<()> {
            self.steps += 1;
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(())
        }
        fn weight_bytes(&self) -> usize {
            1000
        }
        fn scale(&self) -> f64 {
            2.0
        }
    }

    #[test]
    fn rates_are_of_all_sequences_and_the_whole_model() {
        let mut sleeper = Sleeper { steps: 0 };
        let specs = [CacheSpec::default(), CacheSpec::parse("rtn-8").unwrap()];
        let measured = measure(&mut sleeper, &specs, 1e6, &|_| {}).unwrap();
        assert_eq!(measured.len(), 2);
        assert!(sleeper.steps <= 2 * MOST_STEPS);
        for m in &measured {
            // Two sequences in twice 20 ms or a little more.
            assert!(m.decode_tokens_per_s <= 50.0 && m.decode_tokens_per_s > 10.0, "{m:?}");
            let step = 2.0 / m.decode_tokens_per_s;
            assert!((m.bandwidth_share - (1000.0 + m.cache_bytes) / (step * 1e6)).abs() < 1e-9);
            assert_eq!(m.prefill_tokens_per_s, 7.0);
        }
        // f16 in two layers for one, two sequences, 64 tokens: at least the states themselves.
        assert!(measured[0].cache_bytes >= (2 * 2 * 64 * 32 * 2 * 2) as f64);
    }
}
