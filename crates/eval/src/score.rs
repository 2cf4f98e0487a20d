//! Rescoring: files of predictions, LongBench's and lm-evaluation-harness's own, and the samples files of a run.
//!
//! A line is one of
//! * LongBench: `pred`, `answers`, and `all_classes` for classifications;
//! * a samples file of lm-evaluation-harness (`--log_samples`): `doc` and `resps` (or `filtered_resps`);
//! * a samples file of this program: `reference` and `prediction`.

use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize as _, Serialize};
use serde_json::Value;

use crate::data::{DataError, Record, Result, read_jsonl};
use crate::tasks::{Output, Reference, Scale, ScoreError, Suite, Tally, Task};

/// Metrics of a predictions file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// The task.
    pub task: String,
    /// Lines scored.
    pub samples: usize,
    /// Means as the field prints them: 0..1 for the harness's tasks (BLEU and ROUGE 0..100), 0..100 with two decimals
    /// for LongBench's.
    pub metrics: IndexMap<String, f64>,
    /// How many decimals they are printed with.
    #[serde(skip)]
    pub scale: Scale,
}

/// Scores the predictions in `file`.
///
/// # Errors
/// An unknown task; a file that cannot be read, is empty, or has a line that is none of the three kinds or does not
/// fit the task: the error names file, line and field.
pub fn score_file(task: &str, file: &Path) -> Result<Scored> {
    let suite = Suite::find(task)?;
    let records = read_jsonl(file)?;
    if records.is_empty() {
        let message = "holds no predictions".to_string();
        return Err(DataError::Format { place: file.display().to_string(), message });
    }
    let filter = records[0].get("filter").cloned();
    let mut samples: Vec<IndexMap<String, Tally>> = Vec::new();
    for record in &records {
        // The harness writes one line per document and filter, each with the whole response.
        if record.get("filter") != filter.as_ref() {
            continue;
        }
        let task = task_of(record, &suite)?;
        let (reference, output) = sample(record, task)?;
        samples.push(suite.score_as(task, &reference, &output).map_err(|e| at(record, &e))?);
    }
    let metrics = suite.aggregate(&samples, 0).into_iter().map(|(name, a)| (name, a.printed())).collect();
    let scale = suite.tasks[0].scale();
    Ok(Scored { task: suite.name, samples: samples.len(), metrics, scale })
}

fn at(record: &Record, error: &ScoreError) -> DataError {
    DataError::Format { place: record.place.clone(), message: error.to_string() }
}

/// The suite's task; of a group the one that the line names.
fn task_of(record: &Record, suite: &Suite) -> Result<&'static dyn Task> {
    if let [only] = suite.tasks.as_slice() {
        return Ok(*only);
    }
    let named = record.get("task").and_then(Value::as_str);
    suite.tasks.iter().copied().find(|t| Some(t.name()) == named).ok_or_else(|| {
        let names: Vec<&str> = suite.tasks.iter().map(|t| t.name()).collect();
        record.wrong("task", format!("{} is a group: one of {}", suite.name, names.join(", ")))
    })
}

fn sample(record: &Record, task: &dyn Task) -> Result<(Reference, Output)> {
    if record.get("pred").is_some() {
        longbench_line(record, task)
    } else if let Some(doc) = record.get("doc") {
        let index = record.get("doc_id").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let doc = Record::new(doc.clone(), format!("{}, doc", record.place), index.unwrap_or(record.index))?;
        let reference = task.document(&doc, &[])?.reference;
        let output = harness_output(record, &reference)?;
        Ok((reference, output))
    } else if let (Some(reference), Some(prediction)) = (record.get("reference"), record.get("prediction")) {
        let reference =
            Reference::deserialize(reference).map_err(|_| record.wrong("reference", "a reference"))?;
        let output =
            Output::deserialize(prediction).map_err(|_| record.wrong("prediction", "a prediction"))?;
        Ok((reference, output))
    } else {
        let expected = "`pred` and `answers` (LongBench), `doc` and `resps` (lm-evaluation-harness), or `reference` \
            and `prediction`";
        let found: Vec<&str> = record.fields.keys().map(String::as_str).take(8).collect();
        let message = format!("expected {expected}, found {}", found.join(", "));
        Err(DataError::Format { place: record.place.clone(), message })
    }
}

fn longbench_line(record: &Record, task: &dyn Task) -> Result<(Reference, Output)> {
    let answers = record.strs("answers")?;
    let classes = if record.get("all_classes").is_some() { record.strs("all_classes")? } else { Vec::new() };
    let reference = task.reference(answers, classes).ok_or_else(|| DataError::Format {
        place: record.place.clone(),
        message: format!(
            "`pred` and `answers` are not enough for {}, which needs `doc` and `resps`",
            task.name()
        ),
    })?;
    Ok((reference, Output::Generated(vec![record.str("pred")?.to_string()])))
}

/// The response in a samples file of the harness: lists of lists, one per request and repeat, of texts or of pairs of
/// log-likelihood and "is greedy", each written as a string.
fn harness_output(record: &Record, reference: &Reference) -> Result<Output> {
    let field = if record.get("resps").is_some() { "resps" } else { "filtered_resps" };
    let Some(requests) = record.get(field).and_then(Value::as_array) else {
        return Err(record.wrong("resps", "a list of responses"));
    };
    if matches!(reference, Reference::Label { .. } | Reference::Labels(_)) {
        let values: Option<Vec<f64>> = requests.iter().map(|r| log_likelihood(first_leaf(r))).collect();
        return values
            .map(Output::LogLikelihoods)
            .ok_or_else(|| record.wrong(field, "a log-likelihood per choice"));
    }
    let text = requests.first().map(first_leaf).and_then(Value::as_str);
    let text = text.ok_or_else(|| record.wrong(field, "a generated text"))?;
    Ok(Output::Generated(vec![text.to_string()]))
}

fn first_leaf(mut value: &Value) -> &Value {
    while let Some(first) = value.as_array().and_then(|list| list.first()) {
        value = first;
    }
    value
}

fn log_likelihood(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
}
