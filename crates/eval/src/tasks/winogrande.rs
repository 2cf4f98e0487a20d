//! WinoGrande (Sakaguchi et al. 2020), as the task `winogrande` of lm-evaluation-harness, zero-shot.
//!
//! Partial evaluation: each option fills the gap, and what is scored is the rest of the sentence after it.

use super::{Choice, Document, Output, Reference, ScoreError, Scores, Task, choices};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};

/// Pronouns that need common sense.
pub(super) struct WinoGrande;

static PARTS: [Part; 1] = [Part {
    name: "validation questions",
    local: &[
        "winogrande/validation.jsonl",
        "winogrande/winogrande_xl/validation-*.parquet",
        "winogrande/validation-*.parquet",
        "winogrande/validation.parquet",
    ],
    hub: &[HubFile::main("allenai/winogrande", "winogrande_xl/validation-00000-of-00001.parquet")],
    optional: false,
    normalise: as_is,
}];

impl Task for WinoGrande {
    fn name(&self) -> &'static str {
        "winogrande"
    }

    fn about(&self) -> String {
        "a gap in a sentence, two options by log-likelihood of the rest (lm-evaluation-harness)".to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "winogrande", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let sentence = record.str("sentence")?;
        let (head, tail) = sentence.split_once('_').ok_or_else(|| record.wrong("sentence", "a gap `_`"))?;
        let label = match record.str("answer")? {
            "1" => 0,
            "2" => 1,
            _ => return Err(record.wrong("answer", "\"1\" or \"2\"")),
        };
        let choice = |option: &str| Choice {
            context: format!("{head}{option}"),
            continuation: format!(" {}", tail.trim()),
        };
        let choices = vec![choice(record.str("option1")?), choice(record.str("option2")?)];
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
