//! Means, spreads and how numbers are printed in results.

/// Mean and sample standard deviation (n - 1; 0 for a single value, NaN for none).
pub(crate) fn mean_std(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let values: Vec<f64> = values.into_iter().collect();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let std = if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { squares.sqrt() };
    (mean, std)
}

/// A number for `cells.csv`: six significant digits, the shortest form of them; empty for what is not finite. Sums
/// taken in another order (another batch, other hardware) rarely show at this precision.
pub(crate) fn number(x: f64) -> String {
    if !x.is_finite() {
        return String::new();
    }
    let rounded: f64 = format!("{x:.5e}").parse().unwrap_or(x);
    // Not -0.
    (rounded + 0.0).to_string()
}

/// Seconds, to the millisecond.
pub(crate) fn seconds(x: f64) -> String {
    format!("{x:.3}")
}

/// Log-probabilities of `logits` in place, summed in f64.
pub(crate) fn log_softmax(logits: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    // The maximum first: next to a large logit the logarithm would be rounded away.
    let log_sum = sum.ln() as f32;
    logits.iter_mut().for_each(|x| *x = (*x - max) - log_sum);
}

/// KL(p || q) in nats of two distributions given as log-probabilities.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    p.iter().zip(q).map(|(&p, &q)| f64::from(p.exp()) * f64::from(p - q)).sum()
}

/// Index of the largest number, the first of equals.
pub(crate) fn argmax(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in x.iter().enumerate() {
        if *v > x[best] {
            best = i;
        }
    }
    best
}

/// Cosine of the angle between two vectors, in f64; 0 where one of them is zero.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (f64::from(x), f64::from(y));
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    let norm = (aa * bb).sqrt();
    if norm > 0.0 { ab / norm } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_stable() {
        for (x, text) in [
            (0.1 + 0.2, "0.3"),
            (1234567.0, "1234570"),
            (-1e-20, "-0.00000000000000000001"),
            (-0.0, "0"),
            (f64::NAN, ""),
            (14.970_000_1, "14.97"),
        ] {
            assert_eq!(number(x), text);
        }
    }

    #[test]
    fn spread_is_of_the_sample() {
        let (mean, std) = mean_std([1.0, 2.0, 4.0]);
        assert!((mean - 7.0 / 3.0).abs() < 1e-12 && (std - 1.527_525_231_651_946_7).abs() < 1e-12);
        assert_eq!(mean_std([3.0]), (3.0, 0.0));
    }

    #[test]
    fn kl_of_softmaxes() {
        let mut p = vec![1.0f32, 2.0, 3.0];
        let mut q = vec![1001.0f32, 1001.0, 1001.0];
        log_softmax(&mut p);
        log_softmax(&mut q);
        assert!(kl(&p, &p).abs() < 1e-7);
        let entropy: f64 = p.iter().map(|&x| -f64::from(x.exp() * x)).sum();
        assert!((kl(&p, &q) - (3f64.ln() - entropy)).abs() < 1e-6);
        assert_eq!(argmax(&p), 2);
        assert_eq!(argmax(&q), 0);
    }

    #[test]
    fn cosine_of_known_angles() {
        assert!((cosine(&[1.0, 1.0], &[0.0, 2.0]) - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(cosine(&[0.0], &[1.0]), 0.0);
    }
}
