//! Errors that name the file, and the row where there is one.

use std::path::{Path, PathBuf};

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// A file or folder could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: `read`, `write`, `list`.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A CSV file is not what it should be.
    #[error("{}: line {line}: {message}", path.display())]
    Csv {
        /// The file.
        path: PathBuf,
        /// 1-based line of the file.
        line: u64,
        /// What is wrong with it.
        message: String,
    },
    /// `run.json` is not what it should be.
    #[error(transparent)]
    Run(#[from] minicache_config::ConfigError),
    /// The folder holds no results.
    #[error("{}: no results here; expected `cells.csv` or `run.json` in it or in its folders", .0.display())]
    NoResults(PathBuf),
    /// A figure could not be drawn.
    #[error("figure `{name}` cannot be drawn: {message}")]
    Draw {
        /// The figure's name.
        name: String,
        /// The reason.
        message: String,
    },
}

/// Result with [`PlotError`].
pub type Result<T> = std::result::Result<T, PlotError>;

/// For `map_err` on file operations: what was done to which file.
pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> PlotError {
    let path = path.to_path_buf();
    move |source| PlotError::Io { path, action, source }
}
