//! `minicache bench`.

use serde_json::Value;

use crate::room::{MODELS, Room};

#[test]
fn benchmarks_measure_the_caches_in_order() {
    let room = Room::new();
    let model = format!("{MODELS}/llama2");
    let caches = ["kivi-2", "{ method = \"full\" }", "minicache"];
    let mut options = Vec::new();
    caches.iter().for_each(|c| options.extend(["--cache", *c]));
    let check = |said: &Value, name: &str, context: u64, batch: u64| {
        let keys: Vec<&str> = said.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["model", "context", "batch", "bandwidth_gb_s", "runs"]);
        assert_eq!((said["model"].as_str(), said["context"].as_u64()), (Some(name), Some(context)));
        assert_eq!(said["batch"].as_u64(), Some(batch));
        assert!(said["bandwidth_gb_s"].as_f64().unwrap() > 0.1);
        let runs = said["runs"].as_array().unwrap();
        let order: Vec<&str> = runs.iter().map(|r| r["cache"].as_str().unwrap()).collect();
        assert_eq!(order, caches);
        for run in runs {
            for key in
                ["prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes", "ratio", "bandwidth_share"]
            {
                let n = run[key].as_f64().unwrap();
                assert!(n.is_finite() && n > 0.0, "{key} of {run}");
            }
        }
        runs.iter().map(|r| r["cache_bytes"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let args = ["bench", "--model", &model, "--context", "20", "--batch", "3", "--json"];
    check(&room.json(&[&args[..], &options].concat()), "llama2", 20, 3);

    let args = ["bench", "--model", "smollm2-135m", "--attention-only", "--context", "256", "--batch", "2"];
    let bytes = check(&room.json(&[&args[..], &["--json"], &options].concat()), "smollm2-135m", 256, 2);
    // What is allocated is what `footprint` says.
    for (cache, bytes) in caches.iter().zip(bytes) {
        let args =
            ["footprint", "--model", "smollm2-135m", "--context", "256", "--batch", "2", "--json", "--cache"];
        let said = room.json(&[&args[..], &[cache]].concat());
        let ratio = said["bytes"].as_f64().unwrap() / bytes;
        assert!((ratio - 1.0).abs() < 0.01, "{cache}: {ratio}");
    }
    let human = room.done(&[&args[..], &options].concat());
    assert!(human.contains("attention only") && human.contains("GB/s"), "{human}");
    room.wrong(&["bench", "--model", &model, "--context", "100000"], &["--context", "at most"]);
    room.wrong(&["bench", "--model", &model, "--context", "0"], &["--context"]);
}
