//! ROUGE (Lin 2004) as Google's `rouge_score` 0.1.2 computes it without stemming, which is how lm-evaluation-harness
//! calls it for TruthfulQA.

use std::collections::HashMap;

/// F-measures in 0..100.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rouge {
    /// `rouge1`.
    pub rouge1: f64,
    /// `rouge2`.
    pub rouge2: f64,
    /// `rougeLsum`: union of longest common subsequences, a sentence being a line.
    pub rouge_l_sum: f64,
}

/// ROUGE of a prediction against one reference. As in the harness, `" . "` ends a sentence.
pub fn rouge(reference: &str, prediction: &str) -> Rouge {
    let (reference, prediction) = (reference.replace(" . ", ".\n"), prediction.replace(" . ", ".\n"));
    let (target, found) = (tokens(&reference), tokens(&prediction));
    let lines = |text: &str| text.split('\n').map(tokens).collect::<Vec<_>>();
    Rouge {
        rouge1: 100.0 * ngram_f(&target, &found, 1),
        rouge2: 100.0 * ngram_f(&target, &found, 2),
        rouge_l_sum: 100.0 * summary_f(&lines(&reference), &lines(&prediction)),
    }
}

/// Runs of ASCII letters and digits, in lower case.
fn tokens(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    words.filter(|w| !w.is_empty()).map(str::to_string).collect()
}

fn ngram_f(target: &[String], found: &[String], n: usize) -> f64 {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    for ngram in found.windows(n) {
        *left.entry(ngram).or_default() += 1;
    }
    let mut common = 0;
    for ngram in target.windows(n) {
        if let Some(count) = left.get_mut(ngram).filter(|c| **c > 0) {
            *count -= 1;
            common += 1;
        }
    }
    let ngrams = |words: &[String]| (words.len() + 1).saturating_sub(n).max(1) as f64;
    f_measure(f64::from(common) / ngrams(found), f64::from(common) / ngrams(target))
}

fn f_measure(precision: f64, recall: f64) -> f64 {
    if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

/// Summary-level LCS (section 3.2 of the ROUGE paper): for every reference sentence the union of its common
/// subsequences with all candidate sentences, each word counted at most as often as it occurs on either side.
fn summary_f(reference: &[Vec<String>], candidate: &[Vec<String>]) -> f64 {
    let (m, n): (usize, usize) = (reference.iter().map(Vec::len).sum(), candidate.iter().map(Vec::len).sum());
    if m == 0 || n == 0 {
        return 0.0;
    }
    let (mut in_reference, mut in_candidate) = (bag(reference), bag(candidate));
    let mut hits = 0;
    for sentence in reference {
        let mut union: Vec<usize> = candidate.iter().flat_map(|c| lcs_indices(sentence, c)).collect();
        union.sort_unstable();
        union.dedup();
        for index in union {
            let word = sentence[index].as_str();
            if let (Some(r), Some(c)) = (in_reference.get_mut(word), in_candidate.get_mut(word))
                && *r > 0
                && *c > 0
            {
                hits += 1;
                *r -= 1;
                *c -= 1;
            }
        }
    }
    f_measure(f64::from(hits) / n as f64, f64::from(hits) / m as f64)
}

fn bag(sentences: &[Vec<String>]) -> HashMap<&str, usize> {
    let mut bag = HashMap::new();
    for word in sentences.iter().flatten() {
        *bag.entry(word.as_str()).or_default() += 1;
    }
    bag
}

/// The positions in `reference` of one longest common subsequence, traced back as `rouge_score` does.
fn lcs_indices(reference: &[String], candidate: &[String]) -> Vec<usize> {
    let (rows, cols) = (reference.len(), candidate.len());
    let mut table = vec![vec![0_u32; cols + 1]; rows + 1];
    for i in 1..=rows {
        for j in 1..=cols {
            table[i][j] = if reference[i - 1] == candidate[j - 1] {
                table[i - 1][j - 1] + 1
            } else {
                table[i - 1][j].max(table[i][j - 1])
            };
        }
    }
    let (mut i, mut j) = (rows, cols);
    let mut indices = Vec::new();
    while i > 0 && j > 0 {
        if reference[i - 1] == candidate[j - 1] {
            indices.push(i - 1);
            i -= 1;
            j -= 1;
        } else if table[i][j - 1] > table[i - 1][j] {
            j -= 1;
        } else {
            i -= 1;
        }
    }
    indices
}
