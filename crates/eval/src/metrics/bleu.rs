//! BLEU (Papineni et al. 2002) as sacrebleu 2 computes it with `smooth_method="exp"`.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::python::{is_space, split};

const ORDERS: usize = 4;

/// How text becomes words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokenize {
    /// `intl` (mteval-v14 `--international-tokenization`): every punctuation mark that touches a non-digit and every
    /// symbol stands alone. lm-evaluation-harness's TruthfulQA uses it.
    Intl,
    /// `13a` (mteval-v13a), sacrebleu's default.
    V13a,
}

/// BLEU of `hypotheses`, each against its list of references, in 0..100. No effective order, exponential smoothing:
/// every further order without a match counts for half as much.
pub fn corpus_bleu<S: AsRef<str>>(hypotheses: &[S], references: &[Vec<S>], tokenize: Tokenize) -> f64 {
    let mut correct = [0_usize; ORDERS];
    let mut total = [0_usize; ORDERS];
    let (mut hypothesis_len, mut reference_len) = (0, 0);
    for (hypothesis, references) in hypotheses.iter().zip(references) {
        let text = tokenized(hypothesis.as_ref(), tokenize);
        let words: Vec<&str> = split(&text).collect();
        let texts: Vec<String> = references.iter().map(|r| tokenized(r.as_ref(), tokenize)).collect();
        let references: Vec<Vec<&str>> = texts.iter().map(|t| split(t).collect()).collect();
        hypothesis_len += words.len();
        // The closest length; of two as close, the shorter.
        let closest = references.iter().map(Vec::len).min_by_key(|&len| (len.abs_diff(words.len()), len));
        reference_len += closest.unwrap_or(0);
        for n in 1..=ORDERS {
            let mut most: HashMap<&[&str], usize> = HashMap::new();
            for reference in &references {
                for (ngram, count) in counts(reference, n) {
                    let known = most.entry(ngram).or_default();
                    *known = count.max(*known);
                }
            }
            for (ngram, count) in counts(&words, n) {
                correct[n - 1] += count.min(most.get(ngram).copied().unwrap_or(0));
                total[n - 1] += count;
            }
        }
    }
    from_counts(&correct, &total, hypothesis_len, reference_len)
}

fn counts<'a, 'b>(words: &'a [&'b str], n: usize) -> HashMap<&'a [&'b str], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(n) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

fn from_counts(
    correct: &[usize; ORDERS],
    total: &[usize; ORDERS],
    hypothesis: usize,
    reference: usize,
) -> f64 {
    if correct.iter().all(|&c| c == 0) {
        return 0.0;
    }
    let brevity =
        if hypothesis < reference { (1.0 - reference as f64 / hypothesis as f64).exp() } else { 1.0 };
    let mut smooth = 1.0;
    let mut precisions = [0.0; ORDERS];
    for ((precision, &correct), &total) in precisions.iter_mut().zip(correct).zip(total) {
        if total == 0 {
            break;
        }
        *precision = if correct == 0 {
            smooth *= 2.0;
            100.0 / (smooth * total as f64)
        } else {
            100.0 * correct as f64 / total as f64
        };
    }
    // sacrebleu's stand-in for log 0: an order without any n-gram makes the score vanish.
    let log = |p: &f64| if *p == 0.0 { -9_999_999_999.0 } else { p.ln() };
    brevity * (precisions.iter().map(log).sum::<f64>() / ORDERS as f64).exp()
}

fn tokenized(text: &str, tokenize: Tokenize) -> String {
    let text = text.trim_end_matches(is_space);
    match tokenize {
        Tokenize::Intl => replace_all(&INTL, text),
        Tokenize::V13a => {
            let text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
            let text =
                text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
            replace_all(&V13A, &format!(" {text} "))
        }
    }
}

fn replace_all(rules: &[(Regex, &str)], text: &str) -> String {
    rules.iter().fold(text.to_string(), |text, (rule, by)| rule.replace_all(&text, *by).into_owned())
}

/// Punctuation after, then before, anything but a number; then symbols.
static INTL: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    rules(&[(r"(\P{N})(\p{P})", "$1 $2 "), (r"(\p{P})(\P{N})", " $1 $2"), (r"(\p{S})", " $1 ")])
});

static V13A: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    rules(&[
        (r"([\{-\~\[-` -\&\(-\+:-@/])", " $1 "),
        (r"(?s)([^0-9])([\.,])", "$1 $2 "),
        (r"(?s)([\.,])([^0-9])", " $1 $2"),
        (r"([0-9])(-)", "$1 $2 "),
    ])
});

fn rules(list: &[(&str, &'static str)]) -> Vec<(Regex, &'static str)> {
    list.iter().filter_map(|(pattern, by)| Some((Regex::new(pattern).ok()?, *by))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_compiles() {
        assert_eq!((INTL.len(), V13A.len()), (3, 4));
    }
}
