//! Data and predictions as people and other programs leave them, and as nobody should: what Python reads is read, what is
//! damaged, too large or something else is named, and nothing is read that was not asked for.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

use minicache_eval::data::{DataSource, Format, records_from_bytes};
use minicache_eval::score::{score_bytes, score_file};
use minicache_eval::tasks::{Documents, Output, Reference, Suite, Tally, texts};
use sha2::{Digest as _, Sha256};

/// The cases beside the checkout, if there.
fn case(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases").join(path);
    path.exists().then_some(path)
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

fn documents(task: &str, dir: &Path, limit: Option<usize>) -> Result<Documents, String> {
    let source = DataSource::new(Some(dir.to_path_buf()));
    Suite::find(task).unwrap().documents(&source, limit).map_err(|e| e.to_string())
}

fn zipped(member: &str, bytes: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
    archive.write_all(bytes).unwrap();
    archive.finish().unwrap().into_inner()
}

const GOOD: &str = "{\"question\": \"q\", \"answer\": \"#### 1\"}\n";

#[test]
fn no_more_is_read_than_is_asked_for() {
    let (problems, oops) = (GOOD.repeat(3) + "oops\n", GOOD.repeat(5) + "oops\n");
    let dir =
        folder_with(&[("gsm8k/test.jsonl", problems.as_bytes()), ("gsm8k/train.jsonl", oops.as_bytes())]);
    let three = documents("gsm8k", dir.path(), Some(3)).unwrap();
    assert_eq!(three.docs.len(), 3);
    let error = documents("gsm8k", dir.path(), Some(4)).unwrap_err();
    assert!(
        error.contains("test.jsonl, line 4: not valid JSON: expected a value, found `o` (column 1)"),
        "{error}"
    );
    let source = DataSource::new(Some(dir.path().to_path_buf()));
    assert_eq!(texts("gsm8k", &source, Some(2)).unwrap().docs.len(), 2);
    // The whole file makes the fingerprint all the same: it is part of the keys of committed results.
    let hashed = ["test problems", &problems, "training problems", &oops].concat();
    let digest: String = Sha256::digest(hashed).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(three.fingerprint, digest);
    fs::write(dir.path().join("gsm8k/test.jsonl"), GOOD.repeat(4)).unwrap();
    assert_ne!(documents("gsm8k", dir.path(), Some(3)).unwrap().fingerprint, three.fingerprint);

    let entries = "[{\"a\": 1}, {\"a\": 2}, oops";
    for (format, bytes) in [
        (Format::Json, entries.as_bytes().to_vec()),
        (Format::Json, format!("{{\"version\": 1, \"data\": {entries}").into_bytes()),
        (Format::Csv, b"a\n1\n2\n1,2\n".to_vec()),
        (Format::Zip, zipped("m", b"{\"a\": 1}\n{\"a\": 2}\noops\n")),
    ] {
        let read = |limit| records_from_bytes(format, bytes.clone(), "m", limit);
        assert_eq!(read(Some(2)).unwrap().len(), 2, "{format:?}");
        assert!(read(Some(3)).is_err() && read(None).is_err(), "{format:?}");
    }
    let parquet =
        |limit| records_from_bytes(Format::Parquet, fixture("openbookqa.parquet"), "", limit).unwrap().len();
    assert_eq!((parquet(Some(1)), parquet(None)), (1, 2));
}

#[test]
fn a_few_rows_of_millions_are_read_at_once() {
    let Some(dir) = case("hostile/parquet_20_million_rows") else { return };
    let start = Instant::now();
    assert_eq!(documents("gsm8k", &dir, Some(3)).unwrap().docs.len(), 3);
    let error = documents("gsm8k", &dir, None).unwrap_err();
    assert!(error.contains("test-0.parquet") && error.contains("1000000 records"), "{error}");
    // Half a second on an idle machine, most of it for the million.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn what_python_writes_is_read() {
    let lines = "\u{feff}{\"goal\": \"\\ud800g\", \"goal\": \"g\", \"sol1\": \"\\ude00\", \"sol2\": \"b\", \"label\": 1, \
                 \"x\": NaN, \"y\": [1e400, -Infinity], \"z\": 123456789012345678901234567890}\r\n\r\n";
    let dir = folder_with(&[("piqa/validation.jsonl", lines.as_bytes())]);
    let docs = documents("piqa", dir.path(), None).unwrap().docs;
    assert_eq!(docs[0].reference, Reference::Label { label: 1, lengths: vec![1, 1] });
    for (field, value, expected) in [
        ("goal", "NaN", "field `goal`: expected a string, found the number NaN"),
        ("sol1", "null", "field `sol1`: expected a string, found null"),
        ("label", "Infinity", "field `label`: expected a whole number from 0 to 1, found the number inf"),
        ("label", "1e999", "found the number inf"),
        ("label", "99999999999999999999", "found the number 1"),
    ] {
        let mut fields = vec![("goal", "\"g\""), ("sol1", "\"a\""), ("sol2", "\"b\""), ("label", "0")];
        fields.push((field, value));
        let line: Vec<String> = fields.iter().map(|(k, v)| format!("\"{k}\": {v}")).collect();
        let dir = folder_with(&[("piqa/validation.jsonl", format!("{{{}}}", line.join(", ")).as_bytes())]);
        let error = documents("piqa", dir.path(), None).unwrap_err();
        assert!(error.contains("validation.jsonl, line 1") && error.contains(expected), "{error}");
    }
}

#[test]
fn what_is_no_text_is_named() {
    let utf16: Vec<u8> = GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec();
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03rest".to_vec();
    for (bytes, expected) in [
        (utf16, "is UTF-16 text"),
        (pointer, "Git LFS pointer"),
        (gzip, "compressed with gzip"),
        (zipped("m", b"x"), "ZIP archive"),
        (fixture("coqa.parquet"), "Parquet file"),
    ] {
        for format in [Format::JsonLines, Format::Json, Format::Csv] {
            let error = records_from_bytes(format, bytes.clone(), "m", None).unwrap_err().to_string();
            assert!(error.starts_with("input: ") && error.contains(expected), "{format:?}: {error}");
        }
        let error = score_bytes("gsm8k", &bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\n";
    for format in [Format::Parquet, Format::Zip] {
        let error = records_from_bytes(format, pointer.to_vec(), "m", None).unwrap_err().to_string();
        assert!(error.contains("Git LFS"), "{format:?}: {error}");
    }
    let bad = records_from_bytes(Format::JsonLines, b"{}\n\xff".to_vec(), "", None).unwrap_err().to_string();
    assert_eq!(bad, "input, line 2: not UTF-8 text");
    let steering = b"{\"a\x1b\": 1, \"\\u001b[2J\": 2}".to_vec();
    assert!(records_from_bytes(Format::JsonLines, steering, "", None).is_err());
    let error = score_bytes("gsm8k", b"{\"\\u001b[2J\": 2}").unwrap_err().to_string();
    assert!(!error.contains('\u{1b}') && error.contains("\\u{1b}[2J"), "{error}");
}

#[test]
fn sizes_are_bounded() {
    let refused = |format, bytes: Vec<u8>, limit, expected: &str| {
        let error = records_from_bytes(format, bytes, "m", limit).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    // 65 MiB in one line, out of 65 KiB.
    refused(Format::Zip, zipped("m", &vec![b' '; 65 << 20]), None, "line 1: longer than 64 MiB");
    refused(
        Format::JsonLines,
        format!("{{\"a\": {}", "[".repeat(1 << 20)).into_bytes(),
        Some(1),
        "nested more than",
    );
    refused(Format::Json, format!("[{{\"a\": {}", "{\"a\":".repeat(1 << 20)).into_bytes(), Some(1), "nested");
    refused(Format::Csv, ",".repeat(5000).into_bytes(), Some(1), "more than 4096 columns");
    refused(Format::Json, format!("[{}1]", "[".repeat(100)).into_bytes(), None, "entry 1");
    refused(Format::Zip, zipped("n", b"{}"), None, "holds no file m");
    // Empty cells weigh more in memory than in the file.
    let header: Vec<String> = (0..4000).map(|i| i.to_string()).collect();
    let rows = (",".repeat(3999) + "\n").repeat(2000);
    refused(Format::Csv, (header.join(",") + "\n" + &rows).into_bytes(), None, "512 MiB of records");
}

/// Panics inside of a guard are errors: nothing is printed of them.
fn quiet() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !minicache_config::guard::is_active() {
                usual(info);
            }
        }));
    });
}

#[test]
fn damaged_files_are_errors() {
    quiet();
    if let Some(path) = case("hostile/damaged.parquet") {
        let dir = folder_with(&[("openbookqa/test.parquet", &fs::read(path).unwrap())]);
        let error = documents("openbookqa", dir.path(), None).unwrap_err();
        assert!(error.contains("test.parquet"), "{error}");
    }
    let archive = zipped("m", &GOOD.repeat(20).into_bytes());
    for (format, bytes) in [
        (Format::Parquet, fixture("openbookqa.parquet")),
        (Format::Parquet, fixture("coqa.parquet")),
        (Format::Zip, archive),
    ] {
        let longest = (0..bytes.len()).map(|at| {
            let mut damaged = bytes.clone();
            damaged[at] ^= [0x01, 0x80, 0xff, 0x10][at % 4];
            let start = Instant::now();
            if let Err(e) = records_from_bytes(format, damaged, "m", None) {
                assert!(e.to_string().contains("input"), "{e}");
            }
            let cut = records_from_bytes(format, bytes[..at].to_vec(), "m", None);
            assert!(cut.is_err(), "{format:?} cut at {at}");
            start.elapsed()
        });
        let longest = longest.max().unwrap();
        assert!(longest < Duration::from_secs(10), "{format:?}: {longest:?}");
    }
}

#[test]
fn predictions_that_are_null_or_no_number() {
    let error = |task: &str, line: &str| score_bytes(task, line.as_bytes()).unwrap_err().to_string();
    for (task, line, expected) in [
        (
            "lcc",
            r#"{"pred": null, "answers": ["x"]}"#,
            "input, line 1, field `pred`: expected a string, found null",
        ),
        (
            "lcc",
            r#"{"pred": NaN, "answers": ["x"]}"#,
            "field `pred`: expected a string, found the number NaN",
        ),
        (
            "lcc",
            r#"{"pred": "x", "answers": null}"#,
            "field `answers`: expected a list of strings, found null",
        ),
        (
            "lcc",
            r#"{"pred": "x", "answers": ["x", null]}"#,
            "field `answers.1`: expected a string, found null",
        ),
        ("gsm8k", r#"{"doc": null, "resps": [["x"]]}"#, "line 1, doc: expected an object, found null"),
        (
            "gsm8k",
            r#"{"doc": {"question": "q", "answer": "a"}, "resps": null}"#,
            "field `resps`: expected a list of responses, found null",
        ),
        (
            "gsm8k",
            r#"{"doc": {"question": "q", "answer": "a"}, "resps": [[null]]}"#,
            "field `resps.0.0`: expected a generated text, found null",
        ),
        (
            "gsm8k",
            r#"{"reference": {"answer": "1"}, "prediction": null}"#,
            "field `prediction`: expected a prediction",
        ),
        ("gsm8k", r#"{"reference": {"answer": "1"}, "prediction": {"generated": [null]}}"#, "null"),
        ("gsm8k", "null", "line 1: expected an object, found null"),
    ] {
        let error = error(task, line);
        assert!(error.contains(expected), "{error}");
    }
    let doc = r#""doc": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    assert!(
        error("piqa", &format!(r#"{{{doc}, "resps": [[["-1", "True"]], [[null]]]}}"#))
            .contains("`resps.1.0.0`")
    );
    // numpy's argmax takes the first that is not a number for the largest.
    for (pair, acc) in [
        (r#"[["nan", "False"]], [["-1.0", "False"]]"#, 1.0),
        (r#"[[NaN, false]], [[0.5, false]]"#, 1.0),
        (r#"[[-1.5, false]], [[NaN, false]]"#, 0.0),
        (r#"[["-Infinity", "False"]], [["-1e400", "False"]]"#, 1.0),
        (r#"[[-Infinity, false]], [[-2, false]]"#, 0.0),
    ] {
        let line = format!("{{{doc}, \"resps\": [{pair}], \"acc\": NaN}}");
        assert_eq!(score_bytes("piqa", line.as_bytes()).unwrap().metrics["acc"], acc, "{pair}");
    }
}

#[test]
fn the_cases_come_out_as_they_should() {
    let score = |task: &str, name: &str| case(name).map(|path| score_file(task, &path));
    let Some(blank) = score("longbench/2wikimqa", "crlf_bom_blank.jsonl") else { return };
    assert_eq!(blank.unwrap().metrics["score"], 50.0);
    assert_eq!(score("longbench/2wikimqa", "empty_pred.jsonl").unwrap().unwrap().metrics["score"], 0.0);
    let error = score("longbench/2wikimqa", "null_pred.jsonl").unwrap().unwrap_err().to_string();
    assert!(
        error.ends_with("null_pred.jsonl, line 1, field `pred`: expected a string, found null"),
        "{error}"
    );
    let nan = score("truthfulqa_mc2", "nan_metric_lm_eval.jsonl").unwrap().unwrap();
    assert!(nan.metrics["acc"].is_finite());
}

#[test]
fn samples_with_scores_that_are_no_numbers_come_back() {
    let output = Output::LogLikelihoods(vec![f64::NAN, f64::NEG_INFINITY, -1.5]);
    let text = serde_json::to_string(&output).unwrap();
    assert_eq!(text, r#"{"log_likelihoods":["NaN","-Infinity",-1.5]}"#);
    let Output::LogLikelihoods(back) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
    assert!(back[0].is_nan() && back[1..] == [f64::NEG_INFINITY, -1.5]);
    let tally: Tally = serde_json::from_str(&serde_json::to_string(&Tally::one(f64::NAN)).unwrap()).unwrap();
    assert!(tally.sum.is_nan() && tally.count == 1.0);
    assert_eq!(serde_json::to_string(&Tally::one(0.5)).unwrap(), r#"{"sum":0.5,"count":1.0}"#);
    for values in [r#"["NaN", -1.0]"#, "[NaN, -1.0]"] {
        let line = format!(
            r#"{{"reference": {{"label": {{"label": 0, "lengths": [1, 1]}}}}, "prediction": {{"log_likelihoods": {values}}}}}"#
        );
        assert_eq!(score_bytes("rte", line.as_bytes()).unwrap().metrics["acc"], 1.0);
    }
}
