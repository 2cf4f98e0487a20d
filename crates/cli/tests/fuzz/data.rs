//! Data sets and predictions.

use std::fs;
use std::path::Path;

use minicache_eval::data::{DataSource, Format as Kind, records_from_bytes};
use minicache_eval::score::score_bytes;
use minicache_eval::tasks::{Suite, texts};

use crate::mutate::{Seeds, Shape, lines};
use crate::{Format, line};

const EVAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../eval");

/// Of each of these files below the bundled sample, its first lines.
fn samples(names: &[&str], count: usize) -> Vec<Vec<u8>> {
    names.iter().map(|name| lines(&fs::read_to_string(sample(name)).unwrap(), count)).collect()
}

fn sample(name: &str) -> std::path::PathBuf {
    Path::new(EVAL).join("sample").join(name)
}

const FIELDS: &[&str] = &[
    "\"question\":",
    "\"answer\":",
    "\"answers\":",
    "\"choices\":",
    "\"label\":",
    "\"goal\":",
    "\"sol1\":",
    "\"data\":",
    "\"story\":",
    "\"input_text\":",
    "\"questions\":",
    "\"additional_answers\":",
    "\"mc1_targets\":",
    "\"labels\":",
    "\"all_classes\":",
    "\"context\":",
    "\"input\":",
    "\"pred\":",
    "\"doc\":",
    "\"resps\":",
    "\"filtered_resps\":",
    "\"filter\":",
    "\"task\":",
    "\"reference\":",
    "\"prediction\":",
    "\"doc_id\":",
    "\"generated\":",
    "\"log_likelihoods\":",
    "{\"$number\": \"NaN\"}",
    "#### ",
    "#### -9,999.",
    "a ) 1 , b ) 2",
    "\"answerKey\": \"Z\"",
    "[[\"-1.0\", \"True\"]]",
    "[[\"nan\", \"False\"]]",
    "; ",
    "\"\"\"",
    "\u{feff}",
];

/// Files of one kind, read with all bounds.
fn records(kind: Kind, shape: Shape, files: Vec<Vec<u8>>) -> Format {
    let read = move |_, bytes: &[u8]| {
        let _ = records_from_bytes(kind, bytes.to_vec(), "m", Some(2));
        records_from_bytes(kind, bytes.to_vec(), "m", None).map(drop).map_err(line)
    };
    Format::new(Seeds { shape, files, words: FIELDS }, read)
}

pub(crate) fn json_lines(_: &Path) -> Format {
    records(Kind::JsonLines, Shape::Text, samples(&["gsm8k/test.jsonl", "piqa/validation.jsonl"], 4))
}

pub(crate) fn json(_: &Path) -> Format {
    let files = [
        r#"{"version": "1.0", "data": [{"id": "x", "story": "s", "questions": [{"input_text": "q", "turn_id": 1}], "answers": [{"input_text": "a"}]}]}"#,
        r#"[{"question": "q", "mc1_targets": {"a": 1, "b": 0}}, {"question": "r", "mc1_targets": {"c": 0, "d": 1}}]"#,
    ];
    records(Kind::Json, Shape::Text, files.map(|text| text.as_bytes().to_vec()).to_vec())
}

pub(crate) fn csv(_: &Path) -> Format {
    records(Kind::Csv, Shape::Text, samples(&["truthfulqa/TruthfulQA.csv"], 5))
}

pub(crate) fn zip(_: &Path) -> Format {
    records(Kind::Zip, Shape::Zip, samples(&["gsm8k/test.jsonl", "rte/validation.jsonl"], 3))
}

pub(crate) fn parquet(_: &Path) -> Format {
    let names = ["coqa.parquet", "openbookqa.parquet", "truthfulqa_mc.parquet"];
    let read = |name| fs::read(Path::new(EVAL).join("tests/fixtures").join(name)).unwrap();
    records(Kind::Parquet, Shape::Parquet, names.map(read).to_vec())
}

/// The files of data sets, as tasks and calibrations take them.
pub(crate) fn data_sets(dir: &Path) -> Format {
    const TASKS: [(&str, &str); 10] = [
        ("gsm8k", "gsm8k/test.jsonl"),
        ("gsm8k", "gsm8k/train.jsonl"),
        ("piqa", "piqa/validation.jsonl"),
        ("rte", "rte/validation.jsonl"),
        ("mathqa", "mathqa/test.jsonl"),
        ("openbookqa", "openbookqa/test.jsonl"),
        ("winogrande", "winogrande/validation.jsonl"),
        ("longbench/lcc", "longbench/lcc.jsonl"),
        ("longbench/trec", "longbench/trec.jsonl"),
        ("truthfulqa_gen", "truthfulqa/TruthfulQA.csv"),
    ];
    let mut tasks = TASKS.to_vec();
    let mut files = samples(&TASKS.map(|(_, file)| file), 3);
    tasks.push(("coqa", "coqa/coqa-dev-v1.0.json"));
    files.push(br#"{"data": [{"id": "x", "source": "s", "story": "A story.", "questions": [{"input_text": "q", "turn_id": 1}, {"input_text": "r", "turn_id": 2}], "answers": [{"input_text": "a", "turn_id": 1}, {"input_text": "b", "turn_id": 2}], "additional_answers": {"0": [{"input_text": "c"}, {"input_text": "d"}]}}]}"#.to_vec());
    tasks.push(("truthfulqa_mc2", "truthfulqa/mc_task.json"));
    files.push(
        br#"[{"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0, "c": 1}}]"#
            .to_vec(),
    );
    // A folder each, so that nothing else is found; training problems have test problems beside them.
    let folders: Vec<_> = (0..tasks.len()).map(|i| dir.join(i.to_string())).collect();
    for (folder, (_, file)) in folders.iter().zip(&tasks) {
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if file.ends_with("train.jsonl") {
            fs::copy(sample("gsm8k/test.jsonl"), path.with_file_name("test.jsonl")).unwrap();
        }
    }
    let read = move |seed: usize, bytes: &[u8]| {
        let (task, file) = tasks[seed];
        fs::write(folders[seed].join(file), bytes).unwrap();
        let source = DataSource::new(Some(folders[seed].clone()));
        let _ = texts(task, &source, Some(2));
        Suite::find(task).map_err(line)?.documents(&source, None).map(drop).map_err(line)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: FIELDS }, read)
}

pub(crate) fn predictions(_: &Path) -> Format {
    const LINES: &[(&str, &str)] = &[
        ("lcc", r#"{"pred": "x = 1\ny", "answers": ["x = 2"], "all_classes": null, "length": 1}"#),
        ("trec", r#"{"pred": "Number", "answers": ["Number"], "all_classes": ["Number", "Date"]}"#),
        ("longbench/gov_report", r#"{"pred": "the report finds that", "answers": ["a report found that"]}"#),
        ("longbench/multifieldqa_zh", r#"{"pred": "修谱的人", "answers": ["人"]}"#),
        (
            "gsm8k",
            r#"{"doc_id": 0, "doc": {"question": "q", "answer": "so\n\#### 1,000"}, "resps": [["The answer is 1000."]], "filter": "strict-match"}"#,
        ),
        ("gsm8k", r#"{"reference": {"answer": "1"}, "prediction": {"generated": ["\#### 1"]}}"#),
        (
            "piqa",
            r#"{"doc": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, "resps": [[["-1.5", "False"]], [["-2.5", "True"]]]}"#,
        ),
        (
            "rte",
            r#"{"reference": {"label": {"label": 0, "lengths": [1, 1]}}, "prediction": {"log_likelihoods": [-1.5, "NaN"]}}"#,
        ),
        (
            "truthfulqa_mc2",
            r#"{"reference": {"labels": [1, 0, 1]}, "prediction": {"log_likelihoods": [-1.5, -2.5, -3]}}"#,
        ),
        (
            "truthfulqa_gen",
            r#"{"doc": {"question": "q", "best_answer": "a b", "correct_answers": ["a b", "c"], "incorrect_answers": ["d e"]}, "resps": [["a b c"]]}"#,
        ),
        (
            "coqa",
            r#"{"doc": {"id": "i", "story": "s", "questions": {"input_text": ["q", "r"]}, "answers": {"input_text": ["a", "b"]}, "additional_answers": {}}, "resps": [["a"]]}"#,
        ),
        (
            "longbench",
            r#"{"task": "longbench/lcc", "reference": {"answers": ["x"]}, "prediction": {"generated": ["x"]}}"#,
        ),
    ];
    let files = LINES
        .iter()
        .map(|(_, text)| format!("{}\n", text.replace("\\#", "#")).repeat(2).into_bytes())
        .collect();
    let read = |seed: usize, bytes: &[u8]| score_bytes(LINES[seed].0, bytes).map(drop).map_err(line);
    Format::new(Seeds { shape: Shape::Text, files, words: FIELDS }, read)
}
