//! SIGINT, SIGTERM and SIGUSR1 (a scheduler's warning): a run finishes what is at hand, every other command ends at once;
//! neither leaves files on their way.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use minicache_config::atomic;
use minicache_eval::run::Stop;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

/// What a process that ends by a signal exits with, less the signal's number.
pub(crate) const BY_SIGNAL: i32 = 128;

/// A scheduler signals a job's shell and its children, and the shell passes it on: the same wish within so long is one.
const ONE_WISH: Duration = Duration::from_secs(5);

/// The run that wants to know of signals, if there is one.
static RUN: OnceLock<Stop> = OnceLock::new();

/// Sets up the handling of signals, on a thread of their own.
pub(crate) fn install() -> std::io::Result<()> {
    // A file that may not grow any further is an error of the write, as a full disk is.
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || signals.forever().for_each(handle))?;
    Ok(())
}

/// From now on the first signal asks for this to stop; the second ends the process, unless a scheduler sends one twice.
pub(crate) fn stop() -> Stop {
    RUN.get_or_init(Stop::default).clone()
}

fn handle(signal: i32) {
    match RUN.get() {
        Some(stop) if stop.ask(signal) => {
            let message = "minicache: stopping after what is at hand; once more to stop at once";
            let _ = writeln!(std::io::stderr(), "{message}");
        }
        Some(stop) if signal != SIGINT && stop.since().is_some_and(|since| since < ONE_WISH) => {}
        Some(_) => {
            atomic::discard_all();
            low_level::exit(BY_SIGNAL + signal);
        }
        None => {
            atomic::discard_all();
            let _ = low_level::emulate_default_handler(signal);
        }
    }
}
