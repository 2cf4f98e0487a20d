//! Runs that are killed again and again, and end as if nothing had happened.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::accuracy::ACCURACY;
use crate::{Place, untimed};

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
