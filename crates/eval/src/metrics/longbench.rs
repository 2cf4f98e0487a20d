//! The metrics of LongBench (Bai et al. 2023; `metrics.py` of its repository), each of one prediction against one
//! answer, in 0..1.

use std::collections::HashSet;
use std::sync::LazyLock;

use super::python::split;
use super::rouge_pypi::rouge_l_f;
use super::segment::words_zh;
use super::sequence_matcher::fuzz_ratio;
use super::squad::{bag_f1, normalise};

/// Frames of Python's stack below the recursion of the package `rouge` when LongBench's `eval.py` runs: module,
/// scorer, `rouge_score`, `get_scores`, `_get_avg_scores`, `rouge_l_summary_level`, `_union_lcs`, `_recon_lcs`.
const FRAMES: usize = 8;

/// `qa_f1_score`: F1 of the bags of normalised words.
pub fn f1(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (normalise(prediction), normalise(answer));
    bag_f1(&split(&prediction).collect::<Vec<_>>(), &split(&answer).collect::<Vec<_>>())
}

/// `qa_f1_zh_score`: F1 of the bags of words found by jieba, without punctuation.
pub fn f1_zh(prediction: &str, answer: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        words_zh(text).into_iter().map(normalise_zh).filter(|word| !word.is_empty()).collect()
    };
    bag_f1(&words(prediction), &words(answer))
}

/// `rouge_score`: ROUGE-L of the package `rouge`, 0 where that fails.
pub fn rouge_l(prediction: &str, answer: &str) -> f64 {
    rouge_l_f(prediction, answer, FRAMES).unwrap_or(0.0)
}

/// `rouge_zh_score`: [`rouge_l`] of the words found by jieba.
pub fn rouge_l_zh(prediction: &str, answer: &str) -> f64 {
    let spaced = |text: &str| words_zh(text).join(" ");
    rouge_l_f(&spaced(prediction), &spaced(answer), FRAMES + 1).unwrap_or(0.0)
}

/// `classification_score`: which of the classes does the prediction name? 1 / k when the right one is among k.
pub fn classification(prediction: &str, answer: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> =
        classes.iter().map(String::as_str).filter(|c| prediction.contains(c)).collect();
    // The original removes parts of the right answer while it walks the list, so that the entry after each removed one
    // is passed over.
    let mut at = 0;
    while let Some(&name) = named.get(at) {
        if name != answer && answer.contains(name) {
            let first = named.iter().position(|n| *n == name).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&answer) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// `retrieval_score` and `retrieval_zh_score`: the share of the right paragraph's number among all numbers of the
/// prediction. `label` stands before the number in the answer: `Paragraph ` or `段落`. `None` for an answer without one.
pub fn retrieval(prediction: &str, answer: &str, label: &str) -> Option<f64> {
    let id = answer.split(label).skip(1).find_map(|tail| {
        let end = tail.find(|c| !is_digit(c)).unwrap_or(tail.len());
        (end > 0).then_some(&tail[..end])
    })?;
    Some(count(prediction, id))
}

/// `count_score`: the share of `answer` among all numbers of the prediction.
pub fn count(prediction: &str, answer: &str) -> f64 {
    let numbers: Vec<&str> = prediction.split(|c| !is_digit(c)).filter(|n| !n.is_empty()).collect();
    if numbers.is_empty() {
        return 0.0;
    }
    numbers.iter().filter(|n| **n == answer).count() as f64 / numbers.len() as f64
}

/// `code_sim_score`: similarity of the first line that holds no comment sign or backtick, in hundredths.
pub fn code_similarity(prediction: &str, answer: &str) -> f64 {
    let mut lines = prediction.trim_start_matches('\n').split('\n');
    let line = lines.find(|line| !line.contains(['`', '#']) && !line.contains("//")).unwrap_or_default();
    f64::from(fuzz_ratio(line, answer)) / 100.0
}

/// `\d` of Python's `re`.
fn is_digit(c: char) -> bool {
    use unicode_general_category::{GeneralCategory, get_general_category};
    c.is_ascii_digit() || (!c.is_ascii() && get_general_category(c) == GeneralCategory::DecimalNumber)
}

/// `normalize_zh_answer`: lower case, no ASCII or Chinese punctuation, no white space.
fn normalise_zh(text: &str) -> String {
    static PUNCTUATION: LazyLock<HashSet<char>> = LazyLock::new(|| {
        "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
            .chars()
            .collect()
    });
    let text: String = text
        .to_lowercase()
        .chars()
        .filter(|c| !c.is_ascii_punctuation() && !PUNCTUATION.contains(c))
        .collect();
    split(&text).collect()
}
