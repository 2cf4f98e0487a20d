//! What the multiple-choice tasks of lm-evaluation-harness have in common.

use super::{Choice, Document, Output, Reference, Request, ScoreError, Scores, Tally};
use crate::metrics::{acc, acc_norm};

/// The choices of a question, each after a space.
pub(super) fn after(context: &str, texts: &[String]) -> Vec<Choice> {
    texts
        .iter()
        .map(|text| Choice { context: context.to_string(), continuation: format!(" {text}") })
        .collect()
}

/// A document with one right choice.
pub(super) fn document(id: String, task: &'static str, choices: Vec<Choice>, label: usize) -> Document {
    let length = |choice: &Choice| choice.continuation.chars().count() - 1;
    let reference = Reference::Label { label, lengths: choices.iter().map(length).collect() };
    Document { id, task, request: Request::Choices(choices), reference }
}

/// `acc`, and `acc_norm` where the harness reports it.
pub(super) fn score(
    reference: &Reference,
    output: &Output,
    normalised: bool,
) -> std::result::Result<Scores, ScoreError> {
    let Reference::Label { label, lengths } = reference else {
        return Err(reference.unlike("the index of a choice"));
    };
    let values = output.log_likelihoods(lengths.len())?;
    let mut scores = Scores::from([("acc", Tally::one(acc(values, *label)))]);
    if normalised {
        scores.insert("acc_norm", Tally::one(acc_norm(values, lengths, *label)));
    }
    Ok(scores)
}

/// The question with its right answer.
pub(super) fn text(document: &Document) -> String {
    match (&document.request, &document.reference) {
        (Request::Choices(choices), Reference::Label { label, .. }) => {
            choices.get(*label).map(|c| c.context.clone() + &c.continuation).unwrap_or_default()
        }
        _ => String::new(),
    }
}
