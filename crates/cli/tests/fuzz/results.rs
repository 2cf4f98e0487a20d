//! Results folders: what reports read, and what a run goes on from.

use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use minicache_config::{Experiment, ModelInfo, RunInfo};
use minicache_eval::store::{Row, Store, digest};
use minicache_eval::tasks::{Output, Reference, Tally};
use serde::{Deserialize, Serialize};

use crate::mutate::{Seeds, Shape, checked};
use crate::{Format, Outcome, line};

const SWEEP: &str = r#"
id = "fig1b"
title = "Merged layers"
kind = "accuracy"
models = ["tiny"]
tasks = ["gsm8k"]
variants = [{ name = "full", cache = { method = "full" } }, { cache = { method = "minicache" } }]
[[paper]]
csv = "paper.csv"
claim = "Deep layers are alike."
[[claims]]
text = "kept"
paper = "no loss"
needs = { rule = "kept", which = { variant = "minicache", at = { merged_share = 0.5 } }, within = 0.05 }
[[claims]]
text = "best"
paper = "4"
needs = { rule = "best", variant = "minicache", key = "cache.start_layer", value = 4 }
[[plots]]
name = "merged"
x = "merged_layers"
y = "score"
series = ["variant"]
band = "score_std"
paper_x = "merged_layers"
paper_y = ["coqa", "gsm8k"]
"#;

const ROWS: &str = r#"key,model,task,variant,cache.start_layer,cache,score,score_lo,score_hi,score_std,samples,ratio,bytes,seconds
k0,tiny,gsm8k,full,,"{""method"":""full""}",0.40,0.30,0.50,0.1,24,1,4096,2
k1,tiny,gsm8k,minicache,4,"{""method"":""minicache"",""start_layer"":4,""quant"":{""bits"":4}}",0.39,0.29,0.49,,24,1.3,3150,2
k2,tiny,gsm8k,minicache,6,"{""method"":""minicache"",""start_layer"":6}",0.40,0.30,0.50,0.2,24,1.1,3700,2
"#;

const FIDELITY: &str = r#"
id = "fidelity"
kind = "fidelity"
models = ["tiny"]
tasks = ["text"]
[[plots]]
name = "frontier"
kind = "scatter"
x = "ratio"
y = "kl"
series = ["variant"]
log_y = true
[[plots]]
name = "bars"
kind = "bar"
x = "task"
y = "kl"
series = ["variant"]
"#;

const FIDELITY_ROWS: &str = r#"key,model,task,variant,cache,ratio,perplexity,kl,agreement,samples,seconds
a,tiny,text,full,"{""method"":""full""}",1,9.14,0,1,4,1
b,tiny,text,mean,"{""method"":""mean""}",1.3,20.29,0.79,0.63,4,1
c,tiny,text,kivi,"{""method"":""kivi"",""quant"":{""bits"":2}}",4.6,11.3,0.2,0.81,4,1
"#;

const PAPER: &str = "# read off the figure; +-0.5\nmodel,merged_layers,coqa,gsm8k\nLLaMA-2-7B,0,60.1,14\nLLaMA-2-7B,8,58,\nLLaMA-2-7B,16,22.5,3\n";

/// Columns, numbers and keys of results.
const WORDS: &[&str] = &[
    "key",
    "model",
    "task",
    "variant",
    "cache",
    "cache.start_layer",
    "samples",
    "seconds",
    "ratio",
    "kl",
    "score",
    "score_lo",
    "diff",
    "diff_hi",
    "\"claims\":",
    "\"rule\": \"best\"",
    ",,",
    ",",
    "\"",
    "\"\"",
    "\n",
    "#",
    "1e308",
    "-1e308",
    "5e-324",
    "1e-300",
    "0",
    "NaN",
    "inf",
    "\"{\"\"method\"\":\"\"minicache\"\"}\"",
    "../../x",
    "\"planned\":",
    "\"keys\": [\"k0\"],",
    "\"finished\": true",
    "\"plots\":",
    "\"kind\": \"heatmap\"",
    "\"kind\": \"bar\"",
    "\"kind\": \"scatter\"",
    "\"log_y\": true",
    "\"log_x\": true",
    "\"x\":",
    "\"y\":",
    "\"filter\":",
    "\"series\": []",
    "\"layers\": 0",
    "\"id\":",
    "\"../x\"",
    "\"name\": \"a/b\"",
    "\"rows\":",
    "\"outdated\":true",
    "|",
    "\"at\":",
    "\"of\":",
    "\"sum\":\"",
    "\"lengths\":[]",
    "\"scores\":{}",
];

fn info(toml: &str) -> RunInfo {
    RunInfo {
        command: "minicache run x.toml".into(),
        experiment: Experiment::from_toml(toml, &[], None).unwrap(),
        origins: [("gsm8k".to_string(), "bundled sample".to_string())].into_iter().collect(),
        models: [(
            "tiny".to_string(),
            ModelInfo { label: "Tiny-8".into(), layers: Some(8), ..ModelInfo::default() },
        )]
        .into(),
        chosen: IndexMap::new(),
        calibrations: IndexMap::new(),
        machine: "2 cores".into(),
        device: String::new(),
        simd: "avx2".into(),
        date: "2025-01-31".into(),
        planned: 3,
        keys: Vec::new(),
        finished: true,
    }
}

/// Two experiments, each in a results folder of its own, and the paper's table.
fn experiments(dir: &Path) -> Vec<PathBuf> {
    fs::write(dir.join("paper.csv"), PAPER).unwrap();
    let folder = |(toml, rows): (&str, &str)| {
        let info = info(toml);
        let folder = dir.join(format!("{}-results", info.experiment.id)).join(&info.experiment.id);
        fs::create_dir_all(&folder).unwrap();
        info.write(&folder).unwrap();
        fs::write(folder.join("cells.csv"), rows).unwrap();
        let plain = folder.with_file_name("plain");
        fs::create_dir(&plain).unwrap();
        fs::write(plain.join("cells.csv"), "key,kl\nk,1\n").unwrap();
        folder
    };
    [(SWEEP, ROWS), (FIDELITY, FIDELITY_ROWS)].map(folder).to_vec()
}

/// Reports the folder as the neighbour of one without figures: it is read, and drawn for the page. Pixels take far longer
/// than all of that, so that only one in sixteen is reported for itself.
fn report(folder: &Path, paper: &Path, bytes: &[u8]) -> Outcome {
    let plain = folder.with_file_name("plain");
    let summary = minicache_plot::report(&plain, Some(paper)).map_err(line)?;
    if let Some(problem) = summary.problems.first() {
        return Err(line(problem));
    }
    if !bytes.len().is_multiple_of(16) {
        return Ok(());
    }
    minicache_plot::report(folder, Some(paper)).map(drop).map_err(line)
}

/// `file` of both experiments' folders is what is damaged.
fn reported(dir: &Path, file: &'static str) -> Format {
    let (folders, paper) = (experiments(dir), dir.to_path_buf());
    let files = folders.iter().map(|folder| fs::read(folder.join(file)).unwrap()).collect();
    let read = move |seed: usize, bytes: &[u8]| {
        fs::write(folders[seed].join(file), bytes).unwrap();
        report(&folders[seed], &paper, bytes)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: WORDS }, read)
}

pub(crate) fn rows(dir: &Path) -> Format {
    reported(dir, "cells.csv")
}

pub(crate) fn run_info(dir: &Path) -> Format {
    reported(dir, RunInfo::FILE)
}

pub(crate) fn paper(dir: &Path) -> Format {
    let (folders, paper) = (experiments(dir), dir.to_path_buf());
    let read = move |_, bytes: &[u8]| {
        fs::write(paper.join("paper.csv"), bytes).unwrap();
        report(&folders[0], &paper, bytes)
    };
    Format::new(Seeds { shape: Shape::Text, files: vec![PAPER.as_bytes().to_vec()], words: WORDS }, read)
}

/// A sample as a run writes it.
#[derive(Debug, Serialize, Deserialize)]
struct Sample {
    id: String,
    prediction: Output,
    reference: Reference,
    scores: IndexMap<String, Tally>,
    tokens: usize,
    seconds: f64,
}

/// Opens the folder as a run does that goes on.
fn go_on(dir: &Path) -> Outcome {
    let names: Row =
        [("model", "tiny"), ("task", "gsm8k")].map(|(k, v)| (k.to_string(), v.to_string())).into();
    let plan = [("k0".to_string(), names.clone()), ("key".to_string(), names)];
    let store = Store::open(dir, &plan, &["score", "seconds"]).map_err(line)?;
    store.others("model").for_each(drop);
    for key in ["k0", "key"] {
        let _ = (store.seconds(key, ""), store.made(key), store.rows(key));
    }
    let of = ["a", "b", "c"].iter().map(digest).collect();
    let samples = store.samples::<Sample>("key", of).map_err(line)?;
    samples.iter().for_each(drop);
    Ok(())
}

/// The files that a run goes on from, but for samples.
pub(crate) fn store(dir: &Path) -> Format {
    const NAMES: [&str; 3] = ["cells.csv", "other-cells.jsonl", "made.json"];
    const ASIDE: &str = concat!(
        r#"{"key":"k0","rows":[{"key":"k0","model":"tiny","task":"gsm8k","score":"0.4","samples":"3","seconds":"1.5"}]}"#,
        "\n",
        r#"{"key":"old","rows":[{"key":"old","model":"tiny","task":"gsm8k","score":"0.1","seconds":"2"},{"key":"old"}]}"#,
        "\n"
    );
    const MADE: &str = r#"{"k0": {"data": "bundled sample", "machine": "2 cores", "simd": "avx2", "date": "2025-01-31", "clone": "c", "outdated": true}, "k1": {}}"#;
    let files = [ROWS, ASIDE, MADE].map(|text| text.as_bytes().to_vec()).to_vec();
    for (name, bytes) in NAMES.iter().zip(&files) {
        fs::write(dir.join(name), bytes).unwrap();
    }
    let (dir, whole) = (dir.to_path_buf(), files.clone());
    let read = move |seed: usize, bytes: &[u8]| {
        fs::write(dir.join(NAMES[seed]), bytes).unwrap();
        let outcome = go_on(&dir);
        fs::write(dir.join(NAMES[seed]), &whole[seed]).unwrap();
        outcome
    };
    Format::new(Seeds { shape: Shape::Text, files, words: WORDS }, read)
}

pub(crate) fn samples(dir: &Path) -> Format {
    let rows = "key,model,task,samples\nkey,tiny,gsm8k,3\n";
    fs::write(dir.join("cells.csv"), rows).unwrap();
    let path = dir.join("samples/key.jsonl");
    fs::create_dir(path.parent().unwrap()).unwrap();
    let one = |(at, text): (usize, &str)| {
        let body = r#"{"id":"x","prediction":{"generated":["4"]},"reference":{"answer":"4"},"scores":{"exact_match":{"sum":1.0,"count":1.0}},"tokens":3,"seconds":0.5"#;
        format!("{body},\"at\":{at},\"of\":\"{}\",\"sum\":\"\"}}\n", digest(&text))
    };
    let text: String = ["a", "b", "c"].into_iter().enumerate().map(one).collect();
    let choices = text.replace(r#"{"generated":["4"]}"#, r#"{"log_likelihoods":["NaN",-1.5]}"#);
    let choices = choices.replace(r#"{"answer":"4"}"#, r#"{"label":{"label":0,"lengths":[1,2]}}"#);
    let files = [text, choices].map(|text| checked(text.as_bytes())).to_vec();
    let dir = dir.to_path_buf();
    let read = move |_, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        go_on(&dir)
    };
    Format::new(Seeds { shape: Shape::Checked, files, words: WORDS }, read)
}
