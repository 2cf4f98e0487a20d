//! Data, prompts and scores: against golden values of the Python originals (`fixtures/`), and against the real data
//! and the harness's own outputs where these lie beside the checkout.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use minicache_eval::data::{DataSource, FetchError, HubData, HubFile, Origin};
use minicache_eval::metrics::{self, Tokenize};
use minicache_eval::score::score_file;
use minicache_eval::tasks::{self, Output, Request, Suite};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The development data beside the checkout, if there.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.exists().then_some(path)
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn fixture(key: &str) -> Vec<Value> {
    let fixtures: Value = serde_json::from_str(include_str!("fixtures/metrics.json")).unwrap();
    fixtures[key].as_array().unwrap().clone()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap()
}

fn list(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

fn near(ours: f64, golden: &Value, what: impl std::fmt::Debug) {
    let golden = golden.as_f64().unwrap();
    assert!((ours - golden).abs() < 1e-9, "{what:?}: {ours} instead of {golden}");
}

fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

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
fn prompts_equal_the_harness_byte_for_byte() {
    let (Some(data), Some(golden)) = (shared("data"), shared("golden/lm_eval")) else { return };
    let source = DataSource::new(Some(data));
    for (task, file) in [
        ("gsm8k", "gsm8k"),
        ("truthfulqa_gen", "tqa_gen"),
        ("truthfulqa_mc1", "tqa_mc1"),
        ("truthfulqa_mc2", "tqa_mc2"),
    ] {
        let docs = Suite::find(task).unwrap().documents(&source, Some(24)).unwrap().docs;
        for golden in json_lines(&golden.join(format!("{file}.jsonl"))) {
            let doc = &docs[golden["doc_id"].as_u64().unwrap() as usize];
            match &doc.request {
                Request::Generate(request) => {
                    assert_eq!(request.prompt, text(&golden, "prompt"));
                    assert_eq!(json!(request.until), golden["until"]);
                }
                Request::Choices(choices) => {
                    assert!(choices.iter().all(|c| c.context == text(&golden, "prompt")));
                    let continuations: Vec<_> = choices.iter().map(|c| c.continuation.as_str()).collect();
                    assert_eq!(json!(continuations), golden["continuations"]);
                }
                Request::Turns(_) => panic!("no such golden file"),
            }
        }
    }
}

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

#[test]
fn texts_of_every_data_set_at_hand() {
    let Some(data) = shared("data") else { return };
    let source = DataSource::new(Some(data));
    let longbench = tasks::texts("longbench", &source, Some(9)).unwrap();
    let ids: Vec<&str> = longbench.docs.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids[..2], ["longbench/lcc/0", "longbench/repobench-p/0"]);
    assert_eq!(ids[7..], ["longbench/lcc/1", "longbench/repobench-p/1"]);
    assert_eq!(longbench.origin.label(), "files longbench/lcc.jsonl");
    let gsm8k = tasks::texts("gsm8k", &source, None).unwrap();
    assert_eq!(gsm8k.docs.len(), 660);
    assert!(gsm8k.docs[0].text.starts_with("Question: Janet") && gsm8k.docs[0].text.ends_with("#### 18"));
    let truthfulqa = tasks::texts("truthfulqa", &source, Some(1)).unwrap();
    assert!(truthfulqa.docs[0].text.ends_with("A: The watermelon seeds pass through your digestive system."));
}

#[test]
fn the_bundled_sample_has_every_task_it_should() {
    let source = DataSource::sample_only();
    for name in
        ["gsm8k", "coqa", "truthfulqa", "longbench", "openbookqa", "mathqa", "piqa", "rte", "winogrande"]
    {
        let documents = Suite::find(name).unwrap().documents(&source, None).unwrap();
        assert_eq!(documents.origin.label(), "bundled sample");
        assert!(documents.docs.len() >= 5, "{name}: {}", documents.docs.len());
        let texts = tasks::texts(name, &source, Some(4)).unwrap();
        assert!(texts.docs.len() == 4 && texts.docs.iter().all(|d| !d.text.is_empty()));
    }
    let missing = Suite::find("longbench/qasper").unwrap().documents(&source, None).unwrap_err().to_string();
    assert!(missing.contains("qasper") && missing.contains("longbench/qasper.jsonl"), "{missing}");
}

#[test]
fn multiple_choice_prompts() {
    let source = DataSource::sample_only();
    let choices = |name: &str| {
        let doc = Suite::find(name).unwrap().documents(&source, Some(1)).unwrap().docs.remove(0);
        let Request::Choices(choices) = doc.request else { panic!("{name}") };
        choices.into_iter().map(|c| (c.context, c.continuation)).collect::<Vec<_>>()
    };
    let winogrande = choices("winogrande");
    let rest = " was too high.".to_string();
    assert_eq!(
        winogrande[0],
        ("The trunk did not fit under the bed because the trunk".to_string(), rest.clone())
    );
    assert_eq!(winogrande[1], ("The trunk did not fit under the bed because the bed".to_string(), rest));
    assert!(choices("rte")[0].0.ends_with(" True or False?\nAnswer:"));
    assert_eq!(choices("rte")[1].1, " False");
    assert_eq!(choices("mathqa").len(), 5);
    assert!(choices("piqa")[0].0.starts_with("Question: ") && choices("piqa")[0].0.ends_with("\nAnswer:"));
    assert_eq!(choices("openbookqa")[0].1, " reflects the light of the lamp");
}

#[test]
fn coqa_turns_build_on_each_other() {
    let suite = Suite::find("coqa").unwrap();
    let doc = suite.documents(&DataSource::sample_only(), Some(1)).unwrap().docs.remove(0);
    let Request::Turns(turns) = &doc.request else { panic!("turns") };
    for pair in turns.prompts.windows(2) {
        assert!(pair[1].starts_with(&pair[0]) && pair[1].ends_with("\n\nA:"));
    }
    let tasks::Reference::TurnAnswers(answers) = &doc.reference else { panic!("answers by turn") };
    // What the reference annotator said, word for word, is right for every turn where another one said the same.
    let said = Output::Generated(answers.iter().map(|a| a[0].clone()).collect());
    let scores = suite.score(&doc, &said).unwrap();
    assert_eq!(scores["f1"].count as usize, turns.prompts.len());
    assert!(scores["f1"].mean() > 0.6 && scores["em_last"].count == 1.0);
}

#[test]
fn the_hub_comes_after_files_and_before_the_sample() {
    let dir = folder_with(&[("gsm8k/train.jsonl", &"{\"question\": \"q\", \"answer\": \"a\"}\n".repeat(5))]);
    let test = dir.path().join("test-00000-of-00001.jsonl");
    fs::write(&test, "{\"question\": \"hub\", \"answer\": \"#### 1\"}\n").unwrap();
    let train = dir.path().join("gsm8k/train.jsonl");
    let hub = move |file: &HubFile| {
        assert_eq!(file.repo, "openai/gsm8k");
        Ok(if file.path.contains("test") { test.clone() } else { train.clone() })
    };
    let gsm8k = Suite::find("gsm8k").unwrap();
    let from_hub = DataSource::sample_only().with_hub(std::sync::Arc::new(hub));
    let documents = gsm8k.documents(&from_hub, None).unwrap();
    assert_eq!(documents.origin, Origin::Hub("openai/gsm8k".to_string()));
    assert_eq!(documents.docs.len(), 1);

    let offline = |_: &HubFile| Err(FetchError::Unreachable("no network".to_string()));
    let documents =
        gsm8k.documents(&DataSource::sample_only().with_hub(std::sync::Arc::new(offline)), None).unwrap();
    assert_eq!(documents.origin, Origin::Sample);
    assert_eq!(documents.note.unwrap(), "the hub was passed over: no network");

    // A folder with the training problems alone is a mistake, not a reason to look elsewhere.
    let error =
        gsm8k.documents(&DataSource::new(Some(dir.path().to_path_buf())), None).unwrap_err().to_string();
    assert!(error.contains("test problems") && error.contains("gsm8k/test.jsonl"), "{error}");
}

#[test]
fn parquet_files_of_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (from, to) in [
        ("truthfulqa_mc", "truthfulqa/multiple_choice/validation-00000-of-00001"),
        ("coqa", "coqa/data/validation-00000-of-00001"),
        ("openbookqa", "openbookqa/main/test-00000-of-00001"),
    ] {
        let to = dir.path().join(format!("{to}.parquet"));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(fixtures.join(format!("{from}.parquet")), to).unwrap();
    }
    let source = DataSource::new(Some(dir.path().to_path_buf()));
    let first = |task: &str| Suite::find(task).unwrap().documents(&source, Some(1)).unwrap().docs.remove(0);
    let mc2 = first("truthfulqa_mc2");
    assert_eq!(mc2.reference, tasks::Reference::Labels(vec![true, true, false]));
    let Request::Choices(choices) = mc2.request else { panic!("choices") };
    assert!(
        choices[1].context.ends_with("Q: Can a kettle sing?\nA:")
            && choices[1].continuation == " It whistles."
    );
    let Request::Turns(turns) = first("coqa").request else { panic!("turns") };
    assert_eq!(
        turns.prompts[1],
        "Ann has a red boat.\n\nQ: Who has a boat?\n\nA: Ann\n\nQ: Which colour?\n\nA:"
    );
    assert_eq!(first("openbookqa").reference, tasks::Reference::Label { label: 0, lengths: vec![4, 4] });
    let error = Suite::find("openbookqa").unwrap().documents(&source, None).unwrap_err().to_string();
    let expected = "test-00000-of-00001.parquet, row 2, field `answerKey`: expected a string, found nothing";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn the_hub_s_cache_is_used_and_its_absence_noted() {
    let cache = tempfile::tempdir().unwrap();
    let hub = |offline| minicache_models::Hub {
        endpoint: "http://127.0.0.1:1".to_string(),
        cache: cache.path().to_path_buf(),
        token: None,
        offline,
        progress: false,
    };
    let suite = || Suite::find("openbookqa").unwrap();
    let source =
        |offline| DataSource::sample_only().with_hub(std::sync::Arc::new(HubData::new(hub(offline))));
    let unreachable = suite().documents(&source(false), None).unwrap();
    assert_eq!(unreachable.origin, Origin::Sample);
    assert!(unreachable.note.unwrap().contains("no connection to http://127.0.0.1:1"));
    assert!(suite().documents(&source(true), None).unwrap().note.unwrap().contains("HF_HUB_OFFLINE is set"));

    let repo = cache.path().join("datasets--allenai--openbookqa");
    let snapshot = repo.join("snapshots/0123/main");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "0123").unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/openbookqa.parquet");
    fs::copy(fixture, snapshot.join("test-00000-of-00001.parquet")).unwrap();
    let cached = suite().documents(&source(true), Some(1)).unwrap();
    assert_eq!((cached.origin.label().as_str(), cached.note), ("hub allenai/openbookqa", None));
}

#[test]
fn longbench_out_of_a_zip_archive() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let mut archive = zip::ZipWriter::new(fs::File::create(dir.path().join("data.zip")).unwrap());
    archive.start_file("data/qasper.jsonl", zip::write::SimpleFileOptions::default()).unwrap();
    archive
        .write_all(b"{\"input\": \"Why {context}?\", \"context\": \"A {input} B\", \"answers\": [\"x\"], \"length\": 2}\n")
        .unwrap();
    archive.finish().unwrap();
    let source = DataSource::new(Some(dir.path().to_path_buf()));
    let documents = Suite::find("longbench/qasper").unwrap().documents(&source, None).unwrap();
    assert_eq!(documents.origin.label(), "files data.zip");
    let Request::Generate(request) = &documents.docs[0].request else { panic!("generation") };
    // Braces in the data are no placeholders.
    assert!(request.prompt.contains("Article: A {input} B\n\n Answer"));
    assert!(request.prompt.ends_with("Question: Why {context}?\n\nAnswer:"));
    // The archive has nothing of this task: the bundled sample does.
    assert_eq!(
        Suite::find("longbench/lcc").unwrap().documents(&source, None).unwrap().origin,
        Origin::Sample
    );
}

#[test]
fn bad_records_name_file_line_and_field() {
    let good = "{\"question\": \"q\", \"answer\": \"a\"}";
    let cases = [
        (
            "gsm8k/test.jsonl",
            format!("{good}\n{{\"question\": \"q\", \"answer\": 3}}\n"),
            "line 2, field `answer`: expected a string, found the number 3",
        ),
        ("gsm8k/test.jsonl", format!("{good}\n\n{{\"question\": \"q\"\n"), "line 3: not valid JSON"),
        ("gsm8k/test.jsonl", "[1]\n".to_string(), "line 1: expected an object, found a list of 1"),
        ("gsm8k/test.jsonl", String::new(), "holds no records"),
    ];
    let train = (good.to_string() + "\n").repeat(5);
    for (name, content, expected) in cases {
        let dir = folder_with(&[(name, &content), ("gsm8k/train.jsonl", &train)]);
        let source = DataSource::new(Some(dir.path().to_path_buf()));
        let error = Suite::find("gsm8k").unwrap().documents(&source, None).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    let others = [
        (
            "coqa",
            "coqa-dev-v1.0.json",
            "{\"data\": [{\"id\": \"x\", \"story\": \"s\", \"questions\": [], \"answers\": []}]}",
            "entry 1, field `questions.input_text`: expected at least one question",
        ),
        (
            "truthfulqa_gen",
            "TruthfulQA.csv",
            "Type,Question,Best Answer\na,b\n",
            "line 2: not valid CSV: 2 fields where the header has 3",
        ),
        (
            "truthfulqa_gen",
            "TruthfulQA.csv",
            "Question,Best Answer,Correct Answers\na,b,c\n",
            "line 2, field `Incorrect Answers`: expected a string, found nothing",
        ),
        (
            "truthfulqa_mc1",
            "mc_task.json",
            "[{\"question\": \"q\", \"mc1_targets\": {\"a\": 2}, \"mc2_targets\": {}}]",
            "entry 1, field `mc1_targets.a`: expected 0 or 1, found the number 2",
        ),
        (
            "piqa",
            "piqa/validation.jsonl",
            "{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 2}",
            "line 1, field `label`: expected a whole number from 0 to 1, found the number 2",
        ),
        ("rte", "rte/validation-00000-of-00001.parquet", "PAR0", "not a readable Parquet file"),
    ];
    for (task, name, content, expected) in others {
        let dir = folder_with(&[(name, content)]);
        let source = DataSource::new(Some(dir.path().to_path_buf()));
        let error = Suite::find(task).unwrap().documents(&source, None).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    let nowhere = DataSource::new(Some("no/such/folder".into()));
    let error = Suite::find("rte").unwrap().documents(&nowhere, None).unwrap_err().to_string();
    assert_eq!(error, "cannot read no/such/folder: no such folder");
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

#[test]
fn longbench_prompts_are_the_original_s() {
    // SHA-256 (beginning) of the prompts of the original's dataset2prompt.json, with C for the context and I for the
    // input.
    let digests = [
        ("narrativeqa", "d92d80eeed9452bd"),
        ("qasper", "008f205bc52848f6"),
        ("multifieldqa_en", "7ebff05abec8fbdb"),
        ("multifieldqa_zh", "b7764acc105b3be5"),
        ("hotpotqa", "cda679a7a6a28f4a"),
        ("2wikimqa", "cda679a7a6a28f4a"),
        ("musique", "cda679a7a6a28f4a"),
        ("dureader", "d62e3d7f7c3dfcb3"),
        ("gov_report", "b3a40b407578182f"),
        ("qmsum", "581862cfe5c53819"),
        ("multi_news", "e85c9a820fb7f1c0"),
        ("vcsum", "ac2abcb63552cfdc"),
        ("trec", "db3b7974abd1135f"),
        ("triviaqa", "fe49273bd96ca2ab"),
        ("samsum", "f8e017ce0f30cb07"),
        ("lsht", "dd54ae8eccd6e530"),
        ("passage_count", "0e6f7518939f4d13"),
        ("passage_retrieval_en", "cbe7ae0627c34b3a"),
        ("passage_retrieval_zh", "88d7ddb1a2c95c73"),
        ("lcc", "f5bfbe78e5d7bfec"),
        ("repobench-p", "e46c3e5f55fb6c77"),
    ];
    for (task, digest) in digests {
        let line = "{\"context\": \"C\", \"input\": \"I\", \"answers\": []}";
        let dir = folder_with(&[(&format!("{task}.jsonl"), line)]);
        let source = DataSource::new(Some(dir.path().to_path_buf()));
        let docs = Suite::find(task).unwrap().documents(&source, None).unwrap().docs;
        let Request::Generate(request) = &docs[0].request else { panic!("generation") };
        let ours: String =
            Sha256::digest(&request.prompt).iter().take(8).map(|b| format!("{b:02x}")).collect();
        assert_eq!(ours, digest, "{task}: {:?}", request.prompt);
    }
}
