//! What the cells of a task are run on: its texts, or its documents.

use minicache_config::{Experiment, Kind};

use super::Result;
use crate::data::{DataSource, Origin};
use crate::tasks::{Document, Documents, Suite, Texts, text_suite, texts};

/// A task's data in the form that an experiment needs.
pub(crate) enum Input {
    /// Plain text.
    Texts(Suite, Texts),
    /// Questions with what is right.
    Documents(Suite, Documents),
}

impl Input {
    /// Loads what `experiment` runs on of `task`.
    pub(crate) fn load(experiment: &Experiment, task: &str, data: &DataSource) -> Result<Self> {
        Ok(match experiment.kind {
            Kind::Accuracy => {
                let suite = Suite::find(task)?;
                let documents = suite.documents(data, experiment.limit_of(task))?;
                Self::Documents(suite, documents)
            }
            // Fidelity cuts several windows out of a long document, so its limit counts windows.
            Kind::Fidelity => Self::Texts(text_suite(task)?, texts(task, data, None)?),
            _ => Self::Texts(text_suite(task)?, texts(task, data, experiment.limit_of(task))?),
        })
    }

    /// SHA-256 of the data.
    pub(crate) fn fingerprint(&self) -> &str {
        match self {
            Self::Texts(_, t) => &t.fingerprint,
            Self::Documents(_, d) => &d.fingerprint,
        }
    }

    /// Where the data came from, for results.
    pub(crate) fn origin(&self) -> String {
        match self {
            Self::Texts(_, t) => t.origin.label(),
            Self::Documents(_, d) => d.label(),
        }
    }

    /// Whether all of it is the bundled sample.
    pub(crate) fn is_sample(&self) -> bool {
        match self {
            Self::Texts(_, t) => t.origin == Origin::Sample,
            Self::Documents(_, d) => d.places.iter().all(|(_, origin)| *origin == Origin::Sample),
        }
    }

    /// Number of texts or documents.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Texts(_, t) => t.docs.len(),
            Self::Documents(_, d) => d.docs.len(),
        }
    }

    /// The documents; none where texts are used.
    pub(crate) fn documents(&self) -> &[Document] {
        match self {
            Self::Texts(..) => &[],
            Self::Documents(_, d) => &d.docs,
        }
    }

    /// The columns of the task's metrics; none where texts are used.
    pub(crate) fn metrics(&self) -> Vec<String> {
        match self {
            Self::Texts(..) => Vec::new(),
            Self::Documents(suite, _) => suite.metrics(),
        }
    }
}
