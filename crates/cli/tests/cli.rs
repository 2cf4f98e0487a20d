//! The binary, end to end, on a tiny model with random weights.
#![allow(clippy::unwrap_used)]

#[path = "cli/bounds.rs"]
mod bounds;
#[path = "cli/calibration.rs"]
mod calibration;
#[path = "cli/commands.rs"]
mod commands;
#[path = "cli/compare.rs"]
mod compare;
#[path = "cli/disturbed.rs"]
mod disturbed;
#[path = "cli/model_files.rs"]
mod model_files;
#[path = "cli/prompts.rs"]
mod prompts;
#[path = "cli/same_numbers.rs"]
mod same_numbers;
#[path = "cli/saved_caches.rs"]
mod saved_caches;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use minicache_config::columns::{Role, role};
use tempfile::TempDir;

/// Folder of the tiny model in the fixtures of the models crate.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/llama3");
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer.json");

/// A folder with a model, an experiment and room for results.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        let model = place.path("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(Path::new(MODEL).join(name), model.join(name)).unwrap();
        }
        fs::copy(TOKENIZER, model.join("tokenizer.json")).unwrap();
        place.write("e.toml", EXPERIMENT);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minicache"));
        command.args(args).current_dir(self.dir.path());
        command.env_remove("MINICACHE_DATA").env("HF_HUB_OFFLINE", "1").env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that has to succeed and gives its stdout.
    fn done(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    /// Runs a command that has to fail with `code`, with every one of `words` in its one or two lines on stderr.
    fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let out = self.run(args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!((1..=2).contains(&said.lines().count()), "{args:?}: {said}");
        assert!(said.starts_with("minicache: ") && !said.contains("panicked"), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `cells.csv` without the columns that hold times.
fn untimed(path: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(path).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers().unwrap().clone();
    let keep: Vec<usize> = (0..headers.len()).filter(|&i| role(&headers[i]) != Role::Timing).collect();
    let pick = |r: &csv::StringRecord| keep.iter().map(|&i| r[i].to_string()).collect();
    std::iter::once(pick(&headers)).chain(reader.records().map(|r| pick(&r.unwrap()))).collect()
}

const EXPERIMENT: &str = r#"id = "e"
title = "A small experiment"
kind = "fidelity"
models = ["model"]
tasks = ["coqa", "gsm8k"]
limit = 6

[fidelity]
prefill = 48
continuation = 24

[cache]
method = "minicache"
start_layer = 0

[[variants]]
cache = { method = "full" }

[[variants]]
cache = { method = "mean" }

[[variants]]
name = "slerp"
sweep = { "cache.start_layer" = [0, 2], "cache.retention.gamma" = [0.0, 0.1] }

[profiles.small]
limit = 1

[[plots]]
name = "kl"
x = "ratio"
y = "kl"
series = ["variant"]
kind = "scatter"
"#;

const SIMILARITY: &str = r#"id = "s"
kind = "similarity"
models = ["model"]
tasks = ["gsm8k"]
limit = 3

[similarity]
tokens = 64
by_position = true

[cache]
method = "minicache"
start_layer = 0
"#;

const ACCURACY: &str = r#"id = "a"
kind = "accuracy"
models = ["model"]
tasks = ["gsm8k", "coqa", "truthfulqa", "longbench/lcc"]
limit = 3
limits = { coqa = 1, "longbench/lcc" = 1 }

[accuracy]
prompt_tokens = 40

[cache]
method = "minicache"
start_layer = 0

[[variants]]
cache = { method = "full" }

[[variants]]
name = "slerp"
sweep = { "cache.retention.gamma" = [0.0, 0.1] }

[[plots]]
name = "score"
kind = "bar"
x = "task"
y = "score"
series = ["variant"]
"#;

#[test]
fn a_run_leaves_rows_in_plan_order_and_a_report() {
    let place = Place::new();
    place.done(&["run", "e.toml"]);
    let rows = untimed(&place.path("results/sample/e/cells.csv"));
    assert_eq!(rows.len(), 1 + 2 * 6);
    let column = |name: &str| rows[0].iter().position(|c| c == name).unwrap();
    let (task, variant, kl, ratio) = (column("task"), column("variant"), column("kl"), column("ratio"));
    assert_eq!(rows[1][task], "coqa");
    assert_eq!(rows[7][task], "gsm8k");
    let variants: Vec<&str> = rows[1..7].iter().map(|r| r[variant].as_str()).collect();
    assert_eq!(variants, ["full", "mean", "slerp", "slerp", "slerp", "slerp"]);
    assert_eq!(rows[1][kl], "0", "the full cache is its own reference");
    assert!(rows[2][kl].parse::<f64>().unwrap() > 0.0);
    assert!(rows[3][ratio].parse::<f64>().unwrap() > rows[1][ratio].parse::<f64>().unwrap());
    assert_eq!(rows[0][column("cache.start_layer")], "cache.start_layer");
    assert!(
        place.path("results/sample/e/report.md").is_file() && place.path("results/sample/e/kl.png").is_file()
    );
    let info: serde_json::Value =
        serde_json::from_slice(&fs::read(place.path("results/sample/e/run.json")).unwrap()).unwrap();
    assert_eq!(info["finished"], true);
    assert_eq!(info["planned"], 12);
    assert!(info["command"].as_str().unwrap().contains("run e.toml"), "{info}");
    assert!(info["origins"]["coqa"].as_str().unwrap().contains("sample"), "{info}");
}

#[test]
fn a_second_run_does_nothing_and_changes_nothing() {
    let place = Place::new();
    place.write("s.toml", SIMILARITY);
    place.done(&["run", "e.toml", "s.toml"]);
    let files = |dir: &str| {
        let mut all: Vec<(PathBuf, Vec<u8>)> = walk(&place.path(dir));
        all.sort();
        all
    };
    let before = files("results");
    // Without weights nothing can be computed, so whatever is there was not computed again.
    fs::rename(place.path("model/model.safetensors"), place.path("model/away")).unwrap();
    fs::rename(place.path("model/away"), place.path("model/model.safetensors")).unwrap();
    place.done(&["run", "e.toml", "s.toml"]);
    assert!(before == files("results"), "a finished run was changed");
}

fn walk(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries
        .flat_map(|p| if p.is_dir() { walk(&p) } else { vec![(p.clone(), fs::read(&p).unwrap())] })
        .collect()
}

#[test]
fn two_runs_are_the_same_but_for_times() {
    let place = Place::new();
    place.write("s.toml", SIMILARITY);
    place.done(&["run", "e.toml", "s.toml", "--results", "one"]);
    place.done(&["run", "e.toml", "s.toml", "--results", "two"]);
    for id in ["e", "s"] {
        let cells = |dir: &str| untimed(&place.path(dir).join("sample").join(id).join("cells.csv"));
        assert_eq!(cells("one"), cells("two"));
    }
    place.done(&["run", "e.toml", "--results", "two", "--fresh"]);
    assert_eq!(
        untimed(&place.path("one/sample/e/cells.csv")),
        untimed(&place.path("two/sample/e/cells.csv"))
    );
}

const BENCH: &str = r#"id = "ID"
kind = "KIND"
models = ["MODEL"]

[bench]
context = [48, 300]
batch = [3, 1]
input = 12
output = 10
steps = 24
similarity = 0.7

[cache]
method = "minicache"

[[variants]]
cache = { method = "full" }

[[variants]]
name = "merged"
cache = { quant = { bits = 4, residual = 8 } }

[[variants]]
name = "H2O"
cache = { method = "h2o" }
"#;

fn bench(id: &str, model: &str) -> String {
    BENCH.replace("ID", id).replace("KIND", id).replace("MODEL", model)
}

#[test]
fn memory_and_overhead_need_no_weights() {
    let place = Place::new();
    place.write("m.toml", &bench("memory", "llama-3-8b"));
    place.write("o.toml", &bench("overhead", "model"));
    let said = place.done(&["run", "m.toml", "o.toml", "--dry-run"]);
    assert!(said.contains("memory: 3 cells, 0 finished\n"), "{said}");
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    place.write("model/model.safetensors", "");
    place.done(&["run", "m.toml", "--results", "one"]);
    place.done(&["run", "m.toml", "--results", "two"]);
    let rows = untimed(&place.path("one/sample/memory/cells.csv"));
    assert_eq!(rows, untimed(&place.path("two/sample/memory/cells.csv")));
    // Three caches, two contexts, two batch sizes.
    assert_eq!(rows.len(), 1 + 12);
    let column = |name: &str| rows[0].iter().position(|c| c == name).unwrap();
    let number = |row: &[String], name: &str| row[column(name)].parse::<f64>().unwrap();
    for row in &rows[1..] {
        let full = 2.0 * 2.0 * 32.0 * 1024.0 * number(row, "context") * number(row, "batch");
        assert_eq!(number(row, "full_bytes"), full);
        assert!((full / number(row, "bytes") - number(row, "ratio")).abs() < 1e-4, "{row:?}");
    }
    assert_eq!(rows[5][column("arithmetic")], "16 / 5 x 32/24 = 4.27x");
    assert!(place.path("one/sample/memory/report.md").is_file());

    place.done(&["run", "o.toml"]);
    let rows = untimed(&place.path("results/sample/overhead/cells.csv"));
    let steps: Vec<&str> = rows[1..5].iter().map(|r| r.last().unwrap().as_str()).collect();
    assert_eq!(steps, ["attention", "storage", "prompt", "token"]);
    assert!(rows.iter().any(|r| r.last().unwrap() == "retention"));
    let text = fs::read_to_string(place.path("results/sample/overhead/cells.csv")).unwrap();
    assert!(text.lines().next().unwrap().ends_with(",context,step,ms"), "{text}");
    place.write("o.toml", &bench("overhead", "model").replace("context = [48, 300]", "context = [0]"));
    place.fails(&["run", "o.toml"], 2, &["o.toml:6", "bench.context", "at least 1"]);
    place.write("o.toml", &bench("overhead", "model").replace("[bench]", "tasks = [\"gsm8k\"]\n[bench]"));
    place.fails(&["run", "o.toml"], 2, &["tasks", "no tasks"]);
}

#[test]
fn every_experiment_has_both_profiles_with_models_that_have_names() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../experiments");
    let registry = minicache_models::Registry::built_in().unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let load = |profile| minicache_config::Experiment::load(&path, &[], Some(profile)).unwrap();
        let (default, paper) = (load("default"), load("paper"));
        assert!(["default", "paper"].iter().all(|p| default.profiles.contains_key(*p)), "{}", path.display());
        for model in default.models.iter().chain(&paper.models) {
            assert!(registry.find(model).is_some(), "{}: {model}", path.display());
        }
        assert_ne!(default.models, paper.models, "{}", path.display());
        assert_eq!(Some(default.id.as_str()), path.file_stem().and_then(|s| s.to_str()));
        for paper in &default.paper {
            assert!(path.with_file_name("paper").join(&paper.csv).is_file(), "{}", paper.csv);
        }
        seen += 1;
    }
    assert!(seen >= 8, "{seen}");
}

#[test]
fn throughput_is_of_sequences_that_join_and_leave_and_stops_at_the_budget() {
    let place = Place::new();
    place.write("t.toml", &bench("throughput", "model"));
    place.done(&["run", "t.toml", "--results", "one"]);
    place.done(&["run", "t.toml", "--results", "two"]);
    let rows = untimed(&place.path("one/sample/throughput/cells.csv"));
    assert_eq!(rows, untimed(&place.path("two/sample/throughput/cells.csv")));
    let column = |name: &str| rows[0].iter().position(|c| c == name).unwrap();
    let number = |row: &[String], name: &str| row[column(name)].parse::<f64>().unwrap();
    let batches: Vec<f64> = rows[1..].iter().map(|r| number(r, "batch")).collect();
    assert_eq!(batches, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0]);
    // Every cache got the same requests.
    assert!(number(&rows[2], "joined") > 0.0);
    assert_eq!(rows[2][column("joined")], rows[4][column("joined")]);
    assert!(number(&rows[2], "peak_bytes") > number(&rows[1], "peak_bytes"));
    let weights = |r: &[String]| number(r, "memory_bytes") - number(r, "peak_bytes");
    assert!(weights(&rows[1]) > 0.0 && weights(&rows[1]) == weights(&rows[6]));

    let budget = number(&rows[1], "peak_bytes").to_string();
    place.done(&["run", "t.toml", "--results", "three", "--memory-budget", &budget]);
    let less = untimed(&place.path("three/sample/throughput/cells.csv"));
    let fits: Vec<&str> = less[1..3].iter().map(|r| r[column("fits")].as_str()).collect();
    assert_eq!(fits, ["yes", "no"]);
    assert_eq!(less[1][1..], rows[1][1..], "all but the key, which knows of the budget");
    assert!(less[2][column("peak_bytes")].is_empty());
    place.fails(&["run", "t.toml", "--memory-budget", "8 pounds"], 2, &["--memory-budget", "GiB"]);
}

/// Runs a command again and again, killed after longer and longer waits, until it ends by itself; gives the kills.
fn kill_until_done(place: &Place, args: &[&str]) -> usize {
    let mut kills = 0;
    let mut wait = Duration::from_millis(40);
    loop {
        let mut child = place.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(wait);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return kills;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        wait += Duration::from_millis(20);
    }
}

#[test]
fn a_killed_run_goes_on_and_ends_the_same() {
    let place = Place::new();
    let args = ["run", "e.toml", "--limit", "24"];
    place.done(&[&args[..], &["--results", "whole"]].concat());
    let kills = kill_until_done(&place, &[&args[..], &["--results", "killed"]].concat());
    assert!(kills > 0, "the run was over before it could be killed");
    assert_eq!(
        untimed(&place.path("whole/sample/e/cells.csv")),
        untimed(&place.path("killed/sample/e/cells.csv"))
    );
}

#[test]
fn accuracy_runs_score_every_task_and_cache() {
    let place = Place::new();
    place.write("a.toml", ACCURACY);
    place.done(&["run", "a.toml", "--results", "one"]);
    let rows = untimed(&place.path("one/sample/a/cells.csv"));
    assert_eq!(rows.len(), 1 + 4 * 3);
    let of = |row: &[String], name: &str| row[rows[0].iter().position(|c| c == name).unwrap()].clone();
    let number = |row: &[String], name: &str| of(row, name).parse::<f64>().unwrap();
    for row in &rows[1..] {
        let (score, low, high) = (number(row, "score"), number(row, "score_lo"), number(row, "score_hi"));
        assert!(low <= score && score <= high, "{row:?}");
        assert!(number(row, "bytes") > 0.0 && number(row, "tokens") > 0.0);
    }
    for of_task in rows[1..].chunks(3) {
        // The full cache, and everything merged.
        assert!(number(&of_task[1], "ratio") > number(&of_task[0], "ratio"), "{of_task:?}");
        assert_eq!(of(&of_task[0], "diff"), "");
        for row in &of_task[1..] {
            let (diff, low, high) = (number(row, "diff"), number(row, "diff_lo"), number(row, "diff_hi"));
            // Scores are as the field rounds them.
            let scores = number(row, "score") - number(&of_task[0], "score");
            assert!((diff - scores).abs() < 0.02 && low <= diff && diff <= high, "{row:?}");
        }
    }
    assert_eq!(of(&rows[1], "score"), of(&rows[1], "exact_match,strict-match"));
    let samples = [1, 4, 7, 10].map(|i| of(&rows[i], "samples"));
    assert_eq!(samples, ["3", "1", "9", "1"], "of a group the sum of its tasks");
    assert_eq!(of(&rows[7], "score"), of(&rows[7], "gen_bleu_max"));
    assert!(of(&rows[7], "mc1_acc").parse::<f64>().is_ok(), "a column for each task of a group");
    assert_eq!(of(&rows[1], "mc1_acc"), "");
    let report = fs::read_to_string(place.path("one/sample/a/report.md")).unwrap();
    assert!(report.contains("bundled sample") && report.contains("at most 40 tokens"), "{report}");

    // Samples say what was asked and answered, and are scored again to the same numbers.
    let key = of(&rows[1], "key");
    let samples = place.path("one/sample/a/samples").join(format!("{key}.jsonl"));
    let said =
        place.done(&["score", "--task", "gsm8k", "--predictions", samples.to_str().unwrap(), "--json"]);
    let scored: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(scored["samples"], 3);
    assert_eq!(scored["metrics"]["exact_match,strict-match"].as_f64(), of(&rows[1], "score").parse().ok());

    place.done(&["run", "a.toml", "--results", "two"]);
    assert_eq!(rows, untimed(&place.path("two/sample/a/cells.csv")));
}

#[test]
fn a_killed_accuracy_run_goes_on_and_ends_the_same() {
    let place = Place::new();
    place.write("a.toml", ACCURACY);
    let args = ["run", "a.toml", "--limit", "6", "--set", "tasks=[\"gsm8k\", \"winogrande\"]"];
    let whole = place.path("whole/sample/a");
    place.done(&[&args[..], &["--results", "whole"]].concat());
    let kills = kill_until_done(&place, &[&args[..], &["--results", "killed"]].concat());
    assert!(kills > 0, "the run was over before it could be killed");
    assert_eq!(untimed(&whole.join("cells.csv")), untimed(&place.path("killed/sample/a/cells.csv")));
    for entry in fs::read_dir(whole.join("samples")).unwrap() {
        let path = entry.unwrap().path();
        let untimed = |path: &Path| -> Vec<serde_json::Value> {
            let text = fs::read_to_string(path).unwrap();
            let parse = |line: &str| {
                let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
                value["seconds"].take();
                value["sum"].take();
                value
            };
            text.lines().map(parse).collect()
        };
        assert_eq!(
            untimed(&path),
            untimed(&place.path("killed/sample/a/samples").join(path.file_name().unwrap()))
        );
    }
}

#[test]
fn a_smaller_plan_sets_cells_aside_and_a_larger_takes_them_back() {
    let place = Place::new();
    place.done(&["run", "e.toml"]);
    let all = fs::read(place.path("results/sample/e/cells.csv")).unwrap();
    place.done(&["run", "e.toml", "--profile", "small"]);
    assert_ne!(all, fs::read(place.path("results/sample/e/cells.csv")).unwrap());
    place.done(&["run", "e.toml"]);
    assert_eq!(
        all,
        fs::read(place.path("results/sample/e/cells.csv")).unwrap(),
        "seconds included: nothing ran again"
    );
}

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let place = Place::new();
    let said = place.done(&["run", "e.toml", "--dry-run", "--limit", "2"]);
    assert!(said.contains("12 cells") && said.contains("tokens"), "{said}");
    assert!(said.contains("cache.retention.gamma=0.1"), "{said}");
    let said = place.done(&["run", "e.toml", "--dry-run", "--tasks", "rte,lcc"]);
    assert!(said.contains("  rte  ") && said.contains("  lcc  ") && !said.contains("gsm8k"), "{said}");
    assert!(!place.path("results").exists());
}

#[test]
fn a_sweep_may_come_from_the_command_line() {
    let place = Place::new();
    place.done(&[
        "run",
        "e.toml",
        "--limit",
        "1",
        "--sweep",
        "cache.retention.gamma=0.3,0.4",
        "--set",
        "tasks=[\"gsm8k\"]",
    ]);
    let rows = untimed(&place.path("results/sample/e/cells.csv"));
    let gamma = rows[0].iter().position(|c| c == "cache.retention.gamma").unwrap();
    let values: Vec<&str> = rows[1..].iter().map(|r| r[gamma].as_str()).collect();
    assert_eq!(values, ["", "", "0.3", "0.4", "0.3", "0.4"]);
}

#[test]
fn bad_calls_are_refused_in_a_line() {
    let place = Place::new();
    place.fails(&["run"], 2, &["EXPERIMENT", "--help"]);
    place.fails(&["run", "e.toml", "--no-such-option"], 2, &["--no-such-option"]);
    place.fails(&["fly"], 2, &["fly"]);
    place.fails(&["run", "absent.toml"], 2, &["absent.toml", "cannot read"]);
    place.fails(&["run", "e.toml", "--limit", "0"], 2, &["--limit", "at least 1"]);
    place.fails(&["run", "e.toml", "--tasks", "rte,gsm9k"], 2, &["--tasks", "gsm9k"]);
    place.fails(&["run", "e.toml", "--limit", "many"], 2, &["--limit", "many"]);
    place.fails(&["run", "e.toml", "--profile", "huge"], 2, &["huge", "small"]);
    place.fails(&["run", "e.toml", "--set", "cache.t=2"], 2, &["cache.t", "0 to 1"]);
    place.fails(&["run", "e.toml", "--set", "cache.retention.gama=0"], 2, &["gama"]);
    place.fails(&["run", "e.toml", "--set", "limit"], 2, &["KEY=VALUE"]);
    place.fails(&["run", "e.toml", "--device", "abacus"], 2, &["abacus", "cpu"]);
    place.fails(&["run", "e.toml", "--threads", "0"], 2, &["--threads"]);
    place.fails(&["run", "e.toml", "--data", "nowhere"], 2, &["nowhere"]);
    place.fails(&["report", "nowhere"], 2, &["nowhere", "minicache run"]);
}

#[test]
fn bad_experiments_name_line_and_key() {
    let place = Place::new();
    let bad = |from: &str, to: &str, words: &[&str]| {
        assert!(EXPERIMENT.contains(from), "{from}");
        place.write("bad.toml", &EXPERIMENT.replace(from, to));
        place.fails(&["run", "bad.toml"], 2, words);
    };
    bad("limit = 6", "limt = 6", &["bad.toml:6", "limt"]);
    bad("limit = 6", "limit = \"six\"", &["bad.toml:6", "limit"]);
    bad("limit = 6", "limit = ", &["bad.toml:6"]);
    bad("\"fidelity\"", "\"fidelty\"", &["bad.toml:3", "fidelity"]);
    bad("start_layer = 0", "start_layer = 4", &["start_layer", "4 layers"]);
    bad("[0.0, 0.1]", "[0.0, 1.1]", &["bad.toml:24", "gamma", "0 to 1"]);
    bad("\"gsm8k\"", "\"gsm9k\"", &["gsm9k"]);
    bad("[\"model\"]", "[\"no-such-model\"]", &["no-such-model"]);
    bad("tasks = [\"coqa\", \"gsm8k\"]", "tasks = []", &["tasks"]);
    bad("prefill = 48", "prefill = 4000000", &["4000025 tokens", "fidelity.prefill"]);
}

#[test]
fn bad_files_are_named() {
    let place = Place::new();
    let weights = fs::read(place.path("model/model.safetensors")).unwrap();
    fs::write(place.path("model/model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    place.fails(&["run", "e.toml"], 2, &["model.safetensors"]);
    fs::write(place.path("model/model.safetensors"), b"").unwrap();
    place.fails(&["run", "e.toml"], 2, &["model.safetensors"]);
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    place.fails(&["run", "e.toml"], 2, &["model", "model.safetensors"]);
    fs::write(place.path("model/model.safetensors"), &weights).unwrap();

    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    place.write("model/config.json", "{");
    place.fails(&["run", "e.toml"], 2, &["config.json"]);
    place.write("model/config.json", &config.replace("\"llama\"", "\"lama\""));
    place.fails(&["run", "e.toml"], 2, &["lama"]);
    place.write("model/config.json", &config);

    fs::rename(place.path("model/tokenizer.json"), place.path("tokenizer.json")).unwrap();
    place.fails(&["run", "e.toml"], 2, &["tokenizer"]);
    fs::rename(place.path("tokenizer.json"), place.path("model/tokenizer.json")).unwrap();

    place.write(
        "data/gsm8k/test.jsonl",
        "{\"question\": \"1 + 1?\", \"answer\": \"#### 2\"}\n{\"question\": 3}\n",
    );
    place.write("data/gsm8k/train.jsonl", "{\"question\": \"1 + 1?\", \"answer\": \"#### 2\"}\n");
    place.fails(&["run", "e.toml", "--data", "data"], 2, &["test.jsonl", "2", "question"]);

    place.write("results/sample/e/cells.csv", "this,is\nno,store\n");
    place.fails(&["run", "e.toml"], 2, &["cells.csv", "remove the file"]);
}

#[test]
fn results_that_cannot_be_written_are_a_failure_not_a_mistake() {
    let place = Place::new();
    place.write("results/sample/e", "a file where the experiment's folder should be");
    place.fails(&["run", "e.toml"], 1, &["results/sample/e", "Not a directory"]);
}

#[test]
fn what_is_left_to_choice_is_chosen_on_calibration_text_and_recorded() {
    let place = Place::new();
    let words: Vec<String> = (0..900).map(|i| format!("w{}", (i * i + 7 * i) % 97)).collect();
    place.write("text.txt", &words.join(" "));
    let calibration = "calibration = { file = \"text.txt\", tokens = 512, chunk = 256 }";
    place.write(
        "auto.toml",
        &format!(
            r#"id = "auto"
kind = "fidelity"
models = ["model"]
tasks = ["gsm8k"]
limit = 2
fidelity = {{ prefill = 48, continuation = 8 }}

[[variants]]
name = "pairs"
cache = {{ method = "minicache", pairs = "auto", budget_ratio = 1.15, {calibration} }}

[[variants]]
name = "groups"
cache = {{ method = "latent", sinks = 0, k = {{ group = "auto" }}, v = {{ group = "auto" }}, budget_ratio = 3.0, {calibration} }}
"#
        ),
    );
    place.done(&["run", "auto.toml"]);
    let info: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(place.path("results/sample/auto/run.json")).unwrap())
            .unwrap();
    let chosen = |variant: &str| -> serde_json::Value {
        let text = info["chosen"][format!("{variant}, model")].as_str().unwrap();
        serde_json::from_str(text).unwrap()
    };
    let pairs = &chosen("pairs")["pairs"];
    let taken = |side: &str| pairs[side].as_array().unwrap().len();
    assert!((1..=3).contains(&(taken("keys") + taken("values"))), "{pairs}");
    let groups = chosen("groups");
    for side in ["k", "v"] {
        assert!([1, 2, 4].contains(&groups[side]["group"].as_u64().unwrap()), "{groups}");
        assert!(groups[side]["rate"].as_f64().unwrap() > 0.0, "{groups}");
    }
    // The report says so, and a second run changes nothing.
    let report = fs::read_to_string(place.path("results/sample/auto/report.md")).unwrap();
    assert!(report.contains("Chosen for pairs, model"), "{report}");
    let before = fs::read(place.path("results/sample/auto/run.json")).unwrap();
    place.done(&["run", "auto.toml"]);
    assert_eq!(fs::read(place.path("results/sample/auto/run.json")).unwrap(), before);
}
