//! Shares: cells by what they go by, for runs that divide an experiment among themselves.

use std::collections::HashSet;

use minicache_config::{Cell, Experiment};

use super::RunError;
use crate::store::{FailedCell, Worker, digest};

/// Some of the cells of some experiments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share(HashSet<String>);

impl Share {
    /// The cells with these [`slot`]s.
    pub fn of(slots: impl IntoIterator<Item = String>) -> Self {
        Self(slots.into_iter().collect())
    }

    /// Whether the cell with this [`slot`] is in it.
    pub fn has(&self, slot: &str) -> bool {
        self.0.contains(slot)
    }
}

/// What a cell goes by in shares, whether or not its model is there: a hash of the experiment and of everything that the
/// experiment says of it. Its key, which stands for the contents of model and data too, is known only where these are.
pub fn slot(experiment: &Experiment, cell: &Cell) -> String {
    let Cell { model, settings, task, variant, cache, swept } = cell;
    digest(&(&experiment.id, model, settings, task, variant, cache, swept))
}

/// A cell in words: model, task, variant and swept values.
pub fn describe(cell: &Cell) -> String {
    let mut parts = vec![cell.model.clone(), cell.task.clone(), cell.variant.clone()];
    parts.extend(cell.swept.iter().map(|(key, value)| format!("{key}={value}")));
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

/// The mark of a cell that failed; `key` is empty where it has none.
pub(super) fn failed(experiment: &Experiment, cell: &Cell, key: &str, error: &RunError) -> FailedCell {
    let error = error.to_string();
    FailedCell {
        slot: slot(experiment, cell),
        key: key.to_string(),
        cell: describe(cell),
        error: error.lines().next().unwrap_or_default().to_string(),
        ..Worker::signature()
    }
}
