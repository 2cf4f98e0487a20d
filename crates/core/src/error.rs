//! Errors of the core.

/// What can go wrong in a cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or slice of the wrong shape.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// What was passed.
        what: &'static str,
        /// The shape that the cache needs.
        expected: String,
        /// The shape that came.
        got: String,
    },
    /// NaN or infinity in a state.
    #[error(
        "{side} state of layer {layer} at position {position} is not finite; the model's weights or its input are broken"
    )]
    NotFinite {
        /// `key` or `value`.
        side: &'static str,
        /// Layer index.
        layer: usize,
        /// Token position in the sequence.
        position: usize,
    },
    /// Tokens that a cache cannot forget again.
    #[error("cannot go back to {len} tokens: {reason}; a fork taken there can")]
    Truncate {
        /// The length asked for.
        len: usize,
        /// What has been made of the tokens.
        reason: &'static str,
    },
    /// A saved cache that cannot be written or read; the message goes on from the file's name.
    #[error("the saved cache {0}")]
    Archive(String),
    /// Of a file that a cache is saved to.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A cache that needs something it was not given (a calibrated basis, the model's RoPE).
    #[error("{0}")]
    Missing(String),
    /// Of a backend of somebody's own: a cache that lives elsewhere than in this process' memory.
    #[error("{0}")]
    Backend(String),
    /// A setting that cannot be, or that does not fit the model.
    #[error(transparent)]
    Setting(#[from] crate::settings::SettingError),
    /// From candle.
    #[cfg(feature = "candle")]
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
