//! Results on stdout.

use std::io::Write;

use anyhow::{Context, Result};

/// Prints one line to stdout. Unlike `println!` a closed pipe is an error that ends the program quietly.
pub(crate) fn line(text: impl std::fmt::Display) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot write to stdout")
}

/// Makes sure that everything printed is out: at the end of a program nobody hears of what is not.
pub(crate) fn flush() -> Result<()> {
    std::io::stdout().flush().context("cannot write to stdout")
}
