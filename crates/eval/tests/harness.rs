//! Data, prompts and scores against real files and golden values, where they lie beside the checkout.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use minicache_eval::data::DataSource;
use minicache_eval::tasks::{self, Request, Suite};
use serde_json::Value;

/// The development data beside the checkout, if there.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.exists().then_some(path)
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
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
                    assert_eq!(request.prompt, golden["prompt"].as_str().unwrap());
                    assert_eq!(serde_json::json!(request.until), golden["until"]);
                }
                Request::Choices(choices) => {
                    assert!(choices.iter().all(|c| c.context == golden["prompt"].as_str().unwrap()));
                    let continuations: Vec<_> = choices.iter().map(|c| c.continuation.as_str()).collect();
                    assert_eq!(serde_json::json!(continuations), golden["continuations"]);
                }
                Request::Turns(_) => panic!("no such golden file"),
            }
        }
    }
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
