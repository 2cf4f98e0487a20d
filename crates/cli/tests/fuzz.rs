//! Every file format that the program reads, fed with damaged files: no panic, no endless loop, no memory that a file of
//! that size does not warrant, and errors of one line.
//!
//! Each format runs in a process of its own, this test started again: stack overflows and memory that runs out end a
//! process, and the file in which it notes the input at hand then says which one it was. Inputs are numbered, and a
//! number gives the same input everywhere. Settings come from the environment:
//!
//! * `MINICACHE_FUZZ`: inputs per format (2,000; `make fuzz`: 100,000);
//! * `MINICACHE_FUZZ_SEED`: the number of the first one (0);
//! * `MINICACHE_FUZZ_FORMAT`: the only format.
//!
//! A failure names format and number. With `MINICACHE_FUZZ=1` the one input is also left below `target/tmp`.
#![allow(clippy::unwrap_used)]

#[path = "fuzz/alloc.rs"]
mod alloc;
#[path = "fuzz/data.rs"]
mod data;
#[path = "fuzz/models.rs"]
mod models;
#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/process.rs"]
mod process;
#[path = "fuzz/results.rs"]
mod results;
#[path = "fuzz/texts.rs"]
mod texts;
#[path = "fuzz/tokenizers.rs"]
mod tokenizers;

use std::fmt::{Display, Write as _};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use mutate::Seeds;
use process::{Job, Tally};

/// `Ok` for a file that was taken, the message for one that was refused.
type Outcome = Result<(), String>;

/// Reads a damaged file, given the number of the seed that it comes from and its bytes.
type Read = dyn Fn(usize, &[u8]) -> Outcome;

/// One kind of file, and what reads it.
struct Format {
    seeds: Seeds,
    read: Box<Read>,
}

impl Format {
    fn new(seeds: Seeds, read: impl Fn(usize, &[u8]) -> Outcome + 'static) -> Self {
        Self { seeds, read: Box::new(read) }
    }
}

/// An error as the program would print it.
fn line(error: impl Display) -> String {
    error.to_string()
}

/// Makes a format ready in a folder of its own.
type Make = fn(&Path) -> Format;

/// All of them; the slowest first, so that none is left alone at the end.
const FORMATS: &[(&str, Make)] = &[
    ("cells.csv", results::rows),
    ("run.json", results::run_info),
    ("paper.csv", results::paper),
    ("gguf", models::gguf),
    ("safetensors", models::weights),
    ("config.json", models::config),
    ("index.json", models::index),
    ("chat", tokenizers::chat),
    ("tokenizer.json", tokenizers::tokenizer),
    ("tokenizer_config", tokenizers::tokenizer_config),
    ("basis", models::basis),
    ("cache", texts::cache),
    ("experiment", texts::experiment),
    ("models.toml", models::registry),
    ("data sets", data::data_sets),
    ("predictions", data::predictions),
    ("jsonl", data::json_lines),
    ("json", data::json),
    ("csv", data::csv),
    ("zip", data::zip),
    ("parquet", data::parquet),
    ("python json", texts::json),
    ("store", results::store),
    ("samples", results::samples),
];

/// A setting that is a whole number.
fn setting(name: &str, value: Option<String>, default: u64, least: u64) -> Result<u64, String> {
    let Some(text) = value else { return Ok(default) };
    let wrong = || format!("{name}: expected a whole number from {least}, found `{text}`");
    text.parse().ok().filter(|number| *number >= least).ok_or_else(wrong)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[test]
fn damaged_files_do_no_harm() {
    let count = setting(process::COUNT, variable(process::COUNT), 2000, 1).unwrap();
    let first = setting(process::SEED, variable(process::SEED), 0, 0).unwrap();
    let only = variable(process::FORMAT);
    let chosen: Vec<_> =
        FORMATS.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)).collect();
    if chosen.is_empty() {
        let names: Vec<_> = FORMATS.iter().map(|(name, _)| *name).collect();
        panic!("{}: {} is none of {}", process::FORMAT, only.unwrap_or_default(), names.join(", "));
    }
    if let (Some(job), [(name, make)]) = (Job::given(), chosen.as_slice()) {
        return job.work(name, make, first, count);
    }
    let queue = Mutex::new(chosen.iter());
    let tallies = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((name, _)) = { queue.lock().unwrap().next() } {
                    let tally = process::supervise(name, first, count);
                    tallies.lock().unwrap().push((*name, tally));
                }
            });
        }
    });
    let mut tallies = tallies.into_inner().unwrap();
    tallies.sort_by_key(|(name, _)| FORMATS.iter().position(|(known, _)| known == name));
    println!("{}", table(&tallies));
    let findings: Vec<String> = tallies.iter().flat_map(|(name, tally)| tally.described(name)).collect();
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

fn table(tallies: &[(&str, Tally)]) -> String {
    let mut text = String::from(
        "| format | tried | accepted | refused | panics, other findings | slowest, ms | input | peak, MiB | input | seconds |\n\
         | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |\n",
    );
    for (name, t) in tallies {
        let (ms, mib) = (t.slowest.0 * 1e3, t.largest.0 as f64 / f64::from(1 << 20));
        let panics = t.findings.iter().filter(|(_, what)| what.starts_with("panics")).count();
        let others = t.findings.len() - panics;
        let (tried, accepted, refused) = (t.accepted + t.refused, t.accepted, t.refused);
        let (slow, large, seconds) = (t.slowest.1, t.largest.1, t.seconds);
        writeln!(
            text,
            "| {name} | {tried} | {accepted} | {refused} | {panics}, {others} | {ms:.1} | {slow} | {mib:.1} | {large} | {seconds:.0} |"
        )
        .unwrap();
    }
    text
}

#[test]
fn a_number_gives_the_same_input() {
    let files = vec![b"{\"a\": [1, 2.5, \"x\"], \"b\": null}".to_vec(), b"[]".to_vec()];
    let seeds = Seeds { shape: mutate::Shape::Text, files, words: &["\"b\":"] };
    let inputs = || (0..200).map(|index| mutate::input("json", &seeds, index)).collect::<Vec<_>>();
    assert_eq!(inputs(), inputs());
    assert_ne!(mutate::input("json", &seeds, 7), mutate::input("csv", &seeds, 7));
}

#[test]
fn settings_are_whole_numbers() {
    assert_eq!(setting("N", None, 2000, 1), Ok(2000));
    assert_eq!(setting("N", Some("5".into()), 2000, 1), Ok(5));
    for text in ["0", "-1", "many", "1e3", "99999999999999999999"] {
        let wrong = format!("N: expected a whole number from 1, found `{text}`");
        assert_eq!(setting("N", Some(text.into()), 2000, 1), Err(wrong));
    }
}
