//! Runs of whole experiments: what they leave, and that nothing is computed twice.

use std::fs;
use std::path::PathBuf;

use crate::{Place, text, untimed, walk};

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

#[test]
fn a_model_is_loaded_once_for_experiments_that_follow_each_other() {
    let place = Place::new();
    place.write("s.toml", SIMILARITY);
    let args = ["run", "e.toml", "s.toml", "--limit", "1"];
    let said = text(&place.run(&args).stderr);
    assert_eq!(said.matches("loading").count(), 1, "{said}");
    place.done(&["run", "e.toml", "--limit", "1", "--results", "apart"]);
    place.done(&["run", "s.toml", "--limit", "1", "--results", "apart"]);
    for id in ["e", "s"] {
        let cells = |dir: &str| untimed(&place.path(dir).join("sample").join(id).join("cells.csv"));
        assert_eq!(cells("results"), cells("apart"));
    }
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
