//! What is wrong with a call, an experiment or a file, said in a line.

use std::fs;

use crate::{EXPERIMENT, Place};

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
