//! CoQA (Reddy et al. 2019), in the form of the task `coqa` of lm-evaluation-harness.
//!
//! The harness asks the last question of every story, after the earlier ones with their reference answers. Here every
//! question is asked in that form, as in the official evaluation of CoQA: `em` and `f1` are means over all turns;
//! `em_last` and `f1_last` are the harness's numbers, over last turns alone.

use super::{Document, Output, Reference, Request, ScoreError, Scores, Tally, Task, Turns};
use crate::data::{Dataset, HubFile, Part, Record, Result, coqa_layout};
use crate::metrics::{exact_match, f1_score, leave_one_out, strip};

/// Conversational question answering.
pub(super) struct Coqa;

static PARTS: [Part; 1] = [Part {
    name: "stories",
    local: &[
        "coqa/coqa-dev-v1.0.json",
        "coqa-dev-v1.0.json",
        "coqa/data/validation-*.parquet",
        "coqa/validation-*.parquet",
        "coqa/validation.jsonl",
    ],
    // Only the first has the additional answers.
    hub: &[
        HubFile::converted("EleutherAI/coqa", "default/validation/0000.parquet"),
        HubFile::main("stanfordnlp/coqa", "data/validation-00000-of-00001.parquet"),
    ],
    optional: false,
    normalise: coqa_layout,
}];

impl Task for Coqa {
    fn name(&self) -> &'static str {
        "coqa"
    }

    fn about(&self) -> String {
        "questions about a story with the conversation so far, all turns, exact match and F1 (lm-evaluation-harness)"
            .to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "coqa", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let (questions, answers) = turns(record)?;
        let mut prompts = Vec::new();
        let mut history = format!("{}\n\n", record.str("story")?);
        for (question, answer) in questions.iter().zip(&answers) {
            history += &format!("Q: {question}\n\nA:");
            prompts.push(history.clone());
            history += &format!(" {answer}\n\n");
        }
        Ok(Document {
            id: record.str("id").map_or_else(|_| record.index.to_string(), str::to_string),
            task: self.name(),
            request: Request::Turns(Turns { prompts, until: vec!["\nQ:".to_string()], max_new_tokens: 256 }),
            reference: Reference::TurnAnswers(references(record, answers)?),
        })
    }

    fn text(&self, record: &Record) -> Result<String> {
        let (questions, answers) = turns(record)?;
        let turns: String =
            questions.iter().zip(&answers).map(|(q, a)| format!("\n\nQ: {q}\n\nA: {a}")).collect();
        Ok(record.str("story")?.to_string() + &turns)
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["em", "f1", "em_last", "f1_last"]
    }

    /// With a single output for several turns (as in the harness's samples) that is the answer to the last one.
    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError> {
        let Reference::TurnAnswers(golds) = reference else {
            return Err(reference.unlike("answers by turn"));
        };
        let texts = match output {
            Output::Generated(texts) if texts.len() == golds.len() || texts.len() == 1 => texts,
            other => return Err(other.unlike(&format!("{} generated texts", golds.len()))),
        };
        let golds = &golds[golds.len() - texts.len()..];
        let scores = |score: fn(&str, &str) -> f64| -> Vec<f64> {
            let answer = |text: &'_ String| strip(text).split('\n').next().unwrap_or_default().to_string();
            golds.iter().zip(texts).map(|(golds, text)| leave_one_out(golds, &answer(text), score)).collect()
        };
        let (em, f1) = (scores(exact_match), scores(f1_score));
        let last = |scores: &[f64]| Tally::of(&scores[scores.len() - 1..]);
        Ok(Scores::from([
            ("em", Tally::of(&em)),
            ("f1", Tally::of(&f1)),
            ("em_last", last(&em)),
            ("f1_last", last(&f1)),
        ]))
    }

    fn reference(&self, answers: Vec<String>, _: Vec<String>) -> Option<Reference> {
        Some(Reference::TurnAnswers(vec![answers]))
    }
}

fn turns(record: &Record) -> Result<(Vec<String>, Vec<String>)> {
    let questions = record.strs("questions.input_text")?;
    let answers = record.strs("answers.input_text")?;
    if questions.is_empty() {
        return Err(record.wrong("questions.input_text", "at least one question"));
    }
    if questions.len() != answers.len() {
        let expected = format!("as many answers as questions ({})", questions.len());
        return Err(record.wrong("answers.input_text", expected));
    }
    Ok((questions, answers))
}

/// For every turn the answer and the additional ones that differ from those before in more than case.
fn references(record: &Record, answers: Vec<String>) -> Result<Vec<Vec<String>>> {
    let count = answers.len();
    let mut references: Vec<Vec<String>> = answers.into_iter().map(|a| vec![a]).collect();
    let sets = record.get("additional_answers").and_then(serde_json::Value::as_object);
    for key in sets.into_iter().flat_map(|sets| sets.keys()) {
        let path = format!("additional_answers.{key}.input_text");
        let more = record.strs(&path)?;
        if more.len() != count {
            return Err(record.wrong(&path, format!("as many answers as questions ({count})")));
        }
        for (known, answer) in references.iter_mut().zip(more) {
            if known.iter().all(|k| k.to_lowercase() != answer.to_lowercase()) {
                known.push(answer);
            }
        }
    }
    Ok(references)
}
