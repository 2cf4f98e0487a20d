//! What can be wrong with a data set or a predictions file, said in one line.

use std::path::PathBuf;

/// Result with [`DataError`].
pub type Result<T> = std::result::Result<T, DataError>;

/// A data file that is missing, unreadable or not what its format says. All of these are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file that cannot be opened or read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not in its format at all.
    #[error("{place}: {message}")]
    Format {
        /// File, with line or row where known.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// A field that is absent or of another type.
    #[error("{place}, field `{field}`: expected {expected}, found {found}")]
    Field {
        /// File and line (or row).
        place: String,
        /// The field, dotted where nested.
        field: String,
        /// What the format says.
        expected: String,
        /// What stands there, shortened.
        found: String,
    },
    /// No file, no hub, no sample.
    #[error("{dataset}: no data found{tried}; give --data DIR (or MINICACHE_DATA) with {wanted}")]
    Missing {
        /// Data set or task.
        dataset: String,
        /// What was looked at, as a parenthesis; may be empty.
        tried: String,
        /// The file names that would do.
        wanted: String,
    },
    /// A task name that nobody knows.
    #[error("no task `{name}`; {known}")]
    UnknownTask {
        /// The name as given.
        name: String,
        /// Near names, or how to list all.
        known: String,
    },
}
