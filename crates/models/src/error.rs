//! Errors of the models crate: each one line that names the thing and, where there is one, the mend.

use std::path::PathBuf;

/// What can go wrong between a model file and its logits.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that can be read but not understood: truncated, of another format, inconsistent.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the mend.
        message: String,
    },
    /// A model configuration with a missing, wrong or unsupported key.
    #[error("model configuration: {0}")]
    Config(String),
    /// Weights that do not fit the configuration, or hold numbers that are not finite.
    #[error("weights: {0}")]
    Weights(String),
    /// A tokenizer that cannot be built, or text that it cannot encode or decode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that does not parse or render.
    #[error("chat template: {0}")]
    Chat(String),
    /// A model that cannot be fetched from the hub.
    #[error("hub: {0}")]
    Hub(String),
    /// A model name that the registry does not know, or a registry file with a mistake.
    #[error("models: {0}")]
    Registry(String),
    /// Calibration text or a basis file that cannot be used.
    #[error("{0}")]
    Calibration(String),
    /// Input of a forward pass that the model cannot take.
    #[error("{0}")]
    Input(String),
    /// A device that is not there, or too small.
    #[error("device: {0}")]
    Device(String),
    /// From a device, its libraries or its kernels.
    #[error("device: {0}")]
    Gpu(#[from] minicache_device::Error),
    /// From the cache.
    #[error(transparent)]
    Cache(#[from] minicache_core::Error),
    /// From the configuration format.
    #[error(transparent)]
    Settings(#[from] minicache_config::ConfigError),
    /// From candle.
    #[error("tensor operation: {0}")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Whether a device has no room for what was asked of it: then nothing has changed, and less may fit.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Gpu(minicache_device::Error::Memory { .. }))
    }

    /// For `map_err` on file operations: names the file.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// For `map_err` on what writes a file: names it.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }

    /// A file that can be read but not understood. The message may quote it.
    pub(crate) fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Error {
        Error::File { path: path.into(), message: minicache_config::escaped(&message.into()) }
    }
}

/// Result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_is_quoted_in_one_line() {
        let error = Error::file("m.gguf", "Token `\nt\u{1b}[2J` out of vocabulary").to_string();
        assert_eq!(error, "m.gguf: Token `\\nt\\u{1b}[2J` out of vocabulary");
    }
}
