//! `minicache compare` on small results folders made by hand, and cells that are computed a second time.

use std::fs;

use serde_json::Value;

use crate::{Place, text};

const CELLS: &str = "key,model,task,variant,cache.t,cache,pair,perplexity,kl,ratio,bytes,samples,seconds\n\
    k0,m,coqa,full,,{},,9.14121,0,0.993532,23746560,7,14.651\n\
    k1,m,coqa,SLERP,0.5,{},0,29.85,0.5,1.28,18432000,7,2.5\n\
    k1,m,coqa,SLERP,0.5,{},1,30.85,0.7,1.28,18432000,7,2.5\n";

const ANSWERS: &str = "key,model,task,variant,score,score_lo,score_hi,f1,ratio,bytes,samples,tokens,seconds\n\
    k2,m,coqa,full,0.5,0.25,0.75,0.6,0.99,1000,8,600,1\n";

/// Writes the experiment `e` into the results folder `folder`; `simd` is the instruction set of each key.
fn results(place: &Place, folder: &str, cells: &str, simd: &str) {
    place.write(&format!("{folder}/e/cells.csv"), cells);
    let made = ["k0", "k1", "k2"].map(|key| format!("\"{key}\": {{\"simd\": \"{simd}\"}}")).join(", ");
    place.write(&format!("{folder}/e/made.json"), &format!("{{{made}}}"));
}

/// Two folders with the same cells, but for what `change` does in the second.
fn two(change: impl Fn(&str) -> String) -> Place {
    let place = Place::new();
    results(&place, "a", CELLS, "avx2");
    results(&place, "b", &change(CELLS), "avx2");
    place
}

/// stdout of a comparison that finds a difference, which stderr sums up in `words`.
fn differs(place: &Place, args: &[&str], words: &str) -> String {
    place.fails(args, 1, &[words]);
    text(&place.run(args).stdout)
}

const COMPARE: &[&str] = &["compare", "a", "b"];

#[test]
fn what_only_clocks_tell_apart_is_equal() {
    let place = two(|cells| cells.replace("2.5\n", "5.0\n"));
    let said = place.done(COMPARE);
    assert!(said.contains("e: 2 cells compared, 2 equal, 0 different, 0 only in A, 0 only in B"), "{said}");
    assert!(said.contains("not judged: seconds in B 2.00 times that in A (1.00 to 2.00)"), "{said}");
    // The last digit printed is rounding; the order of rows and the name of a variant say nothing.
    let last = |cells: &str| {
        let mut lines: Vec<String> = cells.replace("9.14121", "9.14122").lines().map(String::from).collect();
        lines[1..].reverse();
        lines.join("\n").replace("SLERP", "renamed") + "\n"
    };
    assert!(two(last).done(COMPARE).contains("2 equal"));
    // The folders of the experiment itself.
    assert!(place.done(&["compare", "a/e", "b/e"]).contains("e: 2 cells compared, 2 equal"));
}

#[test]
fn a_metric_that_is_off_is_named_with_its_cell() {
    let place = two(|cells| cells.replace("0.7,", "0.71,").replace("23746560", "23746561"));
    let said = differs(&place, COMPARE, "2 of 2 cells differ");
    assert!(
        said.contains("k1 m, coqa, SLERP, cache.t 0.5, pair 1, kl: 0.7 in A, 0.71 in B (within "),
        "{said}"
    );
    assert!(said.contains("k0 m, coqa, full, bytes: 23746560 in A, 23746561 in B (equal)"), "{said}");
    let out = place.run(&["compare", "a", "b", "--json"]);
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), &json["different"], &json["agree"]), (Some(1), &2.into(), &false.into()));
    let difference = &json["experiments"][0]["differences"][1];
    assert_eq!((&difference["key"], &difference["column"]), (&"k1".into(), &"kl".into()));
    // A row, or a value, that is not there any more.
    let place = two(|cells| cells.lines().take(3).map(|line| format!("{line}\n")).collect());
    assert!(
        differs(&place, COMPARE, "1 of 2 cells differ").contains("pair 1, row: there in A, missing in B")
    );
    let place = two(|cells| cells.replace("29.85", ""));
    assert!(differs(&place, COMPARE, "1 of 2 cells differ").contains("29.85 in A, nothing in B"));
}

#[test]
fn another_instruction_set_is_given_more() {
    let place = two(|cells| cells.replace("0.7,", "0.75,").replace("29.85", "30.5"));
    differs(&place, COMPARE, "1 of 2 cells differ");
    fs::remove_file(place.path("b/e/made.json")).unwrap();
    place.done(COMPARE);
    results(&place, "b", &CELLS.replace("0.7,", "0.75,"), "avx512");
    place.done(COMPARE);
    results(&place, "b", &CELLS.replace("0.7,", "0.9,"), "avx512");
    assert!(differs(&place, COMPARE, "1 of 2 cells differ").contains("(within 15 % or 0.0001)"));
    // So is another processor, whatever the instructions; not another number of its cores.
    results(&place, "b", &CELLS.replace("0.7,", "0.75,"), "avx2");
    let made_on = |folder: &str, machine: &str| {
        let made = ["k0", "k1"].map(|key| format!(r#""{key}": {{"simd": "avx2", "machine": "{machine}"}}"#));
        place.write(&format!("{folder}/e/made.json"), &format!("{{{}}}", made.join(", ")));
    };
    made_on("a", "This one, 2 cores, 24 GiB memory");
    made_on("b", "That one, 2 cores, 24 GiB memory");
    place.done(COMPARE);
    made_on("b", "This one, 16 cores, 64 GiB memory");
    differs(&place, COMPARE, "1 of 2 cells differ");
    // Other answers are of other lengths; their score is held to its interval.
    results(&place, "a", ANSWERS, "avx2");
    let other =
        ANSWERS.replace("0.5,0.25,0.75,0.6", "0.625,0.375,0.875,0.7").replace("1000,8,600", "980,8,640");
    results(&place, "b", &other, "avx512");
    assert!(place.done(COMPARE).contains("5 other values of answers differ"));
    results(&place, "b", &other, "avx2");
    differs(&place, COMPARE, "the one cell that was compared differs");
    results(&place, "b", &ANSWERS.replace("full,0.5,0.25,0.75", "full,1,1,1"), "avx512");
    differs(&place, COMPARE, "the one cell that was compared differs");
}

#[test]
fn cells_of_one_folder_are_listed_and_differ_where_that_is_asked() {
    let place = two(|cells| cells.lines().take(2).map(|line| format!("{line}\n")).collect());
    place.write("a/sample/other/cells.csv", ANSWERS);
    let said = place.done(COMPARE);
    assert!(said.contains("e: 1 cells compared, 1 equal, 0 different, 1 only in A, 0 only in B"), "{said}");
    assert!(said.contains("only in A: k1 m, coqa, SLERP"), "{said}");
    assert!(said.contains("no cell in common, 1 cells only in A: sample/other"), "{said}");
    differs(&place, &["compare", "a", "b", "--all"], "2 cells of A are not in B");
    differs(&place, &["compare", "a", "b", "--experiments", "other"], "nothing was compared");
    place.done(&["compare", "b", "a", "--all"]);
    // Rows that need no data are below `sample/` or not, by what else was at hand.
    place.write("b/other/cells.csv", ANSWERS);
    assert!(place.done(COMPARE).contains("other: 1 cells compared, 1 equal"));
}

#[test]
fn a_folder_without_results_is_refused() {
    let place = two(str::to_string);
    fs::create_dir(place.path("empty")).unwrap();
    for bad in ["empty", "absent", "e.toml"] {
        place.fails(&["compare", "a", bad], 2, &[bad, "no results here"]);
        place.fails(&["compare", bad, "a"], 2, &[bad]);
    }
    place.fails(&["compare", "a", "b/e"], 2, &["b/e is the folder of one experiment, a of several"]);
    place.write("b/e/cells.csv", "no,results\n1,2\n");
    place.fails(COMPARE, 2, &["b/e/cells.csv", "no column `key`"]);
}

#[test]
fn cells_are_computed_a_second_time_where_there_are_rows_of_them() {
    let place = Place::new();
    place.done(&["run", "e.toml", "--tasks", "coqa", "--results", "first"]);
    place.fails(&["run", "e.toml", "--results", "second", "--again", "none"], 1, &["none: no rows"]);
    let said = place.done(&["run", "e.toml", "--results", "second", "--again", "first"]);
    let cells = place.done(&["run", "e.toml", "--tasks", "coqa", "--results", "first", "--dry-run"]);
    let count = cells.lines().count() - 1;
    assert!(said.contains(&format!("e: {count} cells, {count} computed\n")), "{said}");
    assert!(!place.path("second/sample/e/report.md").exists());
    assert!(
        place.done(&["compare", "first", "second", "--all"]).contains(&format!("{count} equal, 0 different"))
    );
}
