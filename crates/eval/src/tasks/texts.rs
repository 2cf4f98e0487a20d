//! Plain text of any task's documents: for similarity, fidelity and calibration.

use super::Task;
use super::suite::{Suite, together};
use crate::data::{DataSource, Loaded, Origin, Record, Result};

/// One document as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextDoc {
    /// `TASK/NUMBER`, unique within [`Texts`].
    pub id: String,
    /// Question with answer, story with turns, or context with input.
    pub text: String,
}

impl TextDoc {
    /// The task that it is of.
    pub(crate) fn task(&self) -> &str {
        self.id.rsplit_once('/').map_or("", |(task, _)| task)
    }
}

/// Documents as text, with the place they came from.
#[derive(Debug, Clone)]
pub struct Texts {
    /// Where the data came from (of the first task, for a group).
    pub origin: Origin,
    /// SHA-256 of the data, in hexadecimal.
    pub fingerprint: String,
    /// Why a better place was passed over.
    pub note: Option<String>,
    /// The documents.
    pub docs: Vec<TextDoc>,
}

/// Documents that are read where no limit is given: more text than anything here goes through, of a file of any size.
const MOST: usize = 100_000;

/// The tasks whose documents [`texts`] gives for `task`.
///
/// # Errors
/// An unknown task.
pub fn text_suite(task: &str) -> Result<Suite> {
    Suite::find(if task == "truthfulqa" { "truthfulqa_gen" } else { task })
}

/// The first `limit` documents of `task` as text, or the first 100,000. `truthfulqa` gives every question once, with
/// its best answer;
/// `longbench` gives the paper's seven tasks in turn: the first document of each, the second of each, and so on. Of a
/// group only the tasks that the user's folder has are taken, if it has any.
///
/// # Errors
/// An unknown task, or data that is not there or not in its format.
pub fn texts(task: &str, source: &DataSource, limit: Option<usize>) -> Result<Texts> {
    let mut tasks = text_suite(task)?.tasks;
    if tasks.len() > 1 {
        let mut present = Vec::new();
        for &task in &tasks {
            if source.has_files(&task.dataset())? {
                present.push(task);
            }
        }
        if !present.is_empty() {
            tasks = present;
        }
    }
    let limit = limit.unwrap_or(MOST);
    let mut first: Option<Loaded> = None;
    let mut columns: Vec<(&dyn Task, Vec<Record>)> = Vec::new();
    let mut fingerprints = Vec::new();
    for task in tasks {
        let mut loaded = source.load(&task.dataset(), &task.needs(Some(limit)))?;
        columns.push((task, task.arrange(std::mem::take(&mut loaded.parts)).0));
        fingerprints.push(loaded.fingerprint.clone());
        first.get_or_insert(loaded);
    }
    let longest = columns.iter().map(|(_, records)| records.len()).max().unwrap_or(0);
    let rows = (0..longest).flat_map(|i| columns.iter().filter_map(move |(t, r)| Some((*t, r.get(i)?))));
    let docs = rows
        .take(limit)
        .map(|(task, record)| {
            Ok(TextDoc { id: format!("{}/{}", task.name(), record.index), text: task.text(record)? })
        })
        .collect::<Result<_>>()?;
    let (origin, note) = match first {
        Some(Loaded { origin, note, .. }) => (origin, note),
        None => (Origin::Sample, None),
    };
    let fingerprint = together(&fingerprints);
    Ok(Texts { origin, fingerprint, note, docs })
}
