//! What can stop a run.

use minicache_config::ConfigError;

use crate::data::DataError;
use crate::store::StoreError;

/// What can stop a run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The experiment is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The experiment asks for something that its model or data cannot give.
    #[error("{0}")]
    Asked(String),
    /// A data set is missing or broken.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Results cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// From the model.
    #[error(transparent)]
    Model(#[from] minicache_models::Error),
    /// From a cache.
    #[error(transparent)]
    Cache(#[from] minicache_core::Error),
    /// From candle.
    #[error("tensor operation: {0}")]
    Candle(#[from] candle_core::Error),
    /// Another run could not compute a cell.
    #[error("{0}")]
    Elsewhere(String),
    /// A signal asked for a stop; what was finished is written.
    #[error("stopped by signal {signal}; what is finished is kept")]
    Interrupted {
        /// The signal's number.
        signal: i32,
    },
    /// Any of them, with the cell in which it happened.
    #[error("{cell}: {source}")]
    Cell {
        /// Model, task and cache.
        cell: String,
        /// What happened.
        source: Box<RunError>,
    },
}

/// Result with [`RunError`].
pub type Result<T> = std::result::Result<T, RunError>;

impl RunError {
    /// Whether no other cell could be finished either: it lies with the results folder, or a stop was asked for.
    pub(crate) fn ends_run(&self) -> bool {
        match self {
            RunError::Store(error) => !matches!(error, StoreError::Lost(_)),
            RunError::Interrupted { .. } => true,
            RunError::Cell { source, .. } => source.ends_run(),
            _ => false,
        }
    }

    /// Whether another run has taken the cell over.
    pub(crate) fn is_lost(&self) -> bool {
        match self {
            RunError::Store(StoreError::Lost(_)) => true,
            RunError::Cell { source, .. } => source.is_lost(),
            _ => false,
        }
    }

    /// Whether it lies with what all cells of a task have in common, so that each alone would meet it too.
    pub(crate) fn is_of_all(&self) -> bool {
        matches!(self, RunError::Asked(_) | RunError::Config(_) | RunError::Data(_))
    }

    /// Names the cell in which the error happened. A stop is of no cell.
    #[must_use]
    pub fn in_cell(self, cell: impl Into<String>) -> Self {
        match self {
            RunError::Interrupted { .. } => self,
            _ => RunError::Cell { cell: cell.into(), source: Box::new(self) },
        }
    }

    /// The signal that asked for a stop, where that is what happened.
    pub fn interrupted(&self) -> Option<i32> {
        match self {
            RunError::Interrupted { signal } => Some(*signal),
            _ => None,
        }
    }
}
