//! The same numbers on any number of threads and in batches of any size, for every method; and what says which
//! instructions compute them.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Place, text, untimed, walk};

/// Every method, with its variants, in two parts: few caches side by side are divided among threads otherwise than many
/// are. Activations of 8 bits show any difference of rounding before them.
const VARIANTS: [&str; 2] = [
    r#"
[[variants]]
cache = { method = "full" }

[[variants]]
name = "full in f32"
cache = { method = "full", dtype = "f32" }

[[variants]]
cache = { method = "mean", start_layer = 0 }

[[variants]]
cache = { method = "max_norm", start_layer = 0, merge = "values" }

[[variants]]
name = "slerp"
cache = { method = "minicache", start_layer = 0 }

[[variants]]
name = "slerp by head"
cache = { method = "minicache", start_layer = 0, granularity = "head", residual = 16, key_space = "pre_rope" }

[[variants]]
name = "slerp in 4 bits"
cache = { method = "minicache", quant = { bits = 4, retained = true }, activation_bits = 8 }

[[variants]]
name = "slerp of other pairs"
cache = { method = "minicache", pairs = { keys = [1], values = [0, 2] }, retention = { rule = "top_fraction", gamma = 0.2, joint = true } }

"#,
    r#"
[[variants]]
cache = { method = "rtn", quant = { bits = 4, residual = 0 }, activation_bits = 8 }

[[variants]]
cache = { method = "kivi", quant = { bits = 2 }, activation_bits = 8 }

[[variants]]
cache = { method = "smoothquant", activation_bits = 8 }

[[variants]]
cache = { method = "fp8" }

[[variants]]
cache = { method = "h2o" }

[[variants]]
cache = { method = "sinks", recent = 40 }

[[variants]]
name = "latents of single heads"
cache = { method = "latent", activation_bits = 8, k = { rate = 3.0 }, v = { rate = 2.0 }, calibration = { file = "text.txt", tokens = 900, chunk = 300 } }

[[variants]]
name = "latents of all heads"
cache = { method = "latent", activation_bits = 8, residual = 16, k = { group = 2, heads = "all", bits = 4 }, v = { heads = "all", bits = 8 }, calibration = { file = "text.txt", tokens = 900, chunk = 300 } }
"#,
];

/// Long prompts, so that decode attention is cut into parts and blocks of inputs are cut too.
const FIDELITY: &str = r#"id = "fidelity"
kind = "fidelity"
models = ["model"]
tasks = ["longbench/lcc"]
limit = 3
fidelity = { prefill = 2300, continuation = 5 }
"#;

const ACCURACY: &str = r#"id = "accuracy"
kind = "accuracy"
models = ["model"]
tasks = ["longbench/trec", "winogrande"]
limit = 3
accuracy = { prompt_tokens = 300 }
"#;

fn place() -> Place {
    let place = Place::new();
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    place.write("model/config.json", &config.replace("embeddings\": 512", "embeddings\": 4096"));
    let words: Vec<String> = (0..900).map(|i| format!("w{}", (i * i + 7 * i) % 97)).collect();
    place.write("text.txt", &words.join(" "));
    place
}

/// What a run has left, without times: the rows of its only `cells.csv`, and the numbers of every sample, which have more
/// digits.
fn left_by(place: &Place, results: &str) -> (Vec<Vec<String>>, Vec<Value>) {
    let files = walk(&place.path(results));
    let mut tables = files.iter().filter(|(path, _)| path.ends_with("cells.csv"));
    let rows = untimed(&tables.next().unwrap().0);
    assert!(tables.next().is_none() && rows.len() > 5, "{results}");
    let of_samples = |path: &Path| path.extension().is_some_and(|e| e == "jsonl");
    let mut samples: Vec<(&Path, Value)> = Vec::new();
    for (path, bytes) in files.iter().filter(|(path, _)| of_samples(path)) {
        for line in text(bytes).lines() {
            let mut sample: Value = serde_json::from_str(line).unwrap();
            // The time, and the check sum of a line that has it.
            for key in ["seconds", "sum"] {
                sample[key].take();
            }
            samples.push((path.strip_prefix(place.path(results)).unwrap(), sample));
        }
    }
    samples.sort_by_key(|(path, _)| *path);
    assert!(samples.len() >= rows.len() - 1, "{results}");
    (rows, samples.into_iter().map(|(_, sample)| sample).collect())
}

#[test]
fn neither_threads_nor_batches_change_a_result() {
    let place = place();
    for (kind, experiment) in [("fidelity", FIDELITY), ("accuracy", ACCURACY)] {
        for (part, variants) in VARIANTS.into_iter().enumerate() {
            place.write("same.toml", &format!("{experiment}{variants}"));
            let run = |threads: &str, batch: &str| {
                let results = format!("{kind}-{part}-{threads}-{batch}");
                let batch = format!("{kind}.batch={batch}");
                place.done(&[
                    "run",
                    "same.toml",
                    "--threads",
                    threads,
                    "--set",
                    &batch,
                    "--results",
                    &results,
                ]);
                left_by(&place, &results)
            };
            let want = run("1", "1");
            for (threads, batch) in [("1", "16"), ("2", "1"), ("3", "16"), ("4", "1")] {
                let got = run(threads, batch);
                let what = format!("{kind} with {threads} threads and a batch of {batch}");
                let lines = got.0.iter().zip(&want.0).map(|(got, want)| (got == want, got));
                let other: Vec<_> = lines.filter(|(same, _)| !same).map(|(_, got)| got).collect();
                assert!(other.is_empty(), "{what}: {other:?}");
                let other = got.1.iter().zip(&want.1).find(|(got, want)| got != want);
                assert!(other.is_none(), "{what}: {other:?}");
                assert_eq!((got.0.len(), got.1.len()), (want.0.len(), want.1.len()), "{what}");
            }
        }
    }
}

#[test]
fn the_instruction_set_is_recorded_and_can_be_named() {
    let place = Place::new();
    let run = |simd: Option<&str>, results: &str| {
        let mut command = place.command(&["run", "e.toml", "--limit", "1", "--results", results]);
        match simd {
            Some(name) => command.env("MINICACHE_SIMD", name),
            None => command.env_remove("MINICACHE_SIMD"),
        };
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let files = walk(&place.path(results));
        let (_, info) = files.iter().find(|(path, _)| path.ends_with("run.json")).unwrap();
        let info: Value = serde_json::from_slice(info).unwrap();
        info["simd"].as_str().unwrap().to_string()
    };
    let available: Vec<&str> =
        minicache_core::kernels::Isa::available().into_iter().map(|isa| isa.name()).collect();
    assert_eq!(run(None, "fastest"), *available.last().unwrap());
    assert_eq!(run(Some(""), "empty"), *available.last().unwrap());
    assert_eq!(run(Some("scalar"), "scalar"), "scalar");

    // A name that is wrong is one for every command, whatever it computes.
    for args in [&["run", "e.toml"][..], &["models"], &["report"], &["methods", "--json"]] {
        for wrong in ["bogus", "AVX2", "sse9", if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" }] {
            let out = place.command(args).env("MINICACHE_SIMD", wrong).output().unwrap();
            let said = text(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
            assert!(said.lines().count() == 1 && said.contains("MINICACHE_SIMD"), "{said}");
            assert!(said.contains(wrong) && available.iter().all(|name| said.contains(name)), "{said}");
        }
    }
}
