//! What is drawn, and what no figure can hold.

use std::fmt::Write;
use std::fs;

use minicache_plot::report;

use crate::results::{
    FIDELITY, FIDELITY_ROWS, SIMILARITY, SWEEP, SWEEP_ROWS, experiment, paper, similarity_rows, text,
};

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
fn the_front_says_which_side_a_setting_is_of() {
    let root = tempfile::tempdir().unwrap();
    let rows = "key,model,task,variant,cache.kept,cache.k.rate,cache.v.rate,cache,ratio,perplexity,kl,agreement,samples,seconds\n\
                a,tiny,text,low rank,,2.0,3.0,{},5,9,0.1,0.5,4,1\n\
                b,tiny,text,SnapKV,0.2,,,{},2,9,0.05,0.5,4,1\n";
    let dir = experiment(root.path(), FIDELITY, rows, 2, true);
    report(&dir, None).unwrap();
    let md = text(&dir, "report.md");
    let wanted =
        "On the front: 1 SnapKV (kept = 0.2); 2 low rank (rate of keys = 2.0, rate of values = 3.0).";
    assert!(md.contains(wanted), "{md}");
    // The best at two and more, and at three and more; at five and more it is the same again.
    assert!(md.contains(": 0.05 at 2x (SnapKV), 0.1 at 5x (low rank).\n"), "{md}");
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
