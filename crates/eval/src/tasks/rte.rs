//! RTE of GLUE (Wang et al. 2019), as the task `rte` of lm-evaluation-harness, zero-shot.

use super::{Document, Output, Reference, ScoreError, Scores, Task, choices};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};

/// Textual entailment.
pub(super) struct Rte;

static PARTS: [Part; 1] = [Part {
    name: "validation questions",
    local: &["rte/validation.jsonl", "rte/validation-*.parquet", "rte/validation.parquet"],
    hub: &[HubFile::main("nyu-mll/glue", "rte/validation-00000-of-00001.parquet")],
    optional: false,
    normalise: as_is,
}];

impl Task for Rte {
    fn name(&self) -> &'static str {
        "rte"
    }

    fn about(&self) -> String {
        "textual entailment, true or false by log-likelihood (lm-evaluation-harness)".to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "rte", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let texts = ["True".to_string(), "False".to_string()];
        let label = record.index_below("label", texts.len())?;
        let (premise, hypothesis) = (record.str("sentence1")?, record.str("sentence2")?);
        let context = format!("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:");
        let choices = choices::after(&context, &texts);
        Ok(choices::document(record.index.to_string(), self.name(), choices, label))
    }

    fn text(&self, record: &Record) -> Result<String> {
        Ok(choices::text(&self.document(record, &[])?))
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["acc"]
    }

    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError> {
        choices::score(reference, output, false)
    }
}
