//! What people write: experiments and cache specifications. And JSON, which most formats are made of.

use std::fs;
use std::path::Path;

use minicache_config::{Experiment, cells, python_json};
use minicache_core::latent::Grouping;
use minicache_core::{CacheSpec, LayerSimilarity, Resources, footprint, nominal, shared_bytes};
use minicache_models::calibrate::BasisOptions;

use crate::models::{step, tiny};
use crate::mutate::{Seeds, Shape};
use crate::{Format, line};

pub(crate) const EXPERIMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../experiments");

const KEYS: &[&str] = &[
    "method = \"minicache\"",
    "method = \"latent\"",
    "method = \"xkv\"",
    "rank_k = ",
    "method = \"kivi\"",
    "method = \"h2o\"",
    "method = \"sinks\"",
    "method = \"mean\"",
    "start_layer = ",
    "pairs = \"auto\"",
    "pairs = { keys = [1, 3], values = [1] }",
    "t = ",
    "granularity = \"head\"",
    "key_space = \"pre_rope\"",
    "merge = \"keys\"",
    "retention = { rule = \"most_distinct\", gamma = 0.05 }",
    "quant = { bits = 4, group = 64 }",
    "bits = ",
    "group = ",
    "residual = ",
    "alpha = ",
    "recent = ",
    "heavy = ",
    "sinks = ",
    "exact = ",
    "rate = ",
    "heads = ",
    "k = { group = 2, rate = 2.0 }",
    "v = { rank = 3 }",
    "basis = \"x\"",
    "basis = \"/dev/zero\"",
    "activation_bits = ",
    "calibration = { tokens = 1 }",
    "window = ",
    "dtype = \"f16\"",
    "limit = ",
    "[cache]\n",
    "[[variants]]\n",
    "[sweep]\n",
    "\"cache.start_layer\" = [",
    "\"cache.retention.gamma\" = [0, 1]",
    "models = [",
    "tasks = [",
    "kind = \"fidelity\"",
    "kind = \"throughput\"",
    "[profiles.small]\n",
    "[profiles.paper]\n",
    "[bench]\n",
    "[fidelity]\n",
    "prefill = ",
    "continuation = ",
    "id = \"../x\"",
    "[[plots]]\n",
    "x = ",
    "filter = { side = \"key|value\" }",
];

pub(crate) fn experiment(_: &Path) -> Format {
    let mut paths: Vec<_> = fs::read_dir(EXPERIMENTS).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "toml"));
    paths.sort_unstable();
    let files = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let read = |_, bytes: &[u8]| {
        let text = std::str::from_utf8(bytes).map_err(|_| "not text")?;
        let profile = [None, Some("small"), Some("paper"), Some("default")][bytes.len() % 4];
        let experiment = Experiment::from_toml(text, &[], profile).map_err(line)?;
        cells(&experiment).map(drop).map_err(line)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: KEYS }, read)
}

pub(crate) fn cache(_: &Path) -> Format {
    let files = [
        "full",
        "kivi-2",
        r#"{ method = "xkv", group = 2, rank_k = 0.125, rank_v = 3 }"#,
        "minicache",
        "h2o",
        r#"{ method = "minicache", start_layer = 2, quant = { bits = 4, group = 64 } }"#,
        r#"{ method = "minicache", start_layer = "half", t = 0.6, granularity = "head", key_space = "pre_rope", merge = "both", retention = { rule = "most_distinct", gamma = 0.05, joint = true } }"#,
        r#"{ method = "minicache", start_layer = 0, pairs = { keys = [0, 2], values = [1] } }"#,
        r#"{ method = "kivi", quant = { bits = 2, group = 32, residual = 128 } }"#,
        r#"{ method = "h2o", heavy = 0.1, recent = 64 }"#,
        r#"{ method = "smoothquant", alpha = 0.5 }"#,
        r#"{ method = "rtn", quant = { bits = 4, group = 64 } }"#,
        r#"{ method = "latent", sinks = 4, residual = 16, k = { group = 2, rate = 2.0 }, v = { group = 2, rate = 1.75 } }"#,
        r#"{ method = "latent", activation_bits = 8, heads = "all", k = { group = 2, rank = 3 }, v = { group = 2, rate = 2.0 } }"#,
    ];
    let files = files.map(|text| text.as_bytes().to_vec()).to_vec();
    let model = tiny();
    let tokens: Vec<u32> = (0..200).collect();
    let groupings = [1, 2].map(|heads| Grouping { layers: 2, heads });
    let chunks = [&tokens[..]].into_iter();
    let (basis, _) = model.calibrate(chunks, &groupings, &groupings, 4, BasisOptions::default()).unwrap();
    model.add_basis(&minicache_core::Latent::default(), basis);
    let read = move |_, bytes: &[u8]| {
        let spec = CacheSpec::parse(&String::from_utf8_lossy(bytes)).map_err(line)?;
        let shape = model.decoder.shape();
        spec.validate_for(shape).map_err(line)?;
        let resources = Resources { rotary: Some(model.decoder.rotary(0)), latent: None };
        // What it says of latents is the step's error too.
        let _ = footprint(&spec, shape, &resources, 48, LayerSimilarity::default());
        let _ = (nominal(&spec, shape, 48), shared_bytes(&spec, shape, 48));
        step(&model, &mut model.sequence(&spec, 0).map_err(line)?)
    };
    Format::new(Seeds { shape: Shape::Text, files, words: KEYS }, read)
}

pub(crate) fn json(_: &Path) -> Format {
    let files = [
        r#"{"a": [1, -2.5e3, NaN, Infinity, true, null], "data": [{"b": "\u00e9\ud83d\ude00\n"}, [[]], {}], "a": 3}"#,
        r#"[{"q": "x", "n": 123456789012345678901234567890}, "\ud800", 1e400, -0, ["中", {"k": {"k": []}}]]"#,
    ];
    let files = files.map(|text| text.as_bytes().to_vec()).to_vec();
    let read = |_, bytes: &[u8]| {
        if let Ok(text) = std::str::from_utf8(bytes) {
            let entries = python_json::entries(text, "data").map_err(line)?;
            entries.for_each(|entry| drop(entry.map(|value| python_json::as_f64(&value))));
        }
        python_json::from_slice(bytes).map(drop).map_err(line)
    };
    let words = &[
        "\"data\":",
        "\"$number\":",
        "{\"$number\": \"NaN\"}",
        "[",
        "{\"a\":",
        "\"\\ud800",
        "]",
        "}",
        "1e999",
        "-Infinity",
    ];
    Format::new(Seeds { shape: Shape::Text, files, words }, read)
}
