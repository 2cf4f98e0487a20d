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
    /// A file system that runs cannot share.
    #[error(
        "{}: hard links cannot be made there, by which runs share a folder; give one on another file system with --results",
        .0.display()
    )]
    NoLinks(PathBuf),
    /// Others have taken this process for gone.
    #[error(
        "{}: this process did not beat for so long that others took it for gone; run the same command again",
        .0.display()
    )]
    Forgotten(PathBuf),
    /// Another process has taken a cell over.
    #[error("{}: another process has taken this over", .0.display())]
    Lost(PathBuf),
    /// The environment names no time.
    #[error("{}: `{asked}` is no number of seconds from 0.1 to 86400", super::LIMIT)]
    Limit {
        /// What it says.
        asked: String,
    },
}

pub(super) type Result<T> = std::result::Result<T, StoreError>;

pub(super) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Read { path: path.to_path_buf(), source }
}

pub(super) fn writing(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Write { path: path.to_path_buf(), source }
}
