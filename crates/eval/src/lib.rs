//! Tasks, metrics, runners and the results store.

pub mod data;
pub mod metrics;
pub mod run;
pub mod score;
pub mod store;
pub mod tasks;
