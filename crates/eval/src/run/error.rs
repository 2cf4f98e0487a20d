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
    /// Whether it lies with the results folder, so that no other cell could be finished either.
    pub(crate) fn is_of_results(&self) -> bool {
        match self {
            RunError::Store(_) => true,
            RunError::Cell { source, .. } => source.is_of_results(),
            _ => false,
        }
    }

    /// Names the cell in which the error happened.
    #[must_use]
    pub fn in_cell(self, cell: impl Into<String>) -> Self {
        RunError::Cell { cell: cell.into(), source: Box::new(self) }
    }
}
