//! Many runs on one results folder: together, in shares, killed, with cells that fail, and what `status` says of them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use serde_json::Value;

use crate::accuracy::ACCURACY;
use crate::disturbed::{names, signal, start, wait_for};
use crate::{Place, text, untimed};

/// The same results, and the same files with nothing left on its way.
fn same(place: &Place, whole: &str, shared: &str, experiment: &str) {
    let cells = |dir: &str| untimed(&place.path(dir).join("sample").join(experiment).join("cells.csv"));
    assert_eq!(cells(whole), cells(shared));
    assert_eq!(names(&place.path(whole)), names(&place.path(shared)));
}

/// Waits for the end of a run that has to succeed, and gives what it said on stdout and stderr.
fn ended(child: Child) -> String {
    let out = child.wait_with_output().unwrap();
    let said = text(&out.stdout) + &text(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{said}");
    said
}

/// Cells that a run says it has computed.
fn computed(said: &str) -> usize {
    let line = said.lines().find(|line| line.contains(" computed")).unwrap();
    line.split(' ')
        .zip(line.split(' ').skip(1))
        .find(|(_, w)| w.starts_with("computed"))
        .unwrap()
        .0
        .parse()
        .unwrap()
}

fn piped(place: &Place, args: &[&str]) -> Child {
    use std::process::Stdio;
    place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn runs_into_one_folder_share_the_work_and_end_as_one() {
    let place = Place::new();
    place.write("a.toml", ACCURACY);
    for (file, id, limit) in [("e.toml", "e", "24"), ("a.toml", "a", "3")] {
        let run = |results| ["run", file, "--limit", limit, "--results", results];
        place.done(&run("whole"));
        let all: Vec<Child> = (0..3).map(|_| piped(&place, &run("shared"))).collect();
        let said: Vec<String> = all.into_iter().map(ended).collect();
        let planned = untimed(&place.path("whole/sample").join(id).join("cells.csv")).len() - 1;
        assert_eq!(
            said.iter().map(|said| computed(said)).sum::<usize>(),
            planned,
            "each cell once: {said:?}"
        );
        same(&place, "whole", "shared", id);
    }
    // Nothing is left to do for one more, and a report may be made at any time.
    let said = place.done(&["run", "e.toml", "--limit", "24", "--results", "shared"]);
    assert!(said.contains(" 0 computed"), "{said}");
    place.done(&["report", "shared"]);
}

#[test]
fn a_cell_goes_on_elsewhere_when_its_owner_is_killed() {
    let place = Place::new();
    let run = |results| ["run", "e.toml", "--limit", "24", "--results", results];
    place.done(&run("whole"));
    let mut first = start(&place, &run("shared"));
    wait_for(&mut first, || fs::read_dir(place.path("shared/sample/e/samples")).is_ok());
    // It waits for what the first has claimed, and takes that over once it is gone.
    let mut second = piped(&place, &run("shared"));
    wait_for(&mut second, || fs::read_dir(place.path("shared/.workers")).is_ok_and(|d| d.count() == 2));
    let before = samples(&place.path("shared"));
    first.kill().unwrap();
    first.wait().unwrap();
    ended(second);
    same(&place, "whole", "shared", "e");
    let after = samples(&place.path("shared"));
    assert!(before.iter().all(|line| after.contains(line)), "no sample is computed twice");
}

/// The whole lines of all per-sample files.
fn samples(results: &Path) -> Vec<String> {
    let files = crate::walk(&results.join("sample/e/samples"));
    let lines = files.iter().flat_map(|(_, bytes)| bytes.split_inclusive(|b| *b == b'\n'));
    lines.filter(|line| line.ends_with(b"\n")).map(text).collect()
}

#[test]
fn shares_are_disjoint_and_come_to_the_whole_one_after_another_or_at_once() {
    let place = Place::new();
    place.write("a.toml", ACCURACY);
    let args = ["a.toml", "e.toml", "--limit", "2"];
    let run = |more: &[&str]| place.done(&[&["run"], &args[..], more].concat());
    run(&["--results", "whole"]);
    for (results, at_once) in [("one", false), ("all", true)] {
        let shares: Vec<[String; 4]> = (1..=3)
            .map(|i| ["--shard".into(), format!("{i}/3"), "--results".into(), results.to_string()])
            .collect();
        let mut sum = 0;
        if at_once {
            let children: Vec<Child> = shares
                .iter()
                .map(|share| {
                    let share: Vec<&str> = share.iter().map(String::as_str).collect();
                    piped(&place, &[&["run"], &args[..], &share].concat())
                })
                .collect();
            children.into_iter().for_each(|child| drop(ended(child)));
        } else {
            for share in &shares {
                let said = run(&share.each_ref().map(String::as_str));
                sum += said.lines().filter(|l| l.contains(" cells, ")).map(computed).sum::<usize>();
            }
            let rows = |id: &str| untimed(&place.path("whole/sample").join(id).join("cells.csv")).len() - 1;
            assert_eq!(sum, rows("a") + rows("e"));
        }
        for id in ["a", "e"] {
            same(&place, "whole", results, id);
        }
    }
    // One share leaves the others alone.
    run(&["--results", "part", "--shard", "2/3"]);
    let (code, status) = status(&place, "part");
    assert!(
        code == 3 && status["experiments"][0]["to_do"].as_array().is_some_and(|c| !c.is_empty()),
        "{status}"
    );
    place.fails(&["run", "e.toml", "--shard", "4/3"], 2, &["--shard", "I/N"]);
}

/// The exit code of `status` and what it prints as JSON.
fn status(place: &Place, results: &str) -> (i32, Value) {
    let out = place.run(&["status", results, "--json"]);
    (out.status.code().unwrap(), serde_json::from_slice(&out.stdout).unwrap())
}

#[test]
fn a_missing_model_costs_its_own_cells_and_is_mended() {
    let place = Place::new();
    let args = ["run", "e.toml", "--limit", "1", "--models", "absent,model", "--set", "tasks=[\"gsm8k\"]"];
    let out = place.run(&args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("absent") && said.lines().last().unwrap().starts_with("minicache: "), "{said}");
    let (code, state) = status(&place, "results");
    let failed = state["experiments"][0]["failed"].as_array().unwrap().clone();
    assert_eq!((code, failed.len(), &state["experiments"][0]["done"]), (1, 6, &Value::from(6)), "{state}");
    assert!(failed[0]["cell"].as_str().unwrap().contains("absent gsm8k full"), "{state}");
    assert!(failed[0]["error"].as_str().unwrap().contains("absent"), "{state}");
    let said = text(&place.run(&["status"]).stdout);
    assert!(said.contains("12 cells: 6 done, 0 running, 6 failed, 0 to do"), "{said}");
    // The rest was computed, and is not again.
    fs::create_dir(place.path("absent")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(place.path("model").join(name), place.path("absent").join(name)).unwrap();
    }
    let config = fs::read_to_string(place.path("absent/config.json")).unwrap();
    place.write("absent/config.json", &config.replacen('{', "{ \"transformers_version\": \"0\",", 1));
    assert_eq!(computed(&place.done(&args)), 6);
    let (code, state) = status(&place, "results");
    assert_eq!((code, &state["state"]), (0, &Value::from("done")), "{state}");
    place.done(&[&args[..], &["--results", "whole"]].concat());
    same(&place, "whole", "results", "e");
}

#[test]
fn status_says_who_is_at_work_and_since_when() {
    let place = Place::new();
    place.fails(&["status"], 2, &["results", "no such folder"]);
    fs::create_dir(place.path("results")).unwrap();
    place.fails(&["status"], 2, &["nothing was run"]);
    let args = ["run", "e.toml", "--limit", "60"];
    let mut child = start(&place, &args);
    wait_for(&mut child, || fs::read_dir(place.path("results/sample/e/samples")).is_ok());
    let (code, state) = status(&place, "results");
    let running = state["experiments"][0]["running"].as_array().unwrap();
    assert!(code == 3 && !running.is_empty(), "{state}");
    assert_eq!(running[0]["pid"], child.id(), "{state}");
    assert!(running[0]["cell"].as_str().unwrap().starts_with("model "), "{state}");
    place.fails(&[&args[..], &["--fresh"]].concat(), 2, &["--fresh", "other runs are at work"]);
    assert!(running[0]["heartbeat_s"].as_f64().unwrap() < 60.0 && running[0]["since"].is_string(), "{state}");
    child.kill().unwrap();
    child.wait().unwrap();
    let (code, state) = status(&place, "results");
    assert!(code == 3 && state["experiments"][0]["running"] == Value::Array(vec![]), "gone at once: {state}");
    place.done(&args);
    assert_eq!(status(&place, "results").0, 0);
}

#[test]
fn what_nobody_has_computed_is_missed_when_it_is_put_together() {
    let place = Place::new();
    let args = ["run", "e.toml", "--limit", "1"];
    place.fails(&[&args[..], &["--collect"]].concat(), 1, &["12 cells are not computed"]);
    place.done(&[&args[..], &["--shard", "1/2"]].concat());
    let out = place.run(&[&args[..], &["--collect"]].concat());
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    place.done(&[&args[..], &["--shard", "2/2"]].concat());
    let said = place.done(&[&args[..], &["--collect"]].concat());
    assert!(said.contains("12 cells, 0 computed") && said.contains("report.md"), "{said}");
}

/// Puts a made-up `sbatch` first in the path, which writes down its calls; gives the path.
fn made_up_slurm(place: &Place) -> String {
    use std::os::unix::fs::PermissionsExt;
    let sbatch = "#!/bin/sh\necho \"$@\" >> calls\necho $((40 + $(wc -l < calls)))\n";
    place.write("bin/sbatch", sbatch);
    fs::set_permissions(place.path("bin/sbatch"), fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_sweep_is_submitted_once_and_its_scripts_do_the_work() {
    let place = Place::new();
    let path = made_up_slurm(&place);
    place.write("site.toml", "partition = \"gpu\"\nmax_tasks = 3\nshortest_minutes = 0\n");
    let args = ["submit", "e.toml", "--limit", "1", "--slurm", "site.toml", "--results", "swept"];
    let said = place.done(&[&args[..], &["--dry-run"]].concat());
    assert!(said.contains("#SBATCH --partition=gpu") && said.contains("model: 12 cells"), "{said}");
    assert!(!place.path("swept").exists());
    let submit = || {
        let out = place.command(&args).env("PATH", &path).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    let said = submit();
    assert!(
        said.contains("as job 41, then the reports as job 42") && said.contains("scancel 41 42"),
        "{said}"
    );
    let calls = fs::read_to_string(place.path("calls")).unwrap();
    assert!(calls.lines().nth(1).unwrap().contains("--dependency=afterany:41"), "{calls}");
    let (code, state) = status(&place, "swept");
    assert_eq!((code, state["experiments"][0]["to_do"].as_array().unwrap().len()), (3, 12), "{state}");
    // As Slurm would run them.
    let dir = fs::read_dir(place.path("swept/.jobs")).unwrap().next().unwrap().unwrap().path();
    let shares: Value = serde_json::from_slice(&fs::read(dir.join("shares.json")).unwrap()).unwrap();
    let tasks = shares["tasks"].as_array().unwrap().len();
    assert!((1..=3).contains(&tasks) && shares["jobs"] == serde_json::json!(["41", "42"]), "{shares}");
    let script = |name: &str, task: usize| {
        let mut bash = Command::new("bash");
        bash.arg(dir.join(name)).env("SLURM_ARRAY_TASK_ID", task.to_string()).env("HF_HUB_OFFLINE", "1");
        let out = bash.env_remove("MINICACHE_DATA").output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    };
    (1..=tasks).for_each(|task| script("tasks.sh", task));
    script("report.sh", 0);
    place.done(&["run", "e.toml", "--limit", "1", "--results", "whole"]);
    fs::remove_dir_all(place.path("swept/.jobs")).unwrap();
    same(&place, "whole", "swept", "e");
    assert!(submit().contains("nothing is left to do"));
    assert_eq!(fs::read_to_string(place.path("calls")).unwrap(), calls);
    place.write("bad.toml", "\npartitoin = \"x\"\n");
    place.fails(&["submit", "e.toml", "--slurm", "bad.toml"], 2, &["bad.toml:2: ", "partitoin"]);
}

#[test]
fn a_process_that_does_not_beat_is_taken_for_gone() {
    let place = Place::new();
    let args = ["run", "e.toml", "--limit", "24", "--results", "shared"];
    place.done(&["run", "e.toml", "--limit", "24", "--results", "whole"]);
    let start = |place: &Place| {
        let mut command = place.command(&args);
        command.env("MINICACHE_STALE_SECONDS", "0.5").stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mut first = start(&place);
    wait_for(&mut first, || fs::read_dir(place.path("shared/sample/e/samples")).is_ok());
    signal(&first, "-STOP");
    let second = start(&place);
    ended(second);
    let rows = untimed(&place.path("shared/sample/e/cells.csv"));
    // It wakes up, finds that others have gone on, and leaves their rows alone.
    signal(&first, "-CONT");
    let out = first.wait_with_output().unwrap();
    let said = text(&out.stderr);
    assert!([Some(0), Some(1)].contains(&out.status.code()), "{said}");
    assert!(out.status.code() == Some(0) || said.contains("took it for gone"), "{said}");
    assert_eq!(untimed(&place.path("shared/sample/e/cells.csv")), rows);
    place.done(&args);
    same(&place, "whole", "shared", "e");
    let mut wrong = place.command(&args);
    let out = wrong.env("MINICACHE_STALE_SECONDS", "soon").output().unwrap();
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("no number of seconds"));
}

#[test]
fn the_paper_s_experiments_are_divided_evenly_among_64_tasks() {
    let place = Place::new();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../experiments");
    let paths = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path().display().to_string());
    let paths: Vec<String> = paths.filter(|path| path.ends_with(".toml")).collect();
    let mut args = vec!["submit", "--profile", "paper", "--dry-run"];
    args.extend(paths.iter().map(String::as_str));
    let said = place.done(&args);
    // On the bundled sample: the longest cell is a larger part of the whole than on real data.
    let share = said
        .lines()
        .find_map(|l| l.split_once(": ")?.1.strip_suffix(" times an even share of the work, with loading"));
    let share: f64 = share.unwrap_or_else(|| panic!("{said}")).parse().unwrap();
    assert!((1.0..1.45).contains(&share), "{share}");
    let cells =
        said.lines().filter_map(|l| l.split_once(" to compute")?.0.rsplit(' ').next()?.parse::<usize>().ok());
    assert!(cells.sum::<usize>() > 1000, "{said}");
}
