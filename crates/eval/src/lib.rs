//! Tasks, metrics, runners and the results store.
