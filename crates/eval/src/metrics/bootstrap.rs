//! Confidence intervals by the bootstrap over samples (Efron 1979, percentile method), seeded.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Resamples drawn for an interval.
const RESAMPLES: usize = 1000;

/// A 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Interval {
    /// The 2.5 % percentile.
    pub low: f64,
    /// The 97.5 % percentile.
    pub high: f64,
}

/// The interval of `sum of sums / sum of counts` over resamples of the `(sum, count)` pairs. The same pairs, in the
/// same order, with the same seed give the same interval on every machine. `None` unless every count is positive.
pub fn bootstrap_mean(samples: &[(f64, f64)], seed: u64) -> Option<Interval> {
    bootstrap_mean_of_means(&[samples], seed)
}

/// The interval of the mean of several groups' means (each as in [`bootstrap_mean`]): every group is resampled in
/// itself, as the groups are fixed and only their samples are drawn. `None` unless every group has a sample.
pub fn bootstrap_mean_of_means(groups: &[&[(f64, f64)]], seed: u64) -> Option<Interval> {
    let usable = |group: &&[(f64, f64)]| {
        u32::try_from(group.len()).is_ok_and(|n| n > 0) && group.iter().all(|&(_, count)| count > 0.0)
    };
    if groups.is_empty() || !groups.iter().all(usable) {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resample = |group: &[(f64, f64)]| {
        let (mut sum, mut count) = (0.0, 0.0);
        for _ in 0..group.len() {
            let (s, c) = group[rng.random_range(0..group.len() as u32) as usize];
            sum += s;
            count += c;
        }
        sum / count
    };
    let mut mean = || groups.iter().map(|g| resample(g)).sum::<f64>() / groups.len() as f64;
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| mean()).collect();
    means.sort_by(f64::total_cmp);
    Some(Interval { low: percentile(&means, 0.025), high: percentile(&means, 0.975) })
}

/// Linear interpolation between order statistics.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_a_proportion() {
        let samples: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(u8::from(i % 4 == 0)), 1.0)).collect();
        let interval = bootstrap_mean(&samples, 7).unwrap();
        // 1.96 sqrt(p (1 - p) / n) = 0.0424.
        assert!(
            (interval.low - 0.2076).abs() < 0.01 && (interval.high - 0.2924).abs() < 0.01,
            "{interval:?}"
        );
        assert_eq!(bootstrap_mean(&samples, 7), Some(interval));
        assert_ne!(bootstrap_mean(&samples, 8), Some(interval));
        assert_eq!(bootstrap_mean(&[], 0), None);
        assert_eq!(bootstrap_mean(&[(3.0, 4.0)], 0), Some(Interval { low: 0.75, high: 0.75 }));
    }

    #[test]
    fn groups_are_resampled_in_themselves() {
        let (zeros, ones) = ([(0.0, 1.0); 8], [(1.0, 1.0); 8]);
        // Pooled, these sixteen samples would spread.
        let interval = bootstrap_mean_of_means(&[&zeros, &ones], 1).unwrap();
        assert_eq!(interval, Interval { low: 0.5, high: 0.5 });
        let mixed: Vec<(f64, f64)> = zeros.iter().chain(&ones).copied().collect();
        let (one, two) =
            (bootstrap_mean(&mixed, 1).unwrap(), bootstrap_mean_of_means(&[&mixed, &mixed], 1).unwrap());
        // Half the variance.
        let shrunk = (two.high - two.low) / (one.high - one.low);
        assert!((shrunk - 0.5f64.sqrt()).abs() < 0.1, "{shrunk}");
        assert_eq!(bootstrap_mean_of_means(&[&mixed, &[]], 1), None);
    }
}
