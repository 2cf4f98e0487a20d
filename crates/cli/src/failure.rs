//! How failures reach the user: one or two lines on stderr, and an exit code.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Error;

use crate::signals::BY_SIGNAL;

/// The work could not be done: a full disk, no network, a model that computes NaN.
pub(crate) const FAILED: u8 = 1;
/// The call, or a file that it names, is wrong.
pub(crate) const WRONG: u8 = 2;

/// Characters of a line of an error.
const LONGEST_LINE: usize = 600;

/// Marks an error as a wrong call or file (exit code 2).
#[derive(Debug)]
pub(crate) struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A run that a signal stopped between two samples.
#[derive(Debug, thiserror::Error)]
#[error("stopped; what is finished is kept, go on with: {command}")]
pub(crate) struct Interrupted {
    /// The signal's number.
    pub(crate) signal: i32,
    /// The call that goes on.
    pub(crate) command: String,
}

/// A sweep that is not done: what there is to say of it has been printed.
#[derive(Debug, thiserror::Error)]
#[error("not everything is done")]
pub(crate) struct Unfinished {
    /// The exit code.
    pub(crate) code: u8,
}

/// An error about the call itself, with what to do instead.
pub(crate) fn usage(message: impl Into<String>) -> Error {
    Error::new(Usage(message.into()))
}

/// Turns any error into one about the call or a file that it names.
pub(crate) trait OrUsage<T> {
    /// Exit code 2 for whatever went wrong here, `what` (the file or option) named first.
    fn or_usage(self, what: impl std::fmt::Display) -> anyhow::Result<T>;
}

impl<T, E: std::fmt::Display> OrUsage<T> for Result<T, E> {
    fn or_usage(self, what: impl std::fmt::Display) -> anyhow::Result<T> {
        self.map_err(|e| usage(format!("{what}: {e:#}")))
    }
}

/// The exit code of an error: 2 where an error in the chain says that the call or a file is wrong, 128 and the signal
/// where that was it, else 1.
fn code(error: &Error) -> u8 {
    if let Some(Interrupted { signal, .. }) = error.downcast_ref() {
        return u8::try_from(BY_SIGNAL + signal).unwrap_or(FAILED);
    }
    if error.chain().any(is_wrong) { WRONG } else { FAILED }
}

/// Whether the user's call or a file is at fault, rather than the machine, the network or the numbers.
fn is_wrong(e: &(dyn std::error::Error + 'static)) -> bool {
    use minicache_core::Error as Cache;
    use minicache_device::Error as Device;
    use minicache_eval::run::RunError as Run;
    use minicache_eval::store::StoreError as Store;
    use minicache_models::Error as Model;
    use minicache_plot::PlotError as Plot;
    if e.is::<Usage>()
        || e.is::<minicache_config::ConfigError>()
        || e.is::<minicache_core::settings::SettingError>()
        || e.is::<minicache_eval::data::DataError>()
    {
        true
    } else if let Some(e) = e.downcast_ref::<Cache>() {
        matches!(e, Cache::Setting(_) | Cache::Missing(_))
    } else if let Some(e) = e.downcast_ref::<Model>() {
        match e {
            Model::Cache(e) => is_wrong(e),
            Model::Gpu(e) => matches!(e, Device::Missing(_) | Device::Unsupported(_)),
            Model::Hub(_) | Model::Candle(_) | Model::Write { .. } => false,
            _ => true,
        }
    } else if let Some(e) = e.downcast_ref::<Store>() {
        matches!(e, Store::Malformed { .. } | Store::NotAFolder(_) | Store::NoLinks(_) | Store::Limit { .. })
    } else if let Some(e) = e.downcast_ref::<Plot>() {
        // What a run has written is no file of the call.
        matches!(e, Plot::NoResults(_))
    } else if let Some(e) = e.downcast_ref::<Run>() {
        match e {
            Run::Config(_) | Run::Asked(_) | Run::Data(_) => true,
            Run::Store(e) => is_wrong(e),
            Run::Model(e) => is_wrong(e),
            Run::Cache(e) => is_wrong(e),
            Run::Cell { source, .. } => is_wrong(source.as_ref()),
            Run::Candle(_) | Run::Elsewhere(_) | Run::Interrupted { .. } => false,
        }
    } else {
        false
    }
}

/// Prints the error as `minicache: ...` and gives its exit code. A reader that closed the pipe is no failure.
pub(crate) fn report(error: &Error) -> ExitCode {
    if error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    if let Some(Unfinished { code }) = error.downcast_ref() {
        return ExitCode::from(*code);
    }
    say(&describe(error));
    ExitCode::from(code(error))
}

/// A line on stderr. Where that cannot be written either there is nobody left to tell.
fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "minicache: {message}");
}

/// The chain in one line; a cause that the message before it already quotes is not repeated.
pub(crate) fn describe(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    // Errors of candle carry a backtrace below their first line when RUST_BACKTRACE is set.
    // Whatever a file put into the message, it does not steer the terminal.
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty()).take(2);
    let lines: Vec<_> = lines.map(|line| shortened(&minicache_config::escaped(line))).collect();
    lines.join("\n  ")
}

/// A line without its middle, where it is longer than anybody reads: the beginning names the thing, the end the mend.
fn shortened(line: &str) -> String {
    let length = line.chars().count();
    if length <= LONGEST_LINE {
        return line.to_string();
    }
    let (first, last) = (LONGEST_LINE * 2 / 3, LONGEST_LINE / 3);
    let head: String = line.chars().take(first).collect();
    let tail: String = line.chars().skip(length - last).collect();
    format!("{head} … {tail}")
}

fn is_broken_pipe(e: &(dyn std::error::Error + 'static)) -> bool {
    e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Help and version as clap prints them; errors shortened to the message and where to look.
pub(crate) fn report_clap(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return match error.print().and_then(|()| std::io::stdout().flush()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                say(&format!("cannot write to stdout: {e}"));
                ExitCode::from(FAILED)
            }
            _ => ExitCode::from(if error.exit_code() == 0 { 0 } else { WRONG }),
        };
    }
    let text = error.render().to_string();
    let end = text.find("\nUsage:").unwrap_or(text.len());
    let message: Vec<_> = text[..end]
        .lines()
        .map(|l| l.trim().trim_start_matches("error: "))
        .filter(|l| !l.is_empty() && !l.starts_with("For more information"))
        .collect();
    say(&format!("{}; see `minicache --help`", message.join(" ")));
    ExitCode::from(WRONG)
}

/// A panic is a bug: one line that says so and where, instead of a backtrace.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        if minicache_config::guard::is_active() {
            return; // becomes an error that names the file
        }
        let payload = info.payload();
        let message = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_string())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        if message.contains("Broken pipe") {
            std::process::exit(0);
        }
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        let message = message.lines().next().unwrap_or("panic");
        say(&format!("internal error{place}: {message}; please report it with the command you ran"));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn wrong_calls_and_failed_work_differ() {
        assert_eq!(code(&usage("no such file")), WRONG);
        assert_eq!(code(&usage("x").context("while reading y")), WRONG);
        let config = minicache_config::ConfigError::new("cache.t", "must be within 0 to 1");
        assert_eq!(code(&Error::new(config)), WRONG);
        assert_eq!(code(&anyhow::anyhow!("no space left on device")), FAILED);
    }

    #[test]
    fn a_chain_is_one_line_without_repetition() {
        let e: anyhow::Result<()> = Err(anyhow::anyhow!("disk full"));
        let e = e.context("cannot write cells.csv: disk full").context("fig1a");
        let e = e.expect_err("an error");
        assert_eq!(describe(&e), "fig1a: cannot write cells.csv: disk full");
        let long = describe(&anyhow::anyhow!("name {} mend", "x".repeat(10_000)));
        assert!(long.starts_with("name xx") && long.ends_with("xx mend") && long.len() < 700, "{long}");
        assert_eq!(describe(&anyhow::anyhow!("x\u{1b}[2J\ny\nz")), "x\\u{1b}[2J\n  y");
    }
}
