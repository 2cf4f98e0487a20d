//! What the rows say of the claims.

use std::fmt::Write;

use minicache_plot::report;

use crate::results::{SIMILARITY, SWEEP, SWEEP_ROWS, experiment, paper, similarity_rows, text};

#[test]
fn the_verdict_follows_the_rows() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), SIMILARITY, &similarity_rows(0.9), 2, true);
    report(&dir, Some(&paper())).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("**Reproduced**") && md.contains("keys 0.90 to 0.91"), "{md}");

    // scores of 0..1 are shown in points, and without pairs of samples the scores' own intervals count
    let judged = |rows: &str| {
        let dir = experiment(root.path(), SWEEP, rows, 5, true);
        report(&dir, None).unwrap();
        text(&dir, "report.md")
    };
    let md = judged(SWEEP_ROWS);
    assert!(md.contains("gsm8k: \u{2212}1 [\u{2212}15.1, 13.1] from 40. **Cannot be told here**"), "{md}");
    assert!(md.contains("gsm8k: 19 [") && md.contains("against mean. **Reproduced**"), "{md}");
    let verdict = text(root.path(), "verdict.md");
    assert!(verdict.contains("Of 3 claims of the paper: 2 reproduced, 1 cannot be told here."), "{verdict}");
    assert!(
        verdict.contains("`fig1b`, Tiny-8, half of the layers: about ") && verdict.contains("xKV"),
        "{verdict}"
    );
    let md = judged(&SWEEP_ROWS.replace("0.39,0.29,0.49", "0.15,0.10,0.20"));
    assert!(md.contains("from 40. **Not reproduced**"), "{md}");
    // differences on the same samples tell what the scores' intervals cannot
    let paired = SWEEP_ROWS.replace("score_hi,", "score_hi,diff,diff_lo,diff_hi,");
    let paired = paired.replace("0.40,0.30,0.50", "0.40,0.30,0.50,,,");
    let paired = paired.replace("0.39,0.29,0.49", "0.39,0.29,0.49,-0.01,-0.015,-0.005");
    let paired = paired.replace("0.20,0.12,0.30", "0.20,0.12,0.30,-0.2,-0.25,-0.15");
    let md = judged(&paired.replace("0.30,0.20,0.40", "0.30,0.20,0.40,-0.1,-0.15,-0.05"));
    assert!(md.contains("gsm8k: \u{2212}1 [\u{2212}1.5, \u{2212}0.5] from 40. **Reproduced**"), "{md}");
}

/// An accuracy experiment over `variants` (name, cache, score, ratio) on four tasks.
fn accuracy(id: &str, plots: &str, variants: &[(&str, &str, f64, f64)]) -> (String, String) {
    let toml = format!(
        "id = \"{id}\"\nkind = \"accuracy\"\nmodels = [\"tiny\"]\ntasks = [\"a\"]\n\
         [[paper]]\ncsv = \"paper_table_longbench.csv\"\n[[paper]]\ncsv = \"paper_headline.csv\"\n\
         [[claims]]\ntext = \"kept\"\npaper = \"all\"\n\
         needs = {{ rule = \"kept\", which = {{ variant = \"minicache-4\" }}, within = 0.042, mean = true }}\n{plots}"
    );
    let mut csv = "model,task,variant,cache,score,score_lo,score_hi,samples,ratio\n".to_string();
    for task in ["set/a", "set/b", "set/c", "set/d"] {
        for (name, cache, score, ratio) in variants {
            let cache = cache.replace('"', "\"\"");
            let (low, high) = (score - 2.0, score + 2.0);
            writeln!(csv, "tiny,{task},{name},\"{cache}\",{score},{low},{high},50,{ratio}").unwrap();
        }
    }
    (toml, csv)
}

const FULL: (&str, &str, f64, f64) = ("full", r#"{"method":"full"}"#, 40.0, 1.0);
const KIVI: (&str, &str, f64, f64) = ("kivi-2", r#"{"method":"kivi"}"#, 36.0, 5.3);

#[test]
fn scores_kept_or_lost() {
    let plots = r#"
[[plots]]
name = "radar"
kind = "radar"
x = "task"
y = "score"
series = ["variant"]
[[plots]]
name = "../up"
x = "task"
y = "score"
"#;
    let merged = r#"{"method":"minicache","quant":{"bits":4}}"#;
    for (score, label) in [(40.0, "**Reproduced**"), (30.0, "**Not reproduced**")] {
        let root = tempfile::tempdir().unwrap();
        let (toml, csv) = accuracy("table1", plots, &[FULL, KIVI, ("minicache-4", merged, score, 5.0)]);
        let dir = experiment(root.path(), &toml, &csv, 12, true);
        let summary = report(root.path(), Some(&paper())).unwrap();
        let md = text(&dir, "report.md");
        assert!(md.contains(label), "{md}");
        assert!(md.contains("mean of 4 tasks: ") && md.contains(" from 40. "), "{md}");
        assert!(md.contains("| full | 40 | 40 | 40 | 40 | 40 | 1 |"), "one column for each task: {md}");
        assert!(summary.experiments[0].notes.iter().any(|n| n.contains("`../up` is left out: its name")));
        let svg = text(&dir, "radar.svg");
        assert!(svg.contains("\na\n") && !svg.contains("set/a"), "what all tasks share is not repeated");
    }
    let root = tempfile::tempdir().unwrap();
    let zero = [("full", FULL.1, 0.0, 1.0), ("minicache-4", merged, 0.0, 5.0)];
    let (toml, csv) = accuracy("table1", "", &zero);
    let dir = experiment(root.path(), &toml, &csv, 8, true);
    report(root.path(), Some(&paper())).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("the full cache scores 0. **Cannot be told here**"), "{md}");
    assert!(text(root.path(), "verdict.md").contains("a model that can do mean of 4 tasks."));
}

#[test]
fn best_setting_and_throughput() {
    let root = tempfile::tempdir().unwrap();
    let toml = r#"
id = "table2"
kind = "accuracy"
models = ["tiny"]
[[claims]]
text = "gamma = 0.05 is best"
paper = "0.05"
needs = { rule = "best", variant = "minicache", key = "cache.retention.gamma", value = 0.05 }
[[plots]]
name = "gamma"
x = "cache.retention.gamma"
y = "score"
log_x = true
"#;
    let csv = "model,task,variant,cache.retention.gamma,cache,score,diff,diff_lo,diff_hi\n\
               t,x,full,,\"{\"\"method\"\":\"\"full\"\"}\",0.4,,,\n\
               t,x,minicache,0.0,{},0.1,-0.3,-0.31,-0.29\n\
               t,x,minicache,0.05,{},0.2,-0.2,-0.21,-0.19\n\
               t,x,minicache,1.0,{},0.3,-0.1,-0.11,-0.09\n";
    let dir = experiment(root.path(), toml, csv, 3, true);
    report(&dir, None).unwrap();
    let md = text(&dir, "report.md");
    assert!(
        md.contains(
            "x: \u{2212}20 [\u{2212}21, \u{2212}19] from full at gamma = 0.05, \u{2212}10 [\u{2212}11, \u{2212}9] at 1, the best other. **Not reproduced**"
        ),
        "{md}"
    );
    assert!(text(&dir, "gamma.svg").contains("\n0.05\n"), "zero does not push the others off the axis");
    assert!(!md.contains("no place"), "zero has a place left of them: {md}");

    let toml = r#"
id = "fig5"
kind = "throughput"
models = ["tiny"]
claims = [
    { text = "faster", paper = "5 times", needs = { rule = "times", variant = "mini", column = "tokens_per_s", least = 5.0 } },
    { text = "smaller", paper = "41 %", needs = { rule = "less", variant = "mini", column = "memory_bytes", share = 0.41 } },
]
[[paper]]
csv = "paper_headline.csv"
[[plots]]
name = "memory"
x = "batch"
y = "peak_bytes"
series = ["variant"]
log_x = true
"#;
    let csv = "model,task,variant,cache,batch,tokens_per_s,peak_bytes,memory_bytes\n\
               tiny,,full,\"{\"\"method\"\":\"\"full\"\"}\",8,100,4294967296,5000000000\n\
               tiny,,mini,\"{\"\"method\"\":\"\"minicache\"\"}\",8,110,268435456,4000000000\n\
               tiny,,mini,\"{\"\"method\"\":\"\"minicache\"\"}\",32,240,1073741824,4500000000\n";
    let dir = experiment(root.path(), toml, csv, 3, true);
    report(&dir, Some(&paper())).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("2.4 times: 240 (mini at batch 32) against 100 (full at batch 8). **Partly"), "{md}");
    assert!(md.contains("20 % less (mini at batch 8). **Not reproduced**"), "{md}");
    assert!(text(&dir, "memory.svg").contains("peak memory (GiB)"));

    let toml = r#"
id = "memory"
kind = "memory"
models = ["llama-2-7b"]
claims = [
    { text = "merged", paper = "1.53x", needs = { rule = "ratio", variant = "merged", least = 1.53 } },
    { text = "packed", paper = "5.02x", needs = { rule = "ratio", variant = "packed", least = 5.02, models = ["llama-2-7b"] } },
]
[[paper]]
csv = "paper_headline.csv"
"#;
    let row = |variant: &str, quant: &str, ratio: f64, nominal: f64| {
        let cache = format!("{{\"\"method\"\":\"\"minicache\"\",\"\"start_layer\"\":16{quant}}}");
        format!("llama-2-7b,{variant},\"{cache}\",4096,{ratio},{nominal},32\n")
    };
    let bits = ",\"\"quant\"\":{\"\"bits\"\":4}";
    let csv = format!(
        "model,variant,cache,context,ratio,nominal_ratio,layers\n{}{}",
        row("merged", "", 1.32, 1.333_33),
        row("packed", bits, 4.7, 5.019_61)
    );
    let dir = experiment(root.path(), toml, &csv, 2, true);
    report(&dir, Some(&paper())).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("1.32x of bytes held, 1.33x by arithmetic. **Not reproduced**"), "{md}");
    assert!(md.contains("4.7x of bytes held, 5.02x by arithmetic. **Partly reproduced**"), "{md}");
}
