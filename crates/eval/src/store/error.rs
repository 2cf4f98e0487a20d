//! What can go wrong with results on disk.

use std::path::{Path, PathBuf};

/// What can go wrong with results on disk.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written; what was finished before is intact.
    #[error(
        "cannot write {}: {source}; finished cells are kept, so run the same command again once that is mended",
        path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A results file that is not one.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the mend.
        message: String,
    },
    /// A file where a results folder should be.
    #[error("{}: is a file; name a folder for results", .0.display())]
    NotAFolder(PathBuf),
    /// Another process is at work in the results folder.
    #[error(
        "{}: another process is at work there: {holder}; wait until it ends, or give another folder with --results",
        folder.display()
    )]
    Held {
        /// The results folder.
        folder: PathBuf,
        /// Which process.
        holder: String,
    },
}

pub(super) type Result<T> = std::result::Result<T, StoreError>;

pub(super) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Read { path: path.to_path_buf(), source }
}

pub(super) fn writing(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Write { path: path.to_path_buf(), source }
}
