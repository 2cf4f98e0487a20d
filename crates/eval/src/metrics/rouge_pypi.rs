//! ROUGE-L as the PyPI package `rouge` 1.0.1 computes it (`Rouge().get_scores(..., avg=True)`), which LongBench's
//! scorer calls.
//!
//! The package works on *sets* of words over all sentences, a sentence ending at every period, and traces each common
//! subsequence by recursion: with Python's default limit of 1000 frames a long pair of sentences without a period, as
//! in Chinese, raises an error, which LongBench's scorer turns into 0. That is part of the published numbers, so it is
//! kept.

use std::collections::HashSet;

use super::python::split;

/// Python's default recursion limit.
const RECURSION_LIMIT: usize = 1000;

/// The `f` of `rouge-l`. `None` where the package raises an error: an empty side, or a recursion deeper than what
/// `frames` frames of callers leave of Python's limit.
pub fn rouge_l_f(hypothesis: &str, reference: &str, frames: usize) -> Option<f64> {
    let (hypothesis, reference) = (sentences(hypothesis), sentences(reference));
    if hypothesis.is_empty() || reference.is_empty() {
        return None;
    }
    let words = |s: &[Vec<&str>]| s.iter().flatten().copied().collect::<HashSet<&str>>().len() as f64;
    let (n, m) = (words(&hypothesis), words(&reference));
    let mut union: HashSet<&str> = HashSet::new();
    for reference in &reference {
        for hypothesis in &hypothesis {
            union.extend(common(reference, hypothesis, RECURSION_LIMIT.saturating_sub(frames))?);
        }
    }
    let (precision, recall) = (union.len() as f64 / n, union.len() as f64 / m);
    Some(2.0 * (precision * recall / (precision + recall + 1e-8)))
}

/// Pieces between periods, as words; a piece of white space alone is one empty word.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let words = |piece| {
        let words: Vec<&str> = split(piece).collect();
        if words.is_empty() { vec![""] } else { words }
    };
    text.split('.').filter(|piece| !piece.is_empty()).map(words).collect()
}

/// The words of the longest common subsequence that the package's recursion finds; `None` when it takes
/// `depth` frames.
fn common<'a>(x: &[&'a str], y: &[&str], depth: usize) -> Option<Vec<&'a str>> {
    let width = y.len() + 1;
    let mut table = vec![0_u32; (x.len() + 1) * width];
    for (i, a) in x.iter().enumerate() {
        for (j, b) in y.iter().enumerate() {
            table[(i + 1) * width + j + 1] = if a == b {
                table[i * width + j] + 1
            } else {
                table[i * width + j + 1].max(table[(i + 1) * width + j])
            };
        }
    }
    let (mut i, mut j) = (x.len(), y.len());
    let mut words = Vec::new();
    let mut frames = 1;
    while i > 0 && j > 0 {
        if x[i - 1] == y[j - 1] {
            words.push(x[i - 1]);
            i -= 1;
            j -= 1;
        } else if table[(i - 1) * width + j] > table[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
        frames += 1;
    }
    (frames < depth).then_some(words)
}
