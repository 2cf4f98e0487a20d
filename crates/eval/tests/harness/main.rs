//! Data, prompts and scores: against golden values of the Python originals (`fixtures/`), and against the real data
//! and the harness's own outputs where these lie beside the checkout.
#![allow(clippy::unwrap_used)]

mod data;
mod golden;
mod metrics;
mod outputs;
mod prompts;
