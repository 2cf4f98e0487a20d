//! Rescoring: files of predictions, LongBench's and lm-evaluation-harness's own, and the samples files of a run.
//!
//! A line is one of
//! * LongBench: `pred`, `answers`, and `all_classes` for classifications;
//! * a samples file of lm-evaluation-harness (`--log_samples`): `doc` and `resps` (or `filtered_resps`);
//! * a samples file of this program: `reference` and `prediction`.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use indexmap::IndexMap;
use minicache_config::{python_json, shown};
use serde::{Deserialize as _, Serialize};
use serde_json::Value;

use crate::data::{DataError, Lines, Record, Result, keys};
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
    let open = File::open(file).map_err(|source| DataError::Io { path: file.to_path_buf(), source });
    score_lines(suite, &file.display().to_string(), &mut open?)
}

/// Scores predictions in memory, for programs that try inputs.
///
/// # Errors
/// As [`score_file`].
#[doc(hidden)]
pub fn score_bytes(task: &str, bytes: &[u8]) -> Result<Scored> {
    score_lines(Suite::find(task)?, "input", &mut Cursor::new(bytes))
}

fn score_lines(suite: Suite, name: &str, reader: &mut dyn Read) -> Result<Scored> {
    let mut filter: Option<Option<Value>> = None;
    let mut samples: Vec<IndexMap<String, Tally>> = Vec::new();
    for record in Lines::new(name, reader)? {
        let record = record?;
        // The harness writes one line per document and filter, each with the whole response.
        if filter.get_or_insert_with(|| record.get("filter").cloned()).as_ref() != record.get("filter") {
            continue;
        }
        let task = task_of(&record, &suite)?;
        let (reference, output) = sample(&record, task)?;
        samples.push(suite.score_as(task, &reference, &output).map_err(|e| at(&record, &e))?);
    }
    if samples.is_empty() {
        let message = "holds no predictions".to_string();
        return Err(DataError::Format { place: name.to_string(), message });
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
    // A field that is there but null is a mistake in that field.
    let both = |field| record.has(field).then(|| record.get(field).unwrap_or(&Value::Null));
    if record.has("pred") {
        longbench_line(record, task)
    } else if let Some(doc) = both("doc") {
        let index = record.get("doc_id").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let doc = Record::new(doc.clone(), format!("{}, doc", record.place), index.unwrap_or(record.index))?;
        let reference = task.document(&doc, &[])?.reference;
        let output = harness_output(record, &reference)?;
        Ok((reference, output))
    } else if let (Some(reference), Some(prediction)) = (both("reference"), both("prediction")) {
        let wrong = |field: &str, e: &serde_json::Error| {
            record.wrong(field, format!("a {field} as `minicache run` writes it ({})", shown(&e.to_string())))
        };
        let reference = Reference::deserialize(reference).map_err(|e| wrong("reference", &e))?;
        let output = Output::deserialize(prediction).map_err(|e| wrong("prediction", &e))?;
        Ok((reference, output))
    } else {
        let expected = "`pred` and `answers` (LongBench), `doc` and `resps` (lm-evaluation-harness), or `reference` \
            and `prediction`";
        let message = format!("expected {expected}, found {}", keys(&record.fields));
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
    let field = if record.has("resps") || !record.has("filtered_resps") { "resps" } else { "filtered_resps" };
    let Some(requests) = record.get(field).and_then(Value::as_array) else {
        return Err(record.wrong(field, "a list of responses"));
    };
    if matches!(reference, Reference::Label { .. } | Reference::Labels(_)) {
        let value = |(i, request)| {
            log_likelihood(first_leaf(request))
                .ok_or_else(|| record.wrong(&leaf(field, i, request), "a log-likelihood"))
        };
        return requests.iter().enumerate().map(value).collect::<Result<_>>().map(Output::LogLikelihoods);
    }
    let Some(first) = requests.first() else { return Err(record.wrong(field, "a generated text")) };
    let text = first_leaf(first).as_str();
    let text = text.ok_or_else(|| record.wrong(&leaf(field, 0, first), "a generated text"))?;
    Ok(Output::Generated(vec![text.to_string()]))
}

fn first_leaf(mut value: &Value) -> &Value {
    while let Some(first) = value.as_array().and_then(|list| list.first()) {
        value = first;
    }
    value
}

/// The path of the first leaf of a request.
fn leaf(field: &str, index: usize, mut request: &Value) -> String {
    let mut path = format!("{field}.{index}");
    while let Some(first) = request.as_array().and_then(|list| list.first()) {
        path += ".0";
        request = first;
    }
    path
}

fn log_likelihood(value: &Value) -> Option<f64> {
    python_json::as_f64(value).or_else(|| value.as_str()?.trim().parse().ok())
}
