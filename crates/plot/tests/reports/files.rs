//! What is written, and what happens to files that are not whole.

use std::fs;

use minicache_plot::report;

use crate::results::{
    FIDELITY, FIDELITY_ROWS, SIMILARITY, SWEEP, SWEEP_ROWS, experiment, info, paper, similarity_rows, text,
};

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
