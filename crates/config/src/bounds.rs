//! How large numbers in settings may be: far above anything that is run, and far below what overflows when sizes are
//! multiplied or what could never be allocated. Beyond them a setting is a mistake, and said to be one.

use std::ops::RangeInclusive;

use crate::{ConfigError, Result};

/// Tokens of a sequence, of a window or of a text.
pub const MOST_TOKENS: usize = 1 << 24;
/// Sequences side by side.
pub const MOST_SEQUENCES: usize = 1 << 16;
/// Cells of an experiment.
pub const MOST_CELLS: usize = 10_000;
/// Samples of a task.
pub const MOST_SAMPLES: usize = 1 << 24;
/// Steps that are timed, of all sequences of a batch together.
pub const MOST_STEPS: usize = 1 << 24;
/// Threads.
pub const MOST_THREADS: usize = 4096;
/// Bytes of a budget.
pub const MOST_BYTES: u64 = 1 << 50;
/// Compression that can be asked for.
pub const MOST_RATIO: f64 = 1000.0;

/// Checks a number against what is allowed.
///
/// # Errors
/// Names the key and the bounds.
pub fn check_number<T: PartialOrd + std::fmt::Display>(
    key: &str,
    number: T,
    allowed: RangeInclusive<T>,
) -> Result<()> {
    if allowed.contains(&number) {
        return Ok(());
    }
    let (low, high) = (allowed.start(), allowed.end());
    let message = if number < *low {
        format!("must be at least {low}, not {number}")
    } else {
        format!("must be at most {high}, not {number}")
    };
    Err(ConfigError::new(key, message))
}
