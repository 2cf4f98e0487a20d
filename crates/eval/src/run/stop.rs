//! How a run is asked to stop between two pieces of work.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::{Result, RunError};

/// What is at hand may take so long after a stop was asked for: less than the half minute that schedulers leave between
/// SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(20);

/// The wish that a run stops, from another thread: what is at hand is finished and written first.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<OnceLock<(i32, Instant)>>);

impl Stop {
    /// Asks for a stop because of `signal`, such as 2 for SIGINT. Gives whether it was the first wish.
    pub fn ask(&self, signal: i32) -> bool {
        self.0.set((signal, Instant::now())).is_ok()
    }

    /// The signal because of which a stop was asked for.
    pub fn signal(&self) -> Option<i32> {
        self.0.get().map(|(signal, _)| *signal)
    }

    /// How long ago a stop was asked for.
    pub fn since(&self) -> Option<Duration> {
        self.0.get().map(|(_, at)| at.elapsed())
    }

    /// Fails once a stop was asked for so long ago that what is at hand is given up.
    ///
    /// # Errors
    /// [`RunError::Interrupted`].
    pub fn check_grace(&self) -> Result<()> {
        if self.since().is_some_and(|since| since > GRACE) { self.check() } else { Ok(()) }
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
        assert!(stop.check_grace().is_ok(), "what is at hand is finished");
        let e = stop.check().expect_err("asked").in_cell("a cell");
        assert_eq!(e.interrupted(), Some(15));
    }
}
