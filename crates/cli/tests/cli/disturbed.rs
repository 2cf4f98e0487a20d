//! Signals, full disks: what a run leaves when it is disturbed. `scripts/crash-test` does the same at length.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Place, text, untimed, walk};

/// The names of all files below `dir`, but for the folder's own id.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let relative = |path: &Path| path.strip_prefix(dir).unwrap().display().to_string();
    let mut names: Vec<String> = walk(dir).iter().map(|(path, _)| relative(path)).collect();
    names.retain(|name| name != ".clone");
    names.sort();
    names
}

pub(crate) fn start(place: &Place, args: &[&str]) -> Child {
    place.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until `is_there`, which a run comes to before it ends.
pub(crate) fn wait_for(child: &mut Child, is_there: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

const RUN: [&str; 6] = ["run", "e.toml", "--limit", "24", "--results", "disturbed"];

#[test]
fn a_signal_finishes_what_is_at_hand_and_says_how_to_go_on() {
    let place = Place::new();
    place.done(&["run", "e.toml", "--limit", "24", "--results", "whole"]);
    for (name, code) in [("-INT", 130), ("-TERM", 143), ("-USR1", 138)] {
        // What an earlier one left would be taken for the sign that this one is at work.
        let _ = fs::remove_dir_all(place.path("disturbed"));
        let mut child = start(&place, &[&RUN[..], &["--fresh"]].concat());
        wait_for(&mut child, || fs::read_dir(place.path("disturbed/sample/e/samples")).is_ok());
        signal(&child, name);
        let out = child.wait_with_output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(said.contains("go on with: minicache run e.toml --limit 24 --results disturbed\n"), "{said}");
        let left = names(&place.path("disturbed"));
        assert!(!left.iter().any(|n| n.contains(".workers") || n.contains(".claims")), "{left:?}");
        let samples = walk(&place.path("disturbed/sample/e/samples"));
        assert!(samples.iter().all(|(_, bytes)| bytes.ends_with(b"\n")), "a torn sample");
    }
    place.done(&RUN);
    assert_eq!(
        untimed(&place.path("whole/sample/e/cells.csv")),
        untimed(&place.path("disturbed/sample/e/cells.csv"))
    );
    assert_eq!(names(&place.path("whole")), names(&place.path("disturbed")));
}

#[test]
fn the_next_run_removes_what_a_killed_one_left() {
    let place = Place::new();
    let mut child = start(&place, &RUN);
    wait_for(&mut child, || place.path("disturbed/sample/e/run.json").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    let left = names(&place.path("disturbed"));
    assert!(
        left.iter().any(|n| n.starts_with(".workers/")),
        "SIGKILL leaves it, and it means nothing: {left:?}"
    );
    place.write("disturbed/sample/e/.minicache-a1B2c3D4.tmp", "half");
    place.write("disturbed/sample/e/mine.tmp", "mine");
    place.done(&RUN);
    let names = names(&place.path("disturbed"));
    assert!(
        !names.iter().any(|n| n.contains("minicache-") || n.contains("/.") || n.starts_with('.')),
        "{names:?}"
    );
    assert!(names.contains(&"sample/e/mine.tmp".to_string()));
}

#[test]
fn damaged_samples_are_computed_again_though_their_cell_is_finished() {
    let place = Place::new();
    let args = ["run", "e.toml", "--results", "disturbed"];
    place.done(&args);
    let (cells, samples) =
        (place.path("disturbed/sample/e/cells.csv"), place.path("disturbed/sample/e/samples"));
    let (rows, before) = (untimed(&cells), names(&samples));
    let file = samples.join(&before[3]);
    let whole = fs::read_to_string(&file).unwrap();
    let untimed_lines = |text: &str| -> Vec<serde_json::Value> {
        let parse = |line: &str| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            value["seconds"].take();
            value["sum"].take();
            value
        };
        text.lines().map(parse).collect()
    };
    let lines: Vec<&str> = whole.lines().collect();
    for damaged in [
        whole.replacen("\"kl\":0.", "\"kl\":1.", 1),
        format!("{}\n{}\n", lines[1], lines[0]),
        whole[..whole.len() / 2].to_string(),
        "\0".repeat(100),
    ] {
        assert_ne!(damaged, whole);
        fs::write(&file, damaged).unwrap();
        place.done(&args);
        assert_eq!(untimed(&cells), rows);
        assert_eq!(untimed_lines(&fs::read_to_string(&file).unwrap()), untimed_lines(&whole));
    }
    assert_eq!(names(&samples), before);
}

#[test]
fn a_full_disk_is_a_failure_wherever_it_is_met_and_costs_nothing_that_was_finished() {
    let place = Place::new();
    place.done(&["run", "e.toml", "--results", "whole"]);
    let largest = walk(&place.path("whole")).iter().map(|(_, bytes)| bytes.len()).max().unwrap();
    // Blocks of 512 or 1024 bytes, as the shell has it.
    for blocks in [0, 1, 4, largest / 2048] {
        let call = format!(
            "ulimit -f {blocks}; exec '{}' run e.toml --results disturbed",
            env!("CARGO_BIN_EXE_minicache")
        );
        let mut command = Command::new("sh");
        command.args(["-c", &call]).current_dir(place.path("")).env("HF_HUB_OFFLINE", "1");
        let out = command.env_remove("MINICACHE_DATA").output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{blocks} blocks: {said}");
        assert!(said.contains("File too large") && !said.contains("internal error"), "{said}");
    }
    place.done(&["run", "e.toml", "--results", "disturbed"]);
    assert_eq!(
        untimed(&place.path("whole/sample/e/cells.csv")),
        untimed(&place.path("disturbed/sample/e/cells.csv"))
    );
    assert_eq!(names(&place.path("whole")), names(&place.path("disturbed")));
}

#[test]
fn what_cannot_be_printed_is_a_failure() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let place = Place::new();
    place.done(&["run", "e.toml", "--limit", "1"]);
    for args in [
        &["run", "e.toml", "--limit", "1"][..],
        &["run", "e.toml", "--dry-run"],
        &["report"],
        &["methods"],
        &["models"],
        &["tasks"],
        &["footprint", "--model", "model", "--context", "10"],
        &["generate", "--model", "model", "--prompt", "a", "--max-new-tokens", "2"],
        &["logits", "--model", "model", "--tokens", "1 2", "--out", "l.safetensors"],
        &["--help"],
        &["--version"],
    ] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = place.command(args).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}: {}", text(&out.stderr));
    }
    place.fails(&["logits", "--model", "model", "--tokens", "1 2", "--out", "/dev/full"], 1, &["/dev/full"]);
}

#[test]
fn reports_that_cannot_be_made_are_named() {
    let place = Place::new();
    place.done(&["run", "e.toml", "--limit", "1"]);
    place.write("results/sample/bad/cells.csv", "key,model\na\n");
    fs::remove_file(place.path("results/sample/e/report.md")).unwrap();
    place.fails(&["report"], 1, &["bad/cells.csv", "line 2"]);
    assert!(place.path("results/sample/e/report.md").is_file(), "the others are there");
    place.write("results/sample/worse/run.json", "{");
    let out = place.run(&["report"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(said.contains("bad/cells.csv") && said.contains("worse/run.json"), "{said}");
    // A run is about its own experiment.
    place.done(&["run", "e.toml", "--limit", "1"]);
    // A folder in a report's place cannot be replaced.
    fs::remove_dir_all(place.path("results/sample/bad")).unwrap();
    fs::remove_dir_all(place.path("results/sample/worse")).unwrap();
    fs::remove_file(place.path("results/sample/e/report.md")).unwrap();
    fs::create_dir(place.path("results/sample/e/report.md")).unwrap();
    place.fails(&["report"], 1, &["e/report.md"]);
    let out = place.run(&["run", "e.toml", "--limit", "1"]);
    assert!(
        out.status.code() == Some(1) && !text(&out.stdout).contains("report.md"),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn names_that_lead_out_of_the_results_are_refused() {
    let place = Place::new();
    for id in ["..", ".", "a/b", "", ".hidden", "sample", "a\\u0007b", "../x"] {
        place.write("bad.toml", &super::EXPERIMENT.replace("id = \"e\"", &format!("id = \"{id}\"")));
        place.fails(&["run", "bad.toml"], 2, &["bad.toml:1: id: "]);
        place.fails(&["run", "e.toml", "--set", &format!("id=\"{id}\"")], 2, &["id: "]);
    }
    assert!(!place.path("results").exists() && !place.path("cells.csv").exists());
    place.write("file", "");
    place.fails(&["run", "e.toml", "--results", "file"], 2, &["file: is a file"]);
    place.fails(&["run", "e.toml", "--results", "file/below"], 2, &["file: is a file"]);
    place.fails(&["run", "e.toml", "--results", "file", "--dry-run"], 2, &["file: is a file"]);
    place.fails(&["report", "file"], 2, &["file: is a file"]);
}

#[test]
fn rows_of_models_and_settings_stand_side_by_side() {
    let place = Place::new();
    fs::create_dir(place.path("second")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(place.path("model").join(name), place.path("second").join(name)).unwrap();
    }
    // Another model: the same one under another name has the same cells.
    let config = fs::read_to_string(place.path("second/config.json")).unwrap();
    place.write("second/config.json", &config.replacen('{', "{ \"transformers_version\": \"0\",", 1));
    let args = ["run", "e.toml", "--limit", "1", "--set", "tasks=[\"gsm8k\"]"];
    place.done(&args);
    let first = untimed(&place.path("results/sample/e/cells.csv"));
    place.done(&[&args[..], &["--models", "second"]].concat());
    let both = untimed(&place.path("results/sample/e/cells.csv"));
    assert_eq!(both.len(), 2 * first.len() - 1);
    assert_eq!(both[first.len()..], first[1..], "the first model's, as they were");
    let report = fs::read_to_string(place.path("results/sample/e/report.md")).unwrap();
    assert!(!report.contains("Incomplete"), "{report}");
    let made: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(place.path("results/sample/e/made.json")).unwrap()).unwrap();
    let one = &made[&both[1][0]];
    assert_eq!(made.as_object().unwrap().len(), both.len() - 1);
    assert!(one["data"].as_str().unwrap().contains("sample") && !one["simd"].as_str().unwrap().is_empty());
    // Rows that came with a checkout are computed again where that is asked, and only once.
    let said = |results: &str| place.done(&[&args[..], &["--reuse", "own", "--results", results]].concat());
    assert!(said("results").contains("0 computed"));
    fs::write(place.path("results/.clone"), "0123\n").unwrap();
    assert!(said("results").contains("6 computed") && said("results").contains("0 computed"));
}
