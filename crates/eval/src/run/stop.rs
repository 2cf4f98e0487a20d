//! How a run is asked to stop between two pieces of work.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{Result, RunError};

/// The wish that a run stops, from another thread: what is at hand is finished and written first.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicI32>);

impl Stop {
    /// Asks for a stop because of `signal`, such as 2 for SIGINT. Gives whether it was the first wish.
    pub fn ask(&self, signal: i32) -> bool {
        self.0.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The signal because of which a stop was asked for.
    pub fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    /// Fails once a stop was asked for.
    ///
    /// # Errors
    /// [`RunError::Interrupted`].
    pub fn check(&self) -> Result<()> {
        self.signal().map_or(Ok(()), |signal| Err(RunError::Interrupted { signal }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_wish_counts() {
        let stop = Stop::default();
        assert!(stop.check().is_ok());
        assert!(stop.ask(15) && !stop.clone().ask(2));
        let e = stop.check().expect_err("asked").in_cell("a cell");
        assert_eq!(e.interrupted(), Some(15));
    }
}
