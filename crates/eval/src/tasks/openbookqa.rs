//! OpenBookQA (Mihaylov et al. 2018), as the task `openbookqa` of lm-evaluation-harness, zero-shot.

use super::{Document, Output, Reference, ScoreError, Scores, Task, choices};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};

/// Elementary science facts.
pub(super) struct OpenBookQa;

static PARTS: [Part; 1] = [Part {
    name: "test questions",
    local: &[
        "openbookqa/test.jsonl",
        "openbookqa/main/test-*.parquet",
        "openbookqa/test-*.parquet",
        "openbookqa/test.parquet",
    ],
    hub: &[HubFile::main("allenai/openbookqa", "main/test-00000-of-00001.parquet")],
    optional: false,
    normalise: as_is,
}];

impl Task for OpenBookQa {
    fn name(&self) -> &'static str {
        "openbookqa"
    }

    fn about(&self) -> String {
        "elementary science, four choices by log-likelihood (lm-evaluation-harness)".to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "openbookqa", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let texts = record.strs("choices.text")?;
        let labels = record.strs("choices.label")?;
        let key = record.str("answerKey")?.trim_start();
        let label = labels.iter().position(|l| l == key).filter(|&l| l < texts.len());
        let label =
            label.ok_or_else(|| record.wrong("answerKey", format!("one of {}", labels.join(", "))))?;
        let choices = choices::after(record.str("question_stem")?, &texts);
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
