//! The one configuration format: caches, models, tasks, experiments and sweeps.
