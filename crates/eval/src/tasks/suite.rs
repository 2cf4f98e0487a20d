//! A task or a group of tasks under one name: documents, scores and aggregates.

use indexmap::IndexMap;
use serde::Serialize;

use super::{Document, Output, Reference, Scale, ScoreError, Tally, Task, all, longbench};
use crate::data::{DataError, DataSource, Loaded, Origin, Result, hex_digest};
use crate::metrics::{Interval, bootstrap_mean};

/// What a task name of an experiment stands for.
#[derive(Clone)]
pub struct Suite {
    /// The name.
    pub name: String,
    /// One task, or the members of a group.
    pub tasks: Vec<&'static dyn Task>,
}

/// Documents, with the place they came from.
#[derive(Debug, Clone)]
pub struct Documents {
    /// Where the data came from (of the first task, for a group).
    pub origin: Origin,
    /// SHA-256 of the data, in hexadecimal.
    pub fingerprint: String,
    /// Why a better place was passed over.
    pub note: Option<String>,
    /// The documents, task by task.
    pub docs: Vec<Document>,
}

/// One metric over all samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Aggregate {
    /// The mean, on the scale the field prints but not rounded.
    pub value: f64,
    /// 95 % confidence interval by the bootstrap over samples.
    pub interval: Option<Interval>,
    /// Samples that have this metric.
    pub samples: usize,
    /// How the field prints it.
    pub scale: Scale,
}

impl Suite {
    /// The task `name`, or the group: `truthfulqa` (generation, mc1, mc2), `longbench` (the seven of the paper) or
    /// `longbench/all` (21). A LongBench task is also known without `longbench/`, or with the harness's `longbench_`.
    ///
    /// # Errors
    /// A name that is neither a task nor a group.
    pub fn find(name: &str) -> Result<Self> {
        let group = groups().into_iter().find(|(group, _)| *group == name).map(|(_, members)| members);
        let members = group.unwrap_or_else(|| {
            let full = format!("longbench/{}", name.strip_prefix("longbench_").unwrap_or(name));
            vec![if all().any(|t| t.name() == full) { full } else { name.to_string() }]
        });
        let name = if let [member] = members.as_slice() { member } else { name };
        let task = |member: &String| all().find(|t| t.name() == member).ok_or_else(|| unknown(name));
        Ok(Self { name: name.to_string(), tasks: members.iter().map(task).collect::<Result<_>>()? })
    }

    /// The first `limit` documents of each task.
    ///
    /// # Errors
    /// Data that is not there or not in its format.
    pub fn documents(&self, source: &DataSource, limit: Option<usize>) -> Result<Documents> {
        let mut docs = Vec::new();
        let mut fingerprints = Vec::new();
        let mut place = None;
        for task in &self.tasks {
            let Loaded { origin, fingerprint, note, parts } = source.load(&task.dataset())?;
            let (records, shots) = task.arrange(parts);
            for record in records.iter().take(limit.unwrap_or(usize::MAX)) {
                docs.push(task.document(record, &shots)?);
            }
            fingerprints.push(fingerprint);
            place.get_or_insert((origin, note));
        }
        let (origin, note) = place.unwrap_or((Origin::Sample, None));
        Ok(Documents { origin, fingerprint: together(&fingerprints), note, docs })
    }

    /// Every metric, named as in [`Suite::aggregate`].
    pub fn metrics(&self) -> Vec<String> {
        self.tasks.iter().flat_map(|t| t.metrics().iter().map(|m| self.column(*t, m))).collect()
    }

    /// Scores one output of `document`.
    ///
    /// # Errors
    /// A document of another suite, or an output that does not answer the request.
    pub fn score(
        &self,
        document: &Document,
        output: &Output,
    ) -> std::result::Result<IndexMap<String, Tally>, ScoreError> {
        let task = self.tasks.iter().find(|t| t.name() == document.task).ok_or_else(|| ScoreError {
            expected: format!("a document of {}", self.name),
            found: format!("one of {}", document.task),
        })?;
        self.score_as(*task, &document.reference, output)
    }

    /// Scores one output of a document of `task` by its reference.
    pub(crate) fn score_as(
        &self,
        task: &dyn Task,
        reference: &Reference,
        output: &Output,
    ) -> std::result::Result<IndexMap<String, Tally>, ScoreError> {
        let scores = task.score(reference, output)?;
        Ok(scores.into_iter().map(|(metric, tally)| (self.column(task, metric), tally)).collect())
    }

    /// Means over samples with confidence intervals, in the order of [`Suite::metrics`]; a metric without any sample is
    /// left out.
    pub fn aggregate<'a>(
        &self,
        samples: impl IntoIterator<Item = &'a IndexMap<String, Tally>>,
        seed: u64,
    ) -> IndexMap<String, Aggregate> {
        let samples: Vec<_> = samples.into_iter().collect();
        let mut aggregates = IndexMap::new();
        for task in &self.tasks {
            for metric in task.metrics() {
                let column = self.column(*task, metric);
                let tallies: Vec<Tally> = samples.iter().filter_map(|s| s.get(&column).copied()).collect();
                if let Some(aggregate) = Aggregate::new(&tallies, task.scale(), seed) {
                    aggregates.insert(column, aggregate);
                }
            }
        }
        aggregates
    }

    /// The metric itself for a single task; in a group the task's last word goes before it, as in `mc1_acc`.
    fn column(&self, task: &dyn Task, metric: &str) -> String {
        if self.tasks.len() == 1 {
            return metric.to_string();
        }
        let word = task.name().rsplit_once(['/']).or_else(|| task.name().split_once('_'));
        format!("{}_{metric}", word.map_or(task.name(), |(_, last)| last))
    }
}

impl Aggregate {
    /// The mean of `tallies` and its interval; `None` without any.
    pub fn new(tallies: &[Tally], scale: Scale, seed: u64) -> Option<Self> {
        let total = tallies
            .iter()
            .fold(Tally::default(), |a, b| Tally { sum: a.sum + b.sum, count: a.count + b.count });
        if total.count == 0.0 {
            return None;
        }
        let pairs: Vec<(f64, f64)> = tallies.iter().map(|t| (t.sum, t.count)).collect();
        let scaled = |value: f64| scale.apply(Tally::one(value));
        let interval =
            bootstrap_mean(&pairs, seed).map(|i| Interval { low: scaled(i.low), high: scaled(i.high) });
        Some(Self { value: scale.apply(total), interval, samples: tallies.len(), scale })
    }

    /// The value with as many decimals as the field prints.
    pub fn printed(&self) -> f64 {
        self.scale.round(self.value)
    }
}

/// Names that stand for several tasks, with these.
pub fn groups() -> [(&'static str, Vec<String>); 3] {
    [
        ("truthfulqa", ["gen", "mc1", "mc2"].map(|t| format!("truthfulqa_{t}")).into()),
        ("longbench", longbench::PAPER.map(|t| format!("longbench/{t}")).into()),
        ("longbench/all", longbench::TASKS.iter().map(|t| Task::name(t).to_string()).collect()),
    ]
}

/// One fingerprint for several data sets.
pub(super) fn together(fingerprints: &[String]) -> String {
    match fingerprints {
        [one] => one.clone(),
        several => hex_digest(several.concat().as_bytes()),
    }
}

fn unknown(name: &str) -> DataError {
    let near: Vec<&str> = all()
        .map(|t| t.name())
        .filter(|t| t.rsplit('/').next() == Some(name) || (name.len() > 3 && t.contains(name)))
        .collect();
    let known = if near.is_empty() {
        "`minicache tasks` lists them all".to_string()
    } else {
        format!("did you mean {}?", near.join(", "))
    };
    DataError::UnknownTask { name: name.to_string(), known }
}
