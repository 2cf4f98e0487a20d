//! Metrics against those of the Python originals.

use minicache_eval::data::DataSource;
use minicache_eval::metrics::{self, Tokenize};
use minicache_eval::score::score_file;
use minicache_eval::tasks::{self, Output, Request, Suite};
use serde_json::{Value, json};

use crate::golden::{fixture, folder_with, list, near, text};

#[test]
fn coqa_scores_equal_the_harness() {
    for case in fixture("coqa") {
        let golds = list(&case["golds"]);
        for (metric, score) in
            [("em", metrics::exact_match as fn(&str, &str) -> f64), ("f1", metrics::f1_score)]
        {
            near(metrics::leave_one_out(&golds, text(&case, "pred"), score), &case[metric], (metric, &case));
        }
    }
}

#[test]
fn truthfulqa_scores_equal_the_harness() {
    let suite = Suite::find("truthfulqa_gen").unwrap();
    let mut document = suite.documents(&DataSource::sample_only(), Some(1)).unwrap().docs.remove(0);
    for case in fixture("truthfulqa") {
        document.reference = tasks::Reference::TrueFalse {
            correct: list(&case["correct"]),
            incorrect: list(&case["incorrect"]),
        };
        let output = Output::Generated(vec![text(&case, "completion").to_string()]);
        let scores = suite.score(&document, &output).unwrap();
        assert_eq!(scores.len(), 12);
        for (metric, tally) in scores {
            near(tally.mean(), &case["metrics"][&metric], (&metric, &case));
        }
    }
}

#[test]
fn bleu_equals_sacrebleu() {
    for case in fixture("bleu") {
        let references: Vec<Vec<String>> = case["refs"].as_array().unwrap().iter().map(list).collect();
        let tokenize = if text(&case, "tokenize") == "intl" { Tokenize::Intl } else { Tokenize::V13a };
        near(metrics::corpus_bleu(&list(&case["hyps"]), &references, tokenize), &case["score"], &case);
    }
}

#[test]
fn ratios_equal_difflib() {
    for case in fixture("difflib") {
        let (a, b) = (text(&case, "a"), text(&case, "b"));
        near(metrics::ratio(a, b), &case["ratio"], &case);
        assert_eq!(json!(metrics::fuzz_ratio(a, b)), case["fuzz"], "{case}");
    }
}

#[test]
fn chinese_words_equal_jieba() {
    for case in fixture("jieba") {
        assert_eq!(metrics::words_zh(text(&case, "text")), list(&case["words"]));
    }
}

#[test]
fn longbench_scores_equal_the_original_on_all_21_tasks() {
    let mut seen = 0;
    for group in fixture("longbench") {
        let lines = |lines: &[Value]| -> String {
            let with_classes = |line: &Value| {
                let mut line = line.clone();
                line["all_classes"] = group["all_classes"].clone();
                line.to_string() + "\n"
            };
            lines.iter().map(with_classes).collect()
        };
        let cases = group["lines"].as_array().unwrap();
        for task in list(&group["tasks"]) {
            let all = folder_with(&[("pred.jsonl", &lines(cases))]);
            let scored = score_file(&task, &all.path().join("pred.jsonl")).unwrap();
            assert_eq!((scored.task, scored.samples), (format!("longbench/{task}"), cases.len()));
            assert_eq!(json!(scored.metrics["score"]), group["result"], "{task}");
            seen += 1;
        }
        // Line by line, with all digits, for one of the tasks.
        let suite = Suite::find(group["tasks"][0].as_str().unwrap()).unwrap();
        for case in cases {
            let classes =
                if group["all_classes"].is_null() { Vec::new() } else { list(&group["all_classes"]) };
            let reference = tasks::Reference::Answers { answers: list(&case["answers"]), classes };
            let output = Output::Generated(vec![text(case, "pred").to_string()]);
            let scores = suite.tasks[0].score(&reference, &output).unwrap();
            near(scores["score"].mean(), &case["score"], (&suite.name, case));
        }
    }
    assert_eq!(seen, 21);
}

#[test]
fn group_metrics_carry_the_task_and_intervals() {
    let suite = Suite::find("truthfulqa").unwrap();
    assert_eq!(suite.metrics()[0], "gen_bleu_max");
    let docs = suite.documents(&DataSource::sample_only(), Some(8)).unwrap().docs;
    assert_eq!(docs.len(), 24);
    let outputs = docs.iter().enumerate().map(|(i, doc)| match &doc.request {
        Request::Choices(choices) => {
            Output::LogLikelihoods((0..choices.len()).map(|k| if k == i % 2 { -1.0 } else { -2.0 }).collect())
        }
        _ => Output::Generated(vec!["I have no comment.".to_string()]),
    });
    let scores: Vec<_> =
        docs.iter().zip(outputs).map(|(doc, output)| suite.score(doc, &output).unwrap()).collect();
    let aggregates = suite.aggregate(&scores, 3);
    assert_eq!(aggregates.len(), 14);
    let acc = &aggregates["mc1_acc"];
    assert!((acc.value - 0.5).abs() < 1e-12 && acc.samples == 8);
    let interval = acc.interval.unwrap();
    assert!(interval.low < 0.5 && 0.5 < interval.high);
    assert_eq!(suite.aggregate(&scores, 3), aggregates);
}
