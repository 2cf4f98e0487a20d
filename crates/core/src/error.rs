//! Errors of the core.

/// What can go wrong in a cache.
#[derive(Debug, thiserror::Error)]
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
    /// A cache that needs something it was not given (a calibrated basis, the model's RoPE).
    #[error("{0}")]
    Missing(String),
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
