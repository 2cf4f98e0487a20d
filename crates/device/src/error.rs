//! What can go wrong with a device.

use std::path::PathBuf;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library or a device that is not there, with what to do.
    #[error("{0}")]
    Missing(String),
    /// A call that the device refused.
    #[error("{device}: {call}: {message}")]
    Call {
        /// The device's name.
        device: String,
        /// What was asked of it.
        call: &'static str,
        /// What it said.
        message: String,
    },
    /// Memory that is not there.
    #[error(
        "{device}: {bytes} bytes cannot be allocated; use a smaller batch, a shorter context or a smaller cache"
    )]
    Memory {
        /// The device's name.
        device: String,
        /// What was asked for.
        bytes: usize,
    },
    /// A kernel that does not compile: an error of this program, or of the compiler.
    #[error("{file} does not compile for {device}:\n{log}")]
    Compile {
        /// The kernels' file.
        file: &'static str,
        /// For what.
        device: String,
        /// What the compiler said.
        log: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A cache that cannot live on a device.
    #[error("{0}")]
    Unsupported(String),
    /// An error of the core.
    #[error(transparent)]
    Core(#[from] minicache_core::Error),
}

impl From<Error> for minicache_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            other => Self::Backend(other.to_string()),
        }
    }
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
