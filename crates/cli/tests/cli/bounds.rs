//! Numbers and files that no run can be meant by.

use std::fs;

use crate::Place;

const HUGE: [&str; 3] = ["18446744073709551615", "1000000000000000000", "100000000"];

#[test]
fn absurd_numbers_on_the_command_line_are_refused() {
    let place = Place::new();
    let args = |text: &'static str| text.split(' ').collect::<Vec<_>>();
    for (call, option) in [
        (args("footprint --model llama-3-8b --context 10"), "--batch"),
        (args("footprint --model llama-3-8b"), "--context"),
        (args("bench --model llama-3-8b --attention-only"), "--context"),
        (args("bench --model llama-3-8b --attention-only --context 10"), "--batch"),
        (args("models"), "--threads"),
        (args("generate --model model --prompt a"), "--max-new-tokens"),
        (args("run e.toml"), "--limit"),
    ] {
        for number in HUGE.into_iter().chain(["0", "-1", "nan", "1e9", "18446744073709551616"]) {
            let number = format!("{option}={number}");
            place.fails(&[&call[..], &[&number]].concat(), 2, &[option]);
        }
    }
    for budget in ["1e300 GB", "0", "-1", "nan", "999999999999999999999 GiB"] {
        place.fails(&["run", "e.toml", &format!("--memory-budget={budget}")], 2, &["--memory-budget"]);
    }
    // What can be written, and not be measured or held.
    place.fails(&["footprint", "--model", "llama-3-8b", "--context", "16000000"], 2, &["context", "GiB"]);
    let bench = ["bench", "--model", "llama-3-8b", "--attention-only", "--context"];
    place.fails(&[&bench[..], &["16000000", "--batch", "60000"]].concat(), 2, &["--context", "--batch"]);
    for cache in ["{ method = \"sinks\", sinks = 1000000000000000 }", "{ method = \"h2o\", heavy = -3 }"] {
        place.fails(
            &["footprint", "--model", "llama-3-8b", "--context", "10", "--cache", cache],
            2,
            &["cache."],
        );
    }
    // The most that may be asked for is computed, of little.
    let most = ["footprint", "--model", "model", "--context", "100", "--batch", "65536", "--cache"];
    for cache in ["{ method = \"latent\", sinks = 16777216 }", "{ method = \"sinks\", recent = 16777216 }"] {
        place.done(&[&most[..], &[cache]].concat());
    }
}

#[test]
fn experiment_files_that_are_no_text_are_said_to_be() {
    let place = Place::new();
    let experiment = fs::read_to_string(place.path("e.toml")).unwrap();
    let file = |bytes: Vec<u8>, words: &[&str]| {
        fs::write(place.path("odd.toml"), bytes).unwrap();
        place.fails(&["run", "odd.toml", "--dry-run"], 2, &[&["odd.toml"], words].concat());
    };
    file(
        [0xff, 0xfe].into_iter().chain(experiment.encode_utf16().flat_map(u16::to_le_bytes)).collect(),
        &["UTF-16"],
    );
    file(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n".to_vec(), &["Git LFS"]);
    file(vec![0x7f, b'E', b'L', b'F', 0, 1, 2, 3], &["binary"]);
    file([experiment.as_bytes(), b"# caf\xe9\n"].concat(), &["UTF-8"]);
    file(Vec::new(), &["id"]);
    fs::create_dir(place.path("folder.toml")).unwrap();
    place.fails(&["run", "folder.toml"], 2, &["folder.toml", "is a folder"]);
    fs::write(place.path("odd.toml"), format!("\u{feff}{experiment}")).unwrap();
    place.done(&["run", "odd.toml", "--dry-run"]);
}
