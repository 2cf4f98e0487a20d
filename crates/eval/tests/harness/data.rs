//! Where data come from, and records that are not what they should be.

use std::fs;
use std::path::Path;

use minicache_eval::data::{DataSource, FetchError, HubData, HubFile, Origin};
use minicache_eval::tasks::{self, Request, Suite};

use crate::golden::{folder_with, shared};

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
