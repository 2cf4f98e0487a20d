use minicache_core::settings::{Pairs, Quant, StartLayer};
use minicache_core::{CacheSpec, MiniCache, ModelShape};

use crate::*;

/// The settings of a merging cache.
fn merging(spec: &CacheSpec) -> &MiniCache {
    let CacheSpec::MiniCache(settings) = spec else { panic!("{spec:?}") };
    settings
}

const TABLE2: &str = r#"
id = "table2"
title = "Retention threshold"
kind = "accuracy"
models = ["smollm2-135m"]
tasks = ["gsm8k", "coqa"]
limit = 100

[cache]
method = "minicache"
start_layer = "half"
t = 0.6
retention = { rule = "most_distinct", gamma = 0.05 }
quant = { bits = 4, group = 32, residual = 32 }

[sweep]
"cache.retention.gamma" = [0.0, 0.05, 1.0]
"#;

fn error(text: &str) -> String {
    let e = Experiment::from_toml(text, &[], None).expect_err("should be refused");
    e.in_file(std::path::Path::new("x.toml"), text).to_string()
}

#[test]
fn the_sweep_is_a_cartesian_product_in_file_order() {
    let e = Experiment::from_toml(TABLE2, &[], None).expect("valid");
    let plan = cells(&e).expect("valid");
    assert_eq!(plan.len(), 6);
    assert_eq!(plan[1].swept["cache.retention.gamma"], "0.05");
    assert_eq!(merging(&plan[2].cache).retention.gamma, 1.0);
    assert_eq!(plan[3].task, "coqa");
    assert_eq!(plan[0].cache.quantisation().map(|q| q.bits), Some(4));
}

#[test]
fn cells_that_mean_the_same_cache_appear_once() {
    let text =
        format!("{TABLE2}\n[[variants]]\ncache = {{ method = \"full\" }}\n[[variants]]\nname = \"ours\"\n");
    let plan = cells(&Experiment::from_toml(&text, &[], None).expect("valid")).expect("valid");
    assert_eq!(plan.len(), 2 * (1 + 3));
    assert!(plan[0].swept.is_empty(), "full does not read gamma");
    assert_eq!(plan[0].variant, "full");
    assert_eq!(plan[1].variant, "ours");
}

#[test]
fn overrides_reach_nested_keys_and_are_checked() {
    let set = |s: &str| Experiment::from_toml(TABLE2, &[s.to_string()], None);
    let plan = cells(&set("cache.start_layer=10").expect("valid")).expect("valid");
    assert_eq!(merging(&plan[0].cache).start_layer, StartLayer::Layer(10));
    let e = set("cache.retention.gama=1").expect_err("unknown key").to_string();
    assert!(e.contains("gama"), "{e}");
    let e = set("cache.t=2").expect_err("out of range").to_string();
    assert!(e.contains("cache.t") && e.contains("0 to 1"), "{e}");
}

#[test]
fn errors_name_file_line_and_key() {
    let e = error(&TABLE2.replace("gamma = 0.05", "gamma = 3.0"));
    assert!(e.contains("x.toml:13: cache.retention.gamma: must be within 0 to 1, not 3"), "{e}");
    let e = error(&TABLE2.replace("bits = 4", "bits = 5"));
    assert!(e.contains("x.toml:14: cache.quant.bits: must be 2, 3, 4 or 8, not 5"), "{e}");
    let e = error(&TABLE2.replace("limit = 100", "limt = 100"));
    assert!(e.contains("x.toml:7") && e.contains("limt"), "{e}");
    let e = error(&TABLE2.replace("limit = 100", "limit = \"many\""));
    assert!(e.contains("x.toml:7: limit"), "{e}");
    let e = error(&TABLE2.replace("t = 0.6", "tt = 0.6"));
    assert!(e.contains("x.toml:12") && e.contains("tt"), "{e}");
    let e = error(&TABLE2.replace("1.0]", "7.0]"));
    assert!(e.contains("x.toml:17: sweep.cache.retention.gamma"), "{e}");
    let e = error("id = \"a\"\nkind = \"speed\"\nmodels = [\"m\"]");
    assert!(e.contains("x.toml:2: kind") && e.contains("accuracy"), "{e}");
    let e = error("id = \"a\"\nkind =\n");
    assert!(e.contains("x.toml:2"), "{e}");
    assert_eq!(e.lines().count(), 1, "{e}");
}

#[test]
fn a_start_layer_beyond_the_model_is_refused() {
    let shape =
        ModelShape { layers: 30, heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, ..ModelShape::PLAIN };
    let from =
        |n| CacheSpec::MiniCache(MiniCache { start_layer: StartLayer::Layer(n), ..Default::default() });
    let spec = from(30);
    let e = spec.validate_for(&shape).expect_err("refused").to_string();
    assert!(e.contains("start_layer") && e.contains("30 layers"), "{e}");
    let spec = from(16);
    assert_eq!(spec.merged_pairs(30).map(|p| p.len()), [7, 7]);
    assert_eq!(shape.full_bytes(1), 23040);
}

#[test]
fn chosen_pairs_are_checked_and_written_as_they_are_read() {
    let shape =
        ModelShape { layers: 30, heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, ..ModelShape::PLAIN };
    let with = |pairs: &str| CacheSpec::parse(&format!("{{ method = \"minicache\", pairs = {pairs} }}"));
    let spec = with("{ keys = [3, 20], values = [28] }").expect("pairs");
    assert_eq!(spec.merged_pairs(30), [vec![(3, 4), (20, 21)], vec![(28, 29)]]);
    assert!(spec.validate_for(&shape).is_ok() && !spec.is_auto());
    let json = serde_json::to_string(&merging(&spec).pairs).expect("json");
    assert_eq!(json, r#"{"keys":[3,20],"values":[28]}"#);
    assert!(with("\"auto\"").is_ok_and(|s| s.is_auto()));
    assert_eq!(serde_json::to_string(&Pairs::Auto).expect("json"), r#""auto""#);
    for bad in ["{ keys = [3, 4] }", "{ values = [29] }", "{ keys = [5, 2] }"] {
        let e = with(bad).expect("parses").validate_for(&shape).expect_err(bad).to_string();
        assert!(e.contains("pairs.") && e.contains("do not overlap"), "{e}");
    }
    for bad in ["\"deepest\"", "7", "{ layers = [1] }"] {
        assert!(with(bad).expect_err(bad).to_string().contains("pairs"), "{bad}");
    }
}

#[test]
fn cache_specs_read_names_bits_and_tables() {
    assert_eq!(CacheSpec::parse("full").expect("valid"), CacheSpec::default());
    let kivi = CacheSpec::parse("kivi-2").expect("valid");
    assert_eq!((kivi.name(), kivi.quantisation().map(|q| q.bits)), ("kivi", Some(2)));
    let spec = CacheSpec::parse("{ method = \"minicache\", start_layer = 15, t = 0.6 }").expect("valid");
    assert_eq!(merging(&spec).start_layer, StartLayer::Layer(15));
    for bad in ["none", "kivi-5", "{ method = \"full\", x = 1 }", "{ method = ", "full-4"] {
        let e = CacheSpec::parse(bad).expect_err(bad).to_string();
        assert_eq!(e.lines().count(), 1, "{e}");
    }
}

#[test]
fn a_spec_survives_toml_and_json() {
    let spec = CacheSpec::MiniCache(MiniCache {
        start_layer: StartLayer::Layer(3),
        quant: Some(Quant::default()),
        ..Default::default()
    });
    let text = toml::to_string(&spec).expect("toml");
    assert_eq!(toml::from_str::<CacheSpec>(&text).expect("toml"), spec);
    let text = serde_json::to_string(&spec).expect("json");
    assert_eq!(serde_json::from_str::<CacheSpec>(&text).expect("json"), spec);
}

#[test]
fn a_profile_changes_the_experiment_and_overrides_the_profile() {
    let text = format!(
        r#"{TABLE2}
[profiles.small]
tasks = ["coqa"]
limit = 8
limits = {{ coqa = 2 }}
prompt_tokens = 512
sweep = {{ "cache.retention.gamma" = [0.1] }}
set = {{ "accuracy.batch" = 3, "cache.t" = 0.7 }}
"#
    );
    let load = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        Experiment::from_toml(&text, &overrides, Some("small")).expect("valid")
    };
    let e = load(&[]);
    assert_eq!((e.tasks.as_slice(), e.accuracy.prompt_tokens), (&["coqa".to_string()][..], Some(512)));
    assert_eq!((e.limit_of("coqa"), e.limit_of("gsm8k")), (Some(2), Some(8)));
    assert_eq!(e.accuracy.batch, Some(3));
    let plan = cells(&e).expect("valid");
    assert_eq!((plan.len(), merging(&plan[0].cache).t), (1, 0.7));

    let e = load(&["accuracy.batch=5"]);
    assert_eq!((e.accuracy.batch, merging(&cells(&e).expect("valid")[0].cache).t), (Some(5), 0.7));
    for (set, key) in
        [("accuracy.batch", "accuracy.batch"), ("no.such", "no"), ("limit.x", "profiles.set.limit.x")]
    {
        let text = text.replace("accuracy.batch", set).replace("= 3,", "= \"three\",");
        let wrong = Experiment::from_toml(&text, &[], Some("small")).expect_err(set);
        assert_eq!(wrong.key, key, "{wrong}");
    }

    let e = load(&["tasks=[\"gsm8k\"]", "accuracy.prompt_tokens = 99", "limit=5"]);
    assert_eq!((e.tasks.as_slice(), e.accuracy.prompt_tokens), (&["gsm8k".to_string()][..], Some(99)));
    assert_eq!((e.limit_of("coqa"), e.limit_of("gsm8k")), (Some(5), Some(5)));
    let zero = Experiment::from_toml(&text.replace("coqa = 2", "coqa = 0"), &[], Some("small"));
    assert_eq!(zero.expect_err("should be refused").key, "limits.coqa");
}

/// Every numeric key of a file, with what it may lie between; floats have `NaN` and infinities besides.
const INTEGERS: [&str; 26] = [
    "limit",
    "limits.coqa",
    "fidelity.prefill",
    "fidelity.continuation",
    "fidelity.chunk",
    "fidelity.batch",
    "accuracy.prompt_tokens",
    "accuracy.batch",
    "similarity.tokens",
    "bench.input",
    "bench.output",
    "bench.steps",
    "bench.memory_budget",
    "cache.sinks",
    "cache.recent",
    "cache.heavy",
    "cache.residual",
    "cache.quant.group",
    "cache.quant.residual",
    "cache.quant.bits",
    "cache.activation_bits",
    "cache.k.quant_group",
    "cache.calibration.tokens",
    "cache.calibration.chunk",
    "model.align.tokens",
    "model.align.chunk",
];
const FLOATS: [&str; 9] = [
    "bench.similarity",
    "bench.spread",
    "cache.t",
    "cache.alpha",
    "cache.retention.gamma",
    "cache.budget_ratio",
    "cache.k.rate",
    "cache.v.rate",
    "model.align.level",
];

#[test]
fn absurd_numbers_are_refused_with_their_key() {
    let (head, rest) = TABLE2.split_once("[cache]").expect("a cache");
    let (_, sweep) = rest.split_once("[sweep]").expect("a sweep");
    let base = |key: &str| match key.split('.').nth(1).filter(|_| key.starts_with("cache")) {
        Some("recent" | "heavy") => format!("{head}[cache]\nmethod = \"h2o\"\n[sweep]{sweep}"),
        Some("alpha") => format!("{head}[cache]\nmethod = \"smoothquant\"\n[sweep]{sweep}"),
        Some("k" | "v") => format!("{head}[cache]\nmethod = \"latent\"\n[sweep]{sweep}"),
        _ => TABLE2.to_string(),
    };
    let set = |key: &str, value: &str| {
        let wrong = Experiment::from_toml(&base(key), &[format!("{key}={value}")], None);
        let e = wrong.expect_err(&format!("{key} = {value}"));
        let last = key.rsplit('.').next().unwrap_or(key);
        let said = e.to_string();
        assert!(said.contains(last) && said.lines().count() == 1, "{key} = {value}: {said}");
        assert!(!said.contains("not read by"), "{key}: {said}");
        said
    };
    for key in INTEGERS {
        for value in
            ["18446744073709551615", "9223372036854775807", "1000000000000000000", "-1", "nan", "1e18"]
        {
            set(key, value);
        }
    }
    for key in FLOATS {
        for value in ["nan", "inf", "-inf", "1e300", "-1e-3", "\"many\""] {
            if (key, value) != ("bench.similarity", "-1e-3") {
                set(key, value);
            }
        }
    }
    for list in ["bench.batch", "bench.context"] {
        for value in ["[]", "[0]", "[1, 9223372036854775807]", "[-1]", "[nan]", "7.5"] {
            set(list, value);
        }
    }
    for key in ["limit", "fidelity.prefill", "bench.steps", "similarity.tokens", "cache.calibration.chunk"] {
        assert!(set(key, "0").contains("at least 1"), "{key}");
    }
    assert!(set("limit", "1000000000000").contains("at most 16777216"));
    assert!(set("bench.steps", "9999999999999999999999").contains("no number"));
    // Zero with a sign is zero.
    for key in ["cache.t", "cache.retention.gamma", "bench.spread"] {
        assert!(Experiment::from_toml(TABLE2, &[format!("{key}=-0.0")], None).is_ok(), "{key}");
    }
    let deep = format!("cache{}=1", ".x".repeat(100_000));
    let e = Experiment::from_toml(TABLE2, &[deep], None).expect_err("too deep").to_string();
    assert!(e.contains("16 parts"), "{e}");
}

#[test]
fn a_key_that_does_nothing_is_refused_with_those_that_do() {
    let e = CacheSpec::parse("{ method = \"kivi\", t = 0.5 }").expect_err("refused").to_string();
    assert!(e.contains("t: not read by method = \"kivi\"") && e.contains("quant"), "{e}");
    let e = error(&TABLE2.replace("method = \"minicache\"", "method = \"mean\""));
    assert!(e.contains("x.toml:12: cache.t: not read by"), "{e}");
    // Defaults of several variants are for those that read them; a variant's own keys have to do something.
    let with = |variant: &str| format!("{TABLE2}\n[[variants]]\ncache = {{ method = \"full\"{variant} }}\n");
    assert!(Experiment::from_toml(&with(""), &[], None).is_ok());
    let e = error(&with(", t = 0.5"));
    assert!(e.contains("variants.0.cache.t: not read by method = \"full\""), "{e}");
    let e = error(&with(", tt = 0.5"));
    assert!(e.contains("variants.0.cache.tt: unknown key of"), "{e}");
}

#[test]
fn errors_of_numbers_have_a_line() {
    let e = error(&TABLE2.replace("limit = 100", "limit = 1000000000000"));
    assert!(e.contains("x.toml:7: limit: must be at most 16777216, not 1000000000000"), "{e}");
    let e = error(&TABLE2.replace("residual = 32", "residual = 1000000000000"));
    assert!(e.contains("x.toml:14: cache.quant.residual"), "{e}");
    let e = error(&TABLE2.replace("[cache]", "[fidelity]\nprefill = 99999999999\n[cache]"));
    assert!(e.contains("fidelity.prefill: must be at most"), "{e}");
}

#[test]
fn more_cells_than_anybody_runs_are_refused() {
    let values = |n: usize| (0..n).map(|i| format!("{}", i as f64 / 1000.0)).collect::<Vec<_>>().join(", ");
    let text = TABLE2.replace(
        "[0.0, 0.05, 1.0]",
        &format!("[{0}]\n\"cache.t\" = [{0}]\n\"cache.alpha\" = [{0}]", values(400)),
    );
    let e = error(&text);
    assert!(e.contains("sweep") && e.contains("at most 10000"), "{e}");
}

#[test]
fn how_much_goes_side_by_side_is_no_part_of_what_is_measured() {
    let e = Experiment::from_toml(TABLE2, &["accuracy.batch=1".into(), "fidelity.batch=16".into()], None);
    let e = e.expect("valid");
    assert_eq!((e.accuracy.batch, e.fidelity.batch), (Some(1), Some(16)));
    let plain = Experiment::from_toml(TABLE2, &[], None).expect("valid");
    let json = |e: &Experiment| serde_json::to_string(&(&e.accuracy, &e.fidelity)).expect("json");
    assert_eq!(json(&e), json(&plain));
}

#[test]
fn errors_are_one_line_of_bounded_length() {
    let long = "x".repeat(1 << 20);
    for text in ["a\nb", "a\r\u{1b}[2J", &long, &format!("{{ method = \"full\", \"{long}\\n\" = 1 }}")] {
        let error = CacheSpec::parse(text).unwrap_err().to_string();
        assert!(!error.contains(char::is_control) && error.chars().count() <= 1501, "{error}");
    }
}

#[test]
fn chosen_pairs_are_layers_of_the_model() {
    let shape =
        ModelShape { layers: 8, heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, ..ModelShape::PLAIN };
    let check = |first: &str| {
        let spec = format!("{{ method = \"minicache\", pairs = {{ keys = [{first}], values = [0] }} }}");
        CacheSpec::parse(&spec).and_then(|spec| spec.validate_for(&shape))
    };
    assert!(check("0, 2, 6").is_ok());
    for first in ["7", "8", "0, 1", "2, 0", "3, 3", "9223372036854775807", "9223372036854775807, 0"] {
        assert!(check(first).unwrap_err().to_string().contains("pairs.keys"), "{first}");
    }
}
