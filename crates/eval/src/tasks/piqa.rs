//! PIQA (Bisk et al. 2020), as the task `piqa` of lm-evaluation-harness, zero-shot.

use super::{Document, Output, Reference, ScoreError, Scores, Task, choices};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};

/// Physical common sense.
pub(super) struct Piqa;

static PARTS: [Part; 1] = [Part {
    name: "validation questions",
    local: &[
        "piqa/validation.jsonl",
        "piqa/plain_text/validation-*.parquet",
        "piqa/data/validation-*.parquet",
        "piqa/validation-*.parquet",
        "piqa/validation.parquet",
    ],
    hub: &[
        HubFile::converted("baber/piqa", "default/validation/0000.parquet"),
        HubFile::converted("ybisk/piqa", "plain_text/validation/0000.parquet"),
    ],
    optional: false,
    normalise: as_is,
}];

impl Task for Piqa {
    fn name(&self) -> &'static str {
        "piqa"
    }

    fn about(&self) -> String {
        "physical common sense, two choices by log-likelihood (lm-evaluation-harness)".to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "piqa", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let texts = [record.str("sol1")?.to_string(), record.str("sol2")?.to_string()];
        let label = record.index_below("label", texts.len())?;
        let choices = choices::after(&format!("Question: {}\nAnswer:", record.str("goal")?), &texts);
        Ok(choices::document(record.index.to_string(), self.name(), choices, label))
    }

    fn text(&self, record: &Record) -> Result<String> {
        Ok(choices::text(&self.document(record, &[])?))
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["acc", "acc_norm"]
    }

    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError> {
        choices::score(reference, output, true)
    }
}
