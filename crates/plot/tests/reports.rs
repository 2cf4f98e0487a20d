//! Reports of made-up results: what is drawn, what is written, what happens to files that are not whole.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use minicache_config::{Experiment, ModelInfo, RunInfo};
use minicache_plot::report;

const SIMILARITY: &str = r#"
id = "fig1a"
place = 10
title = "Similarity of adjacent layers"
kind = "similarity"
models = ["tiny"]
tasks = ["coqa", "gsm8k"]
notes = "What adjacent layers share."
[[paper]]
csv = "paper_figure_similarity_llama3_70b.csv"
claim = "Deep layers are alike."
[[claims]]
text = "Deep layers are alike"
paper = "0.77 to 0.90"
needs = { rule = "similar", least = 0.67 }
[[plots]]
name = "cosine"
x = "depth"
y = "token_cosine"
series = ["task"]
band = "token_cosine_std"
filter = { side = "key|value" }
paper_x = "depth"
paper_y = ["coqa", "gsm8k"]
[[plots]]
name = "absent"
x = "pair"
y = "no_such_column"
"#;

const SWEEP: &str = r#"
id = "fig1b"
place = 20
title = "Merged layers"
kind = "accuracy"
models = ["tiny"]
tasks = ["gsm8k"]
variants = [{ name = "full", cache = { method = "full" } }, { cache = { method = "minicache" } }, { cache = { method = "mean" } }]
[[claims]]
text = "half of the layers"
paper = "no loss"
needs = { rule = "kept", which = { variant = "minicache", at = { merged_share = 0.5 } }, within = 0.05 }
[[claims]]
text = "ahead of the mean"
paper = "0.81 against 0.55"
needs = { rule = "ahead", which = { variant = "minicache", at = { merged_share = 0.5 } }, of = [{ variant = "mean", at = { merged_share = 0.5 } }] }
[[plots]]
name = "merged"
x = "merged_layers"
y = "score"
series = ["variant"]
[[plots]]
name = "bars"
kind = "bar"
x = "task"
y = "score"
series = ["variant"]
"#;

const FIDELITY: &str = r#"
id = "fidelity"
place = 30
kind = "fidelity"
models = ["tiny"]
tasks = ["text"]
[[plots]]
name = "frontier"
kind = "scatter"
x = "ratio"
y = "kl"
series = ["variant"]
log_y = true
"#;

fn info(toml: &str, planned: usize, finished: bool) -> RunInfo {
    let model = ModelInfo { label: "Tiny-8".into(), layers: Some(8), ..ModelInfo::default() };
    RunInfo {
        command: "minicache run experiments/x.toml".into(),
        experiment: Experiment::from_toml(toml, &[], None).unwrap(),
        origins: [("gsm8k".to_string(), "bundled sample".to_string())].into_iter().collect(),
        models: [("tiny".to_string(), model)].into_iter().collect(),
        chosen: indexmap::IndexMap::new(),
        calibrations: indexmap::IndexMap::new(),
        machine: "2 cores".into(),
        simd: "avx2".into(),
        date: "2025-01-31".into(),
        planned,
        keys: Vec::new(),
        finished,
    }
}

/// A results folder with one experiment.
fn experiment(root: &Path, toml: &str, csv: &str, planned: usize, finished: bool) -> PathBuf {
    let info = info(toml, planned, finished);
    let dir = root.join(&info.experiment.id);
    fs::create_dir_all(&dir).unwrap();
    info.write(&dir).unwrap();
    fs::write(dir.join("cells.csv"), csv).unwrap();
    dir
}

fn similarity_rows(cosine: f64) -> String {
    let mut csv =
        "model,task,variant,cache,pair,side,token_cosine,token_cosine_std,cka,samples,seconds\n".to_string();
    for task in ["coqa", "gsm8k"] {
        for pair in 0..7 {
            for side in ["key", "value", "hidden"] {
                let y = cosine + f64::from(pair) * 0.001;
                writeln!(
                    csv,
                    "tiny,{task},full,\"{{\"\"method\"\":\"\"full\"\"}}\",{pair},{side},{y},0.02,0.7,24,1.5"
                )
                .unwrap();
            }
        }
    }
    csv
}

const SWEEP_ROWS: &str = r#"model,task,variant,cache.start_layer,cache,score,score_lo,score_hi,samples,ratio,bytes,seconds
tiny,gsm8k,full,,"{""method"":""full""}",0.40,0.30,0.50,24,1,4096,2
tiny,gsm8k,minicache,4,"{""method"":""minicache"",""start_layer"":4}",0.39,0.29,0.49,24,1.3,3150,2
tiny,gsm8k,minicache,6,"{""method"":""minicache"",""start_layer"":6}",0.40,0.30,0.50,24,1.1,3700,2
tiny,gsm8k,mean,4,"{""method"":""mean"",""start_layer"":4}",0.20,0.12,0.30,24,1.33,3072,2
tiny,gsm8k,mean,6,"{""method"":""mean"",""start_layer"":6}",0.30,0.20,0.40,24,1.14,3600,2
"#;

const FIDELITY_ROWS: &str = r#"model,task,variant,cache,kl,perplexity,samples,ratio,bytes,seconds
tiny,text,full,"{""method"":""full""}",0,12,8,1,9000,2
tiny,text,kivi-2,"{""method"":""kivi""}",0.2,14,8,5.3,1700,2
tiny,text,latent-4,"{""method"":""latent""}",0.03,12.2,8,6.4,1400,2
"#;

fn paper() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments/paper")
}

fn text(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}

#[test]
fn similarity_beside_the_paper() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), SIMILARITY, &similarity_rows(0.05), 2, true);
    let summary = report(root.path(), Some(&paper())).unwrap();
    assert_eq!(summary.experiments.len(), 1);
    let one = &summary.experiments[0];
    assert_eq!((one.id.as_str(), one.figures, one.complete), ("fig1a", 1, true));
    assert!(!one.notes.iter().any(|n| n.contains("bundled sample")), "{:?}", one.notes);
    assert!(
        one.notes[0].contains("`absent`") && one.notes[0].contains("`no_such_column`"),
        "{:?}",
        one.notes
    );

    let svg = text(&dir, "cosine.svg");
    for part in ["keys", "values", "coqa", "gsm8k", "paper, LLaMA-3-70B", "relative depth"] {
        assert!(svg.contains(part), "{part}");
    }
    assert!(fs::read(dir.join("cosine.png")).unwrap().starts_with(b"\x89PNG"));

    let md = text(&dir, "report.md");
    // deep half: pairs 4, 5, 6
    assert!(
        md.contains("* Deep layers are alike (paper: 0.77 to 0.90). Tiny-8: keys 0.05 to 0.06 (linear CKA 0.70); values 0.05 to 0.06 (linear CKA 0.70). **Not reproduced**."),
        "{md}"
    );
    for part in
        ["# Similarity of adjacent layers", "bundled sample", "24 samples", "minicache run", "0.05 ± 0.02"]
    {
        assert!(md.contains(part), "{part}\n{md}");
    }
    assert!(md.contains("| pair index | coqa | gsm8k | truthfulqa |"), "{md}");
}

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

#[test]
fn intervals_levels_and_derived_columns() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), SWEEP, SWEEP_ROWS, 5, true);
    report(&dir, None).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("0.39 [0.29, 0.49]") && md.contains("3.08 KiB"), "{md}");
    let svg = text(&dir, "merged.svg");
    // two bands of the swept caches and one of the level of the full cache
    assert!(svg.matches("<polygon opacity=\"0.13\"").count() == 3, "{svg}");
    assert!(svg.contains("merged layers") && svg.contains("\nfull\n") && svg.contains("\nmean\n"));
    assert!(text(&dir, "bars.svg").contains("start layer = 4"), "swept keys tell bars apart");
}

#[test]
fn the_front_of_the_frontier() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), FIDELITY, FIDELITY_ROWS, 3, true);
    let summary = report(root.path(), None).unwrap();
    assert_eq!(summary.experiments[0].notes.len(), 1, "KL 0 has no place on a logarithmic axis");
    let md = text(&dir, "report.md");
    assert!(md.contains("Tiny-8, text: 0.03 at 6.4x (latent-4)."), "{md}");
    assert!(!md.contains("eproduced**"), "the paper claims nothing here");
    assert!(
        !text(&dir, "frontier.svg").contains("\nfull\n"),
        "a series without a point is not in the legend"
    );
}

#[test]
fn same_rows_same_bytes_and_untouched_files() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), SIMILARITY, &similarity_rows(0.05), 2, true);
    report(root.path(), Some(&paper())).unwrap();
    let names = ["cosine.png", "cosine.svg", "report.md", "../index.html"];
    let read = || {
        names
            .map(|n| (fs::read(dir.join(n)).unwrap(), fs::metadata(dir.join(n)).unwrap().modified().unwrap()))
    };
    let first = read();
    report(root.path(), Some(&paper())).unwrap();
    assert!(first == read(), "nothing is written again");
    for name in names {
        fs::remove_file(dir.join(name)).unwrap();
    }
    report(&dir, Some(&paper())).unwrap();
    assert!(
        first.map(|(bytes, _)| bytes) == read().map(|(bytes, _)| bytes),
        "one experiment's folder makes the same"
    );
}

#[test]
fn a_run_that_was_killed_is_reported_as_far_as_it_went() {
    let root = tempfile::tempdir().unwrap();
    let cut = &SWEEP_ROWS[..SWEEP_ROWS.len() - 30];
    let dir = experiment(root.path(), SWEEP, cut, 5, false);
    let summary = report(root.path(), None).unwrap();
    assert!(!summary.experiments[0].complete);
    let md = text(&dir, "report.md");
    assert!(
        md.contains(
            "**Incomplete.** The run has not finished: 4 of 5 cells so far. The last row was cut off"
        ),
        "{md}"
    );

    for csv in ["", "model,task\n"] {
        let dir = experiment(root.path(), SWEEP, csv, 5, false);
        report(root.path(), None).unwrap();
        assert!(text(&dir, "report.md").contains("No cell has finished yet"));
    }
    fs::remove_file(dir.join("cells.csv")).unwrap();
    report(root.path(), None).unwrap();
    assert!(text(&dir, "report.md").contains("No cell has finished yet"));
}

#[test]
fn rows_of_other_plans_are_shown_beside_the_plan_s_unless_they_have_its_names() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), FIDELITY, "", 3, false);
    let mut info = info(FIDELITY, 3, false);
    info.keys = ["k1", "k2", "k3"].map(str::to_string).to_vec();
    info.write(&dir).unwrap();
    let rows = [
        "k1,tiny,text,full,\"{}\",0,12,8,1,9000,2",
        "k2,tiny,text,kivi-2,\"{}\",0.25,14,8,5.3,1700,2",
        "o1,other,text,kivi-2,\"{}\",0.375,14,8,5.3,1700,2",
        "o2,tiny,text,kivi-2,\"{2}\",0.4375,14,8,5.3,1700,2",
    ];
    let header = "key,model,task,variant,cache,kl,perplexity,samples,ratio,bytes,seconds";
    fs::write(dir.join("cells.csv"), format!("{header}\n{}\n", rows.join("\n"))).unwrap();
    let summary = report(&dir, None).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("2 of 3 cells so far"), "{md}");
    assert!(md.contains("0.25") && md.contains("0.375") && !md.contains("0.4375"), "{md}");
    let notes = &summary.experiments[0].notes;
    assert!(notes.iter().any(|n| n.contains("1 more rows")), "{notes:?}");
}

#[test]
fn bad_files_are_one_clear_line() {
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), SWEEP, "model,task,kl\ntiny,x,1\ntiny,x\ntiny,x,2\n", 5, true);
    let error = report(&dir, None).unwrap_err().to_string();
    assert!(error.contains("cells.csv: line 3: 2 fields where the header has 3"), "{error}");
    assert!(!error.contains('\n'));

    // beside a good one, the page shows the good one and says what is wrong with the other
    experiment(root.path(), FIDELITY, FIDELITY_ROWS, 3, true);
    let summary = report(root.path(), None).unwrap();
    assert_eq!((summary.experiments.len(), summary.problems.len()), (1, 1));
    let page = text(root.path(), "index.html");
    assert!(page.contains("fig1b/cells.csv: line 3") && !page.contains(&*root.path().to_string_lossy()));

    fs::write(dir.join("run.json"), "{").unwrap();
    let error = report(&dir, None).unwrap_err().to_string();
    assert!(error.contains("run.json") && !error.contains('\n'), "{error}");

    let empty = tempfile::tempdir().unwrap();
    let error = report(empty.path(), None).unwrap_err().to_string();
    assert!(error.contains("no results here"), "{error}");
    let error = report(&empty.path().join("none"), None).unwrap_err().to_string();
    assert!(error.contains("cannot list"), "{error}");
}

#[test]
fn numbers_that_no_axis_can_have_are_left_out_of_figures() {
    let rows = |kl: &str, ratio: &str| {
        let header = "key,model,task,variant,cache,ratio,perplexity,kl,agreement,samples,seconds";
        let row =
            |i: usize, ratio: &str, kl: &str| format!("k{i},tiny,text,v{i},{{}},{ratio},9,{kl},0.5,4,1\n");
        format!("{header}\n{}{}{}", row(0, ratio, kl), row(1, "1.3", "0.79"), row(2, "4.6", "0.2"))
    };
    for linear in [false, true] {
        let toml = if linear { FIDELITY.replace("log_y = true", "") } else { FIDELITY.to_string() };
        for number in ["1e308", "-1e308", "5e-324", "1e-310", "1e-200", "1e200", "1e99", "-1e99", "1e-99"] {
            // as a value, and on the x axis
            let root = tempfile::tempdir().unwrap();
            experiment(root.path(), &toml, &rows(number, "1"), 3, true);
            let other = toml.replacen("\"fidelity\"", "\"other\"", 1);
            experiment(root.path(), &other, &rows("0.5", number), 3, true);
            let summary = report(root.path(), None).unwrap();
            let figures: Vec<usize> = summary.experiments.iter().map(|e| e.figures).collect();
            assert_eq!(figures, [1, 1], "{number}");
        }
    }
}

#[test]
fn a_figure_of_thousands_of_series_is_left_out() {
    let root = tempfile::tempdir().unwrap();
    let mut csv = SWEEP_ROWS.lines().next().unwrap().to_string() + "\n";
    for i in 0..5000 {
        writeln!(csv, "tiny,gsm8k,v{i},{},{{}},0.4,0.3,0.5,24,1,4096,2", i % 8).unwrap();
    }
    let dir = experiment(root.path(), SWEEP, &csv, 5, true);
    let summary = report(root.path(), None).unwrap();
    let notes = &summary.experiments[0].notes;
    assert!(notes.iter().any(|n| n.contains("figure `bars`") && n.contains("pixels")), "{notes:?}");
    assert!(text(&dir, "report.md").contains("`bars` is left out") && !dir.join("bars.png").exists());
    assert!(summary.problems.is_empty());
}

#[test]
fn rows_without_run_json_are_still_tables() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("mine");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("cells.csv"), "model,odd,cache\nm|1,<b>,x\nm|1,2,x\n").unwrap();
    report(root.path(), None).unwrap();
    let md = text(&dir, "report.md");
    assert!(md.contains("# mine") && md.contains("`run.json` is missing") && md.contains("m|1"), "{md}");
    assert!(text(root.path(), "index.html").contains("&lt;b&gt;"));
}

#[test]
fn the_page_needs_nothing_but_itself() {
    let root = tempfile::tempdir().unwrap();
    experiment(root.path(), SIMILARITY, &similarity_rows(0.05), 2, true);
    experiment(root.path(), SWEEP, SWEEP_ROWS, 5, true);
    experiment(root.path(), FIDELITY, FIDELITY_ROWS, 3, false);
    report(root.path(), Some(&paper())).unwrap();
    let page = text(root.path(), "index.html");
    for outside in ["src=\"", "@import", "url(", "href=\"http"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("<svg role=\"img\" aria-label=\"").count(), 4);
    assert!(
        page.contains("var(--fig-hue-1)") && !page.contains("#0072B2\""),
        "figures take the theme's colours"
    );
    assert!(page.contains("prefers-color-scheme") || page.contains("light-dark("));
    let place = |id: &str| page.find(&format!("<section id=\"{id}\"")).unwrap();
    assert!(place("fig1a") < place("fig1b") && place("fig1b") < place("fidelity"));
    assert!(page.contains("<th scope=\"col\"") && page.contains("method = ") && page.contains("incomplete"));
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

#[test]
fn bins_of_tokens_beside_all_tokens() {
    let toml = r#"
id = "fig2b"
kind = "similarity"
models = ["tiny"]
claims = [{ text = "first apart", paper = "0.75", needs = { rule = "first_apart", least = 0.75 } }]
[[plots]]
name = "by_position"
x = "position"
y = "token_cosine"
series = ["model", "pair"]
filter = { side = "key" }
[[plots]]
name = "by_depth"
x = "depth"
y = "token_cosine"
series = ["model", "side"]
"#;
    let mut csv = "model,task,variant,cache,pair,side,position,token_cosine\n".to_string();
    for side in ["key", "value"] {
        for pair in 0..7 {
            writeln!(csv, "tiny,t,full,{{}},{pair},{side},,0.5").unwrap();
            for (position, cosine) in [(0, 0.2), (32, 0.9), (64, 0.9)] {
                writeln!(csv, "tiny,t,full,{{}},{pair},{side},{position},{cosine}").unwrap();
            }
        }
    }
    let root = tempfile::tempdir().unwrap();
    let dir = experiment(root.path(), toml, &csv, 1, true);
    let summary = report(&dir, None).unwrap();
    assert!(summary.experiments[0].notes.is_empty(), "{:?}", summary.experiments[0].notes);
    let md = text(&dir, "report.md");
    assert!(
        md.contains("keys 0.20 in the first bin and 0.90 after it") && md.contains("**Reproduced**"),
        "{md}"
    );
    // the line of the bins does not go through the value of all tokens, nor the other way round
    assert!(md.contains("pair = 0 0.2 to 0.9") && md.contains("keys 0.5; values 0.5"), "{md}");
    let svg = text(&dir, "by_position.svg");
    assert!(svg.contains("#2C6FBB") && svg.contains("#C8553D"), "an ordered series has ordered colours");
}
