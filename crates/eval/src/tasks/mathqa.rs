//! MathQA (Amini et al. 2019), as the task `mathqa` of lm-evaluation-harness, zero-shot.

use std::sync::LazyLock;

use regex::Regex;

use super::{Document, Output, Reference, ScoreError, Scores, Task, choices};
use crate::data::{Dataset, HubFile, Part, Record, Result, as_is};

/// Word problems.
pub(super) struct MathQa;

static PARTS: [Part; 1] = [Part {
    name: "test questions",
    local: &["mathqa/test.jsonl", "mathqa/test-*.parquet", "mathqa/test.parquet"],
    hub: &[
        HubFile::converted("regisss/math_qa", "default/test/0000.parquet"),
        HubFile::converted("allenai/math_qa", "default/test/0000.parquet"),
    ],
    optional: false,
    normalise: as_is,
}];

impl Task for MathQa {
    fn name(&self) -> &'static str {
        "mathqa"
    }

    fn about(&self) -> String {
        "word problems, five choices by log-likelihood (lm-evaluation-harness)".to_string()
    }

    fn dataset(&self) -> Dataset {
        Dataset { name: "mathqa", parts: &PARTS }
    }

    fn document(&self, record: &Record, _: &[Record]) -> Result<Document> {
        let texts = options(record.str("options")?);
        let correct = record.str("correct")?;
        let label = ["a", "b", "c", "d", "e"].iter().position(|l| *l == correct).filter(|&l| l < texts.len());
        let label = label.ok_or_else(|| record.wrong("correct", "the letter of one of the options"))?;
        let choices = choices::after(&format!("Question: {}\nAnswer:", record.str("Problem")?), &texts);
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

/// The options of `a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these`. The harness takes what
/// stands between a letter with its parenthesis and the next ` , `, and for `e` the rest.
fn options(text: &str) -> Vec<String> {
    static OPTION: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"[abcd] \) .*?, |e \) .*?(?:\n?\z)").ok());
    let found = OPTION.as_ref().map(|re| re.find_iter(text).collect::<Vec<_>>()).unwrap_or_default();
    let bare = |option: &str| option[4..].trim_end_matches([' ', ',']).to_string();
    found.into_iter().map(|m| bare(m.as_str().trim_end_matches('\n'))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_may_hold_commas() {
        let text = "a ) rs . 5,000 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these";
        assert_eq!(options(text), ["rs . 5,000", "27.675", "30", "data inadequate", "none of these"]);
    }
}
