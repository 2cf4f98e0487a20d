//! GSM8K (Cobbe et al. 2021), as the task `gsm8k` of lm-evaluation-harness: five shots, the first five training
//! problems.

use std::sync::LazyLock;

use regex::Regex;

use super::{
    Chat, Document, Generate, Output, Overflow, Reference, Request, ScoreError, Scores, Tally, Task,
};
use crate::data::{DataError, Dataset, HubFile, Part, Record, Result, as_is};

/// Grade-school mathematics.
pub(super) struct Gsm8k;

const SHOTS: usize = 5;
const STRICT: &str = "exact_match,strict-match";
const FLEXIBLE: &str = "exact_match,flexible-extract";
/// What the harness's filters give without a match.
const INVALID: &str = "[invalid]";
const UNTIL: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

static PARTS: [Part; 2] = [
    Part {
        name: "test problems",
        local: &["gsm8k/test.jsonl", "gsm8k/main/test-*.parquet", "gsm8k/test-*.parquet", "test.jsonl"],
        hub: &[HubFile::main("openai/gsm8k", "main/test-00000-of-00001.parquet")],
        optional: false,
        normalise: as_is,
    },
    Part {
        name: "training problems",
        local: &["gsm8k/train.jsonl", "gsm8k/main/train-*.parquet", "gsm8k/train-*.parquet", "train.jsonl"],
        hub: &[HubFile::main("openai/gsm8k", "main/train-00000-of-00001.parquet")],
        optional: false,
        normalise: as_is,
    },
];

impl Task for Gsm8k {
    fn name(&self) -> &'static str {
        "gsm8k"
    }

    fn about(&self) -> String {
        "grade-school mathematics, 5-shot, exact match (lm-evaluation-harness)".to_string()
    }

    fn note(&self) -> Option<&'static str> {
        Some("its shots are the first five training problems, where the harness draws five at random")
    }

    fn needs(&self, documents: Option<usize>) -> Vec<Option<usize>> {
        vec![documents, Some(SHOTS)]
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "gsm8k", parts: &PARTS }
    }

    fn document(&self, record: &Record, shots: &[Record]) -> Result<Document> {
        let mut prompt = String::new();
        for shot in shots.iter().take(SHOTS) {
            prompt += &(self.text(shot)? + "\n\n");
        }
        if (1..SHOTS).contains(&shots.len()) {
            let message = format!("gsm8k shows {SHOTS} training problems first, here are {}", shots.len());
            return Err(DataError::Format { place: shots[0].place.clone(), message });
        }
        prompt += &question(record)?;
        Ok(Document {
            id: record.index.to_string(),
            task: self.name(),
            request: Request::Generate(Generate {
                prompt,
                until: UNTIL.map(str::to_string).into(),
                max_new_tokens: 256,
                chat: Chat::Never,
                stop_token: None,
                overflow: Overflow::KeepEnd,
            }),
            reference: Reference::Answer(record.str("answer")?.to_string()),
        })
    }

    fn text(&self, record: &Record) -> Result<String> {
        Ok(format!("{} {}", question(record)?, record.str("answer")?))
    }

    fn metrics(&self) -> &'static [&'static str] {
        &[STRICT, FLEXIBLE]
    }

    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError> {
        let Reference::Answer(answer) = reference else { return Err(reference.unlike("one answer")) };
        let (text, answer) = (output.text()?, bare(answer));
        let equal = |extracted: String| Tally::one(f64::from(bare(&extracted) == answer));
        Ok(Scores::from([(STRICT, equal(strict(text))), (FLEXIBLE, equal(flexible(text)))]))
    }

    fn reference(&self, answers: Vec<String>, _: Vec<String>) -> Option<Reference> {
        answers.into_iter().next().map(Reference::Answer)
    }
}

/// The first number after `####`.
fn strict(text: &str) -> String {
    static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").ok());
    let found = NUMBER.as_ref().and_then(|re| re.captures(text));
    found.and_then(|c| c.get(1)).map_or(INVALID, |m| m.as_str()).to_string()
}

/// The last number of all.
fn flexible(text: &str) -> String {
    static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"-?[$0-9.,]{2,}|-?[0-9]+").ok());
    let found = NUMBER.as_ref().and_then(|re| re.find_iter(text).last());
    found.map_or(INVALID, |m| m.as_str()).to_string()
}

/// What is compared: without commas, dollar signs, the working before `#### ` and a final period; in lower case.
fn bare(answer: &str) -> String {
    let answer = answer.replace([',', '$'], "");
    let answer = answer.rsplit_once("#### ").map_or(answer.as_str(), |(_, last)| last);
    // `$` of a Python pattern also matches before a final newline.
    let without = match answer.strip_suffix('\n') {
        Some(line) => line.strip_suffix('.').map(|line| format!("{line}\n")),
        None => answer.strip_suffix('.').map(str::to_string),
    };
    without.unwrap_or_else(|| answer.to_string()).to_lowercase()
}

fn question(record: &Record) -> Result<String> {
    Ok(format!("Question: {}\nAnswer:", record.str("question")?))
}
