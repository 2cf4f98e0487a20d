//! Metrics over log-likelihoods of given choices, as lm-evaluation-harness's `multiple_choice` computes them.

/// 1 when the likeliest choice (the first of equals) is `label`.
pub fn acc(log_likelihoods: &[f64], label: usize) -> f64 {
    f64::from(argmax(log_likelihoods) == Some(label))
}

/// Like [`acc`] with each log-likelihood divided by its choice's length in characters, without the leading space.
pub fn acc_norm(log_likelihoods: &[f64], lengths: &[usize], label: usize) -> f64 {
    let scaled: Vec<f64> = log_likelihoods.iter().zip(lengths).map(|(ll, &len)| ll / len as f64).collect();
    acc(&scaled, label)
}

/// The share of the probability of all choices that falls on the true ones (`truthfulqa_mc2`).
pub fn true_mass(log_likelihoods: &[f64], labels: &[bool]) -> f64 {
    // Relative to the likeliest: plain exponentials, as in the harness, vanish for long choices.
    let top = log_likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mass: Vec<f64> = log_likelihoods.iter().map(|ll| (ll - top).exp()).collect();
    let truth: f64 = mass.iter().zip(labels).filter(|(_, l)| **l).map(|(m, _)| m).sum();
    truth / mass.iter().sum::<f64>()
}

/// The first of the largest values, or the first that is not a number, as `numpy.argmax` has it.
fn argmax(values: &[f64]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, &value) in values.iter().enumerate() {
        if best.is_none_or(|(_, b)| value > b || (value.is_nan() && !b.is_nan())) {
            best = Some((i, value));
        }
    }
    best.map(|(i, _)| i)
}
