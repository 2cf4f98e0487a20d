//! A task or a group of tasks under one name: documents, scores and aggregates.

use indexmap::IndexMap;
use serde::Serialize;

use super::{Document, Output, Reference, Scale, ScoreError, Tally, Task, all, longbench};
use crate::data::{DataError, DataSource, Loaded, Origin, Result, hex_digest};
use crate::metrics::{Interval, bootstrap_mean, bootstrap_mean_of_means};

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
    /// The same for every task, by its name.
    pub places: Vec<(&'static str, Origin)>,
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

impl Documents {
    /// Where the data came from, as results show it: one place, or for a group each place with its tasks.
    pub fn label(&self) -> String {
        let mut by_place: IndexMap<String, Vec<&str>> = IndexMap::new();
        for (task, origin) in &self.places {
            let place = match origin {
                // Its tasks have a file each.
                Origin::Files(_) => "files".to_string(),
                other => other.label(),
            };
            by_place.entry(place).or_default().push(task);
        }
        match self.places.as_slice() {
            [(_, only)] => only.label(),
            _ if by_place.len() == 1 && self.origin == Origin::Sample => self.origin.label(),
            _ => {
                let part =
                    |(place, tasks): (&String, &Vec<&str>)| format!("{place} for {}", tasks.join(", "));
                by_place.iter().map(part).collect::<Vec<_>>().join("; ")
            }
        }
    }
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
        let mut places = Vec::new();
        let mut first = None;
        for task in &self.tasks {
            let Loaded { origin, fingerprint, note, parts } =
                source.load(&task.dataset(), &task.needs(limit))?;
            let (records, shots) = task.arrange(parts);
            for record in records.iter().take(limit.unwrap_or(usize::MAX)) {
                docs.push(task.document(record, &shots)?);
            }
            fingerprints.push(fingerprint);
            places.push((task.name(), origin.clone()));
            first.get_or_insert((origin, note));
        }
        let (origin, note) = first.unwrap_or((Origin::Sample, None));
        Ok(Documents { origin, places, fingerprint: together(&fingerprints), note, docs })
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

    /// The one number for a figure: the first metric of a task. Of a group whose tasks are scored on one scale by
    /// metrics of one name it is the mean of theirs over tasks (LongBench's average), of another group its first
    /// task's. `None` without any sample of it.
    pub fn main_score(&self, samples: &[&IndexMap<String, Tally>], seed: u64) -> Option<Aggregate> {
        let of_task = |column: &String| samples.iter().filter_map(|s| s.get(column).copied()).collect();
        self.mean_over_tasks(of_task, seed)
    }

    /// [`Suite::main_score`] of `samples` less that of `others`, which are answers to the same documents in the same
    /// order. The interval is that of the paired bootstrap: documents are drawn with both answers. `None` where the
    /// documents are not the same, or without any.
    pub fn difference(
        &self,
        samples: &[&IndexMap<String, Tally>],
        others: &[&IndexMap<String, Tally>],
        seed: u64,
    ) -> Option<Aggregate> {
        let of_task = |column: &String| -> Vec<Tally> {
            let pairs = samples.iter().zip(others).filter_map(|(a, b)| a.get(column).zip(b.get(column)));
            pairs
                .filter(|(a, b)| a.count == b.count)
                .map(|(a, b)| Tally { sum: a.sum - b.sum, count: a.count })
                .collect()
        };
        let all = self.main_score(samples, seed)?.samples;
        self.mean_over_tasks(of_task, seed).filter(|d| samples.len() == others.len() && d.samples == all)
    }

    /// The mean over tasks of the means over `tallies` of their main columns (see [`Suite::main_score`]).
    fn mean_over_tasks(&self, tallies: impl Fn(&String) -> Vec<Tally>, seed: u64) -> Option<Aggregate> {
        let first = |task: &dyn Task| task.metrics().first().copied().unwrap_or_default();
        let main = *self.tasks.first()?;
        let all = self.tasks.iter().all(|t| first(*t) == first(main) && t.scale() == main.scale());
        let tasks = if all { &self.tasks[..] } else { &self.tasks[..1] };
        let mut parts = Vec::new();
        let mut pairs: Vec<Vec<(f64, f64)>> = Vec::new();
        for task in tasks {
            let tallies = tallies(&self.column(*task, first(*task)));
            parts.push(Aggregate::new(&tallies, task.scale(), seed)?);
            pairs.push(tallies.iter().map(|t| (t.sum, t.count)).collect());
        }
        let groups: Vec<&[(f64, f64)]> = pairs.iter().map(Vec::as_slice).collect();
        let scale = main.scale();
        let scaled = |value: f64| scale.apply(Tally::one(value));
        let interval = bootstrap_mean_of_means(&groups, seed);
        Some(Aggregate {
            value: parts.iter().map(|a| a.value).sum::<f64>() / parts.len() as f64,
            interval: interval.map(|i| Interval { low: scaled(i.low), high: scaled(i.high) }),
            samples: parts.iter().map(|a| a.samples).sum(),
            scale,
        })
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_of_pairs() {
        let suite = Suite::find("gsm8k").unwrap();
        let column = suite.metrics()[0].clone();
        let of = |right: &[bool]| -> Vec<IndexMap<String, Tally>> {
            let tally = |r: &bool| Tally::one(f64::from(u8::from(*r)));
            right.iter().map(|r| IndexMap::from([(column.clone(), tally(r))])).collect()
        };
        let right: Vec<bool> = (0..200).map(|i| i % 2 == 0).collect();
        // One in ten of what was right is wrong now.
        let less: Vec<bool> = (0..200).map(|i| i % 2 == 0 && i % 20 != 0).collect();
        let (full, ours) = (of(&right), of(&less));
        let [full, ours]: [Vec<_>; 2] = [&full, &ours].map(|s| s.iter().collect());
        let difference = suite.difference(&ours, &full, 1).unwrap();
        assert!((difference.value + 0.05).abs() < 1e-12 && difference.samples == 200, "{difference:?}");
        let Interval { low, high } = difference.interval.unwrap();
        // 1.96 sqrt(0.05 * 0.95 / 200) = 0.030; the scores' own intervals are 0.069 wide each way.
        assert!((low + 0.08).abs() < 0.01 && (high + 0.02).abs() < 0.01, "{low} {high}");
        assert_eq!(suite.difference(&ours, &full[1..], 1), None);
        assert_eq!(suite.difference(&ours, &[], 1), None);
    }
}
