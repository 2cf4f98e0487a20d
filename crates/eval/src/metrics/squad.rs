//! Exact match and F1 of SQuAD, as `transformers.data.metrics.squad_metrics` computes them (the module that
//! lm-evaluation-harness's `coqa` calls), and CoQA's rule for several references.

use std::collections::HashMap;

use super::python::{is_word, split};

/// Lower case, without ASCII punctuation and the articles a, an, the; white space to single spaces.
pub(crate) fn normalise(text: &str) -> String {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let word = is_word(first);
        let end = rest.find(|c| is_word(c) != word).unwrap_or(rest.len());
        let (run, tail) = rest.split_at(end);
        out += if matches!(run, "a" | "an" | "the") { " " } else { run };
        rest = tail;
    }
    split(&out).collect::<Vec<_>>().join(" ")
}

/// 1 when the normalised texts are equal (`compute_exact`).
pub fn exact_match(gold: &str, prediction: &str) -> f64 {
    f64::from(normalise(gold) == normalise(prediction))
}

/// F1 of the bags of normalised words (`compute_f1`); with an empty side, whether both are.
pub fn f1_score(gold: &str, prediction: &str) -> f64 {
    let (gold, prediction) = (normalise(gold), normalise(prediction));
    let gold: Vec<&str> = split(&gold).collect();
    let prediction: Vec<&str> = split(&prediction).collect();
    if gold.is_empty() || prediction.is_empty() {
        return f64::from(gold == prediction);
    }
    bag_f1(&prediction, &gold)
}

/// F1 of two bags; 0 without a common element.
pub(crate) fn bag_f1<T: std::hash::Hash + Eq>(prediction: &[T], gold: &[T]) -> f64 {
    let mut counts: HashMap<&T, usize> = HashMap::new();
    for item in gold {
        *counts.entry(item).or_default() += 1;
    }
    let mut common = 0;
    for item in prediction {
        if let Some(left) = counts.get_mut(item).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let precision = f64::from(common) / prediction.len() as f64;
    let recall = f64::from(common) / gold.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// CoQA's score with several references: every reference is left out once, as the human who gave it would be, the best
/// of the others counts, and the mean is taken. A single reference is compared directly.
pub fn leave_one_out(golds: &[String], prediction: &str, score: fn(&str, &str) -> f64) -> f64 {
    let scores: Vec<f64> = golds.iter().map(|gold| score(gold, prediction)).collect();
    if scores.len() < 2 {
        return scores.first().copied().unwrap_or(0.0);
    }
    let without = |left: usize| {
        scores.iter().enumerate().filter(|(i, _)| *i != left).map(|(_, s)| *s).fold(0.0, f64::max)
    };
    (0..scores.len()).map(without).sum::<f64>() / scores.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalisation_drops_whole_articles_only() {
        assert_eq!(normalise("The  theatre's an Anthem, a\tB."), "theatres anthem b");
        // A combining mark is no word character for Python: the article before it goes.
        assert_eq!(normalise("a\u{301}b"), "\u{301}b");
    }

    #[test]
    fn leaving_one_reference_out() {
        let golds = ["red", "red", "blue"].map(str::to_string);
        assert!((leave_one_out(&golds, "red", exact_match) - 1.0).abs() < 1e-12);
        assert!((leave_one_out(&golds, "blue", exact_match) - 2.0 / 3.0).abs() < 1e-12);
        assert!((leave_one_out(&golds[2..], "Blue.", exact_match) - 1.0).abs() < 1e-12);
    }
}
