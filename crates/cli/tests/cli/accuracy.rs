//! Scores of tasks.

use std::fs;

use crate::{Place, untimed};

pub(crate) const ACCURACY: &str = r#"id = "a"
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
