//! Experiments that read no task: memory, throughput and the time of single steps.

use std::fs;

use crate::{Place, untimed};

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
