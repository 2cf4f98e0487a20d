//! What an experiment leaves to choice.

use std::fs;

use crate::Place;

#[test]
fn what_is_left_to_choice_is_chosen_on_calibration_text_and_recorded() {
    let place = Place::new();
    let words: Vec<String> = (0..900).map(|i| format!("w{}", (i * i + 7 * i) % 97)).collect();
    place.write("text.txt", &words.join(" "));
    let calibration = "calibration = { file = \"text.txt\", tokens = 512, chunk = 256 }";
    place.write(
        "auto.toml",
        &format!(
            r#"id = "auto"
kind = "fidelity"
models = ["model"]
tasks = ["gsm8k"]
limit = 2
fidelity = {{ prefill = 48, continuation = 8 }}

[[variants]]
name = "pairs"
cache = {{ method = "minicache", pairs = "auto", budget_ratio = 1.15, {calibration} }}

[[variants]]
name = "groups"
cache = {{ method = "latent", sinks = 0, k = {{ group = "auto" }}, v = {{ group = "auto" }}, budget_ratio = 3.0, {calibration} }}

[[variants]]
name = "groups of all heads"
cache = {{ method = "latent", sinks = 1, k = {{ group = "auto", heads = "all" }}, v = {{ group = "auto", heads = "all" }}, budget_ratio = 3.0, {calibration} }}
"#
        ),
    );
    place.done(&["run", "auto.toml"]);
    let info: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(place.path("results/sample/auto/run.json")).unwrap())
            .unwrap();
    let chosen = |variant: &str| -> serde_json::Value {
        let text = info["chosen"][format!("{variant}, model")].as_str().unwrap();
        serde_json::from_str(text).unwrap()
    };
    let pairs = &chosen("pairs")["pairs"];
    let taken = |side: &str| pairs[side].as_array().unwrap().len();
    assert!((1..=3).contains(&(taken("keys") + taken("values"))), "{pairs}");
    for (groups, side) in
        [("groups", "k"), ("groups", "v"), ("groups of all heads", "k"), ("groups of all heads", "v")]
    {
        let groups = chosen(groups);
        assert!([1, 2, 4].contains(&groups[side]["group"].as_u64().unwrap()), "{groups}");
        assert!(groups[side]["rate"].as_f64().unwrap() > 0.0, "{groups}");
    }
    // The report says so, and a second run changes nothing.
    let report = fs::read_to_string(place.path("results/sample/auto/report.md")).unwrap();
    assert!(report.contains("Chosen for pairs, model"), "{report}");
    let before = fs::read(place.path("results/sample/auto/run.json")).unwrap();
    place.done(&["run", "auto.toml"]);
    assert_eq!(fs::read(place.path("results/sample/auto/run.json")).unwrap(), before);
}
