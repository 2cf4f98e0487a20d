//! What models are asked.

use minicache_eval::data::DataSource;
use minicache_eval::tasks::{self, Output, Request, Suite};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::golden::{folder_with, json_lines, shared, text};

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
