//! Reports of made-up results: what is drawn, what is written, what happens to files that are not whole.
#![allow(clippy::unwrap_used)]

mod figures;
mod files;
mod results;
mod verdicts;
