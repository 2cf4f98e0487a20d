//! Tasks, metrics, runners and the results store.

pub mod store;
