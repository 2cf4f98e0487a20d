//! Outputs of the harness and of others, scored again.

use std::fs;
use std::path::Path;

use minicache_eval::data::DataSource;
use minicache_eval::score::score_file;
use minicache_eval::tasks::{Output, Suite};
use serde_json::{Value, json};

use crate::golden::{folder_with, json_lines, shared, text};

#[test]
fn scores_equal_the_harness_on_its_own_outputs() {
    let (Some(data), Some(golden)) = (shared("data"), shared("golden/lm_eval")) else { return };
    let source = DataSource::new(Some(data));
    for (task, file) in [
        ("gsm8k", "gsm8k"),
        ("truthfulqa_gen", "tqa_gen"),
        ("truthfulqa_mc1", "tqa_mc1"),
        ("truthfulqa_mc2", "tqa_mc2"),
    ] {
        let suite = Suite::find(task).unwrap();
        let docs = suite.documents(&source, Some(24)).unwrap().docs;
        for golden in json_lines(&golden.join(format!("{file}.jsonl"))) {
            let doc = &docs[golden["doc_id"].as_u64().unwrap() as usize];
            let output = match golden["loglikelihoods"].as_array() {
                Some(values) => Output::LogLikelihoods(values.iter().map(|v| v.as_f64().unwrap()).collect()),
                None => Output::Generated(vec![text(&golden, "output").to_string()]),
            };
            for (metric, tally) in suite.score(doc, &output).unwrap() {
                let expected = match (task, metric.split_once(',')) {
                    ("gsm8k", Some((metric, filter))) => &golden[filter][metric],
                    ("truthfulqa_gen", _) => &golden["metrics"][&metric],
                    _ => &golden[&metric],
                };
                let (ours, expected) = (tally.mean(), expected.as_f64().unwrap());
                assert!((ours - expected).abs() < 1e-6, "{task} {metric}, {}: {ours}, {expected}", doc.id);
            }
        }
    }
}

#[test]
fn published_longbench_results_come_out_to_two_decimals() {
    let Some(folder) = shared("data/longbench/predictions/llama2-7b-chat") else { return };
    let results: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("result.json")).unwrap()).unwrap();
    let seven =
        ["lcc", "repobench-p", "passage_retrieval_en", "trec", "2wikimqa", "gov_report", "multifieldqa_zh"];
    for task in seven {
        let scored = score_file(&format!("longbench/{task}"), &folder.join(format!("{task}.jsonl"))).unwrap();
        assert_eq!(json!(scored.metrics["score"]), results[task], "{task}");
    }
}

#[test]
fn samples_files_of_the_harness_are_rescored() {
    let gsm8k = |id: u64, filter: &str, response: &str| {
        json!({ "doc_id": id, "doc": { "question": "1 + 1?", "answer": "It is 1 + 1 = 2.\n#### 2" }, "target": "2",
            "resps": [[response]], "filtered_resps": ["?"], "filter": filter })
        .to_string()
    };
    let lines = [
        gsm8k(0, "strict-match", " It is 2.\n#### 2"),
        gsm8k(1, "strict-match", " The answer is $2."),
        gsm8k(0, "flexible-extract", " It is 2.\n#### 2"),
        gsm8k(1, "flexible-extract", " The answer is $2."),
    ];
    let piqa = json!({ "doc_id": 0, "doc": { "goal": "g", "sol1": "a long one", "sol2": "short", "label": 0 },
        "resps": [[["-6.0", "False"]], [["-5.0", "True"]]], "filtered_resps": [["-6.0", "False"], ["-5.0", "True"]] });
    let coqa = json!({ "doc_id": 0, "doc": { "id": "s", "story": "Once.",
            "questions": { "input_text": ["Who?", "When?"] }, "answers": { "input_text": ["Ann", "Once"] },
            "additional_answers": { "0": { "input_text": ["Ann", "once"] }, "1": { "input_text": ["she", "then"] } } },
        "resps": [[" Once.\nA: no"]] });
    let dir = folder_with(&[
        ("gsm8k.jsonl", &lines.join("\n")),
        ("piqa.jsonl", &piqa.to_string()),
        ("coqa.jsonl", &coqa.to_string()),
    ]);
    let score = |task: &str| score_file(task, &dir.path().join(format!("{task}.jsonl"))).unwrap();
    let gsm8k = score("gsm8k");
    assert_eq!(gsm8k.samples, 2);
    assert_eq!(
        json!(gsm8k.metrics),
        json!({ "exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0 })
    );
    assert_eq!(json!(score("piqa").metrics), json!({ "acc": 0.0, "acc_norm": 1.0 }));
    // References Once and then: left out in turn, the answer matches one of the two.
    assert_eq!(json!(score("coqa").metrics["em"]), json!(0.5));
}

#[test]
fn bad_predictions_and_tasks_are_named() {
    for (task, line, expected) in [
        (
            "longbench/lcc",
            "{\"pred\": \"x\"}",
            "line 1, field `answers`: expected a list of strings, found nothing",
        ),
        (
            "longbench/trec",
            "{\"pred\": \"x\", \"answers\": [\"x\"], \"all_classes\": null}",
            "line 1: expected the labels of all classes",
        ),
        (
            "longbench/passage_retrieval_en",
            "{\"pred\": \"x\", \"answers\": [\"12\"]}",
            "line 1: expected an answer such as \"Paragraph 3\"",
        ),
        ("piqa", "{\"pred\": \"x\", \"answers\": [\"x\"]}", "not enough for piqa"),
        ("gsm8k", "{\"text\": \"x\"}", "line 1: expected `pred` and `answers`"),
        ("gsm8k", "{\"doc\": {\"question\": \"q\"}, \"resps\": [[\"x\"]]}", "line 1, doc, field `answer`"),
        (
            "piqa",
            "{\"doc\": {\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0}, \"resps\": [[[\"-1.0\", \"True\"]]]}",
            "expected 2 log-likelihoods, found 1 log-likelihoods",
        ),
        ("truthfulqa", "{\"pred\": \"x\", \"answers\": []}", "truthfulqa is a group"),
        ("lcc", "", "holds no predictions"),
    ] {
        let dir = folder_with(&[("p.jsonl", line)]);
        let error = score_file(task, &dir.path().join("p.jsonl")).unwrap_err().to_string();
        assert!(error.contains("p.jsonl") && error.contains(expected), "{error}");
    }
    let error = score_file("gsm9k", Path::new("p.jsonl")).unwrap_err().to_string();
    assert_eq!(error, "no task `gsm9k`; `minicache tasks` lists them all");
    let error = score_file("truthful", Path::new("p.jsonl")).unwrap_err().to_string();
    assert!(error.contains("did you mean truthfulqa_gen"), "{error}");
    assert!(
        score_file("gsm8k", Path::new("no.jsonl"))
            .unwrap_err()
            .to_string()
            .starts_with("cannot read no.jsonl")
    );
}
