//! How large numbers in settings may be: far above anything that is run, and far below what overflows when sizes are
//! multiplied or what could never be allocated. Beyond them a setting is a mistake, and said to be one.

pub use minicache_core::settings::bounds::{MOST_TOKENS, check_number};

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
