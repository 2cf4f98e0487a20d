//! From the original files to the hub's field layout.

use serde_json::{Map, Value, json};

use super::error::Result;
use super::record::Record;

/// `coqa-dev-v1.0.json`: turns are lists of objects there and objects of lists on the hub.
pub(crate) fn coqa_layout(records: Vec<Record>) -> Result<Vec<Record>> {
    records.into_iter().map(coqa_story).collect()
}

fn coqa_story(mut record: Record) -> Result<Record> {
    if record.get("questions.input_text").is_none() && record.get("answers").is_some_and(Value::is_array) {
        let questions = turn_texts(&record, "questions")?;
        let answers = turn_texts(&record, "answers")?;
        let mut more = Map::new();
        if let Some(sets) = record.get("additional_answers").and_then(Value::as_object) {
            for key in sets.keys() {
                let texts = turn_texts(&record, &format!("additional_answers.{key}"))?;
                more.insert(key.clone(), json!({ "input_text": texts }));
            }
        }
        record.fields.insert("questions".into(), json!({ "input_text": questions }));
        record.fields.insert("answers".into(), json!({ "input_text": answers }));
        record.fields.insert("additional_answers".into(), Value::Object(more));
    } else if let Some(list) = record.get("questions").filter(|q| q.is_array()).cloned() {
        // stanfordnlp/coqa: questions are a plain list.
        record.fields.insert("questions".into(), json!({ "input_text": list }));
    }
    Ok(record)
}

fn turn_texts(record: &Record, path: &str) -> Result<Vec<String>> {
    let turns = record.get(path).and_then(Value::as_array);
    let texts = turns.and_then(|turns| {
        turns.iter().map(|t| t.get("input_text").and_then(Value::as_str).map(str::to_string)).collect()
    });
    texts.ok_or_else(|| record.wrong(path, "a list of turns with `input_text`"))
}

/// `TruthfulQA.csv`: answers are one string with semicolons there and lists on the hub.
pub(crate) fn truthfulqa_gen_layout(records: Vec<Record>) -> Result<Vec<Record>> {
    records.into_iter().map(truthfulqa_row).collect()
}

fn truthfulqa_row(mut record: Record) -> Result<Record> {
    if record.get("question").is_some() {
        return Ok(record);
    }
    let list = |text: &str| text.trim().split(';').map(|a| a.trim().to_string()).collect::<Vec<_>>();
    let fields = json!({
        "question": record.str("Question")?.trim(),
        "best_answer": record.str("Best Answer")?.trim(),
        "correct_answers": list(record.str("Correct Answers")?),
        "incorrect_answers": list(record.str("Incorrect Answers")?),
    });
    if let Value::Object(fields) = fields {
        record.fields = fields;
    }
    Ok(record)
}

/// `mc_task.json`: targets are an object from choice to 0 or 1 there, and two lists on the hub.
pub(crate) fn truthfulqa_mc_layout(records: Vec<Record>) -> Result<Vec<Record>> {
    records.into_iter().map(truthfulqa_mc).collect()
}

fn truthfulqa_mc(mut record: Record) -> Result<Record> {
    for field in ["mc1_targets", "mc2_targets"] {
        let Some(targets) = record.get(field).and_then(Value::as_object) else {
            return Err(record.wrong(field, "an object of choices"));
        };
        if targets.get("choices").is_some_and(Value::is_array) {
            continue;
        }
        if let Some((choice, _)) = targets.iter().find(|(_, v)| !matches!(v.as_i64(), Some(0 | 1))) {
            return Err(record.wrong(&format!("{field}.{choice}"), "0 or 1"));
        }
        let (choices, labels): (Vec<_>, Vec<_>) = targets.iter().map(|(k, v)| (k.clone(), v.clone())).unzip();
        record.fields.insert(field.to_string(), json!({ "choices": choices, "labels": labels }));
    }
    Ok(record)
}
