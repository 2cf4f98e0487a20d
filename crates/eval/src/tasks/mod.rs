//! Tasks: what is asked of a model, and how its outputs are scored.
//!
//! A task is one file: its data (template, few-shot source, stop strings, lengths, metric names) and the functions
//! that make a [`Document`] of a record and a score of an output. [`all`] names every one. Prompts and scores follow
//! lm-evaluation-harness 0.4 and LongBench to the byte; nothing here runs a model.

mod choices;
mod coqa;
mod gsm8k;
mod longbench;
mod mathqa;
mod openbookqa;
mod piqa;
mod rte;
mod suite;
mod texts;
mod truthfulqa;
mod winogrande;

use indexmap::IndexMap;
use minicache_config::python_json;
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Record, Result};

pub use suite::{Aggregate, Documents, Suite, groups};
pub use texts::{TextDoc, Texts, text_suite, texts};

/// One thing asked of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Continue a prompt.
    Generate(Generate),
    /// Score given continuations by log-likelihood.
    Choices(Vec<Choice>),
    /// Continue each of several prompts of which every one begins with the one before it.
    Turns(Turns),
}

/// Greedy generation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generate {
    /// The text to continue, before any chat template.
    pub prompt: String,
    /// Generation ends before the first of these strings, which is not part of the output.
    pub until: Vec<String>,
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// Whether a chat model's template goes around the prompt.
    pub chat: Chat,
    /// The last token of this text ends generation like an end-of-sequence token, and neither may come first.
    pub stop_token: Option<&'static str>,
    /// What to do with a prompt that is longer than the model's context.
    pub overflow: Overflow,
}

/// Chat template rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Chat {
    /// The bare prompt for every model.
    Never,
    /// As one user message where the model has a chat template.
    Wrap,
}

/// Rule for prompts that are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// Keep the last tokens (lm-evaluation-harness).
    KeepEnd,
    /// Keep as many tokens of the beginning as of the end (LongBench): see [`cut_middle`].
    CutMiddle,
}

/// One continuation to score after its context.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// What comes before. The same for all choices of a question, but for `winogrande`.
    pub context: String,
    /// What is scored, with its leading space.
    pub continuation: String,
}

impl Choice {
    /// Context and continuation as they are to be encoded: white space at the end of the context goes to the
    /// continuation. The continuation's tokens are those of the two together beyond those of the context alone
    /// (`_encode_pair` of lm-evaluation-harness).
    pub fn encoded_apart(&self) -> (&str, String) {
        let context = self.context.trim_end();
        (context, format!("{}{}", &self.context[context.len()..], self.continuation))
    }
}

/// Turns of a conversation about one text, each answered after the reference answers of the earlier ones.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Turns {
    /// One prompt per turn.
    pub prompts: Vec<String>,
    /// As in [`Generate`].
    pub until: Vec<String>,
    /// As in [`Generate`], for each turn.
    pub max_new_tokens: usize,
}

/// What outputs are compared with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// One answer.
    Answer(String),
    /// Several answers, the best of which counts; `classes` are all labels of a classification.
    Answers {
        /// Right answers.
        answers: Vec<String>,
        /// All labels, where the task is a classification.
        classes: Vec<String>,
    },
    /// Right answers for every turn.
    TurnAnswers(Vec<Vec<String>>),
    /// Answers to resemble, and answers not to resemble.
    TrueFalse {
        /// To resemble.
        correct: Vec<String>,
        /// Not to resemble.
        incorrect: Vec<String>,
    },
    /// The right choice.
    Label {
        /// Its index.
        label: usize,
        /// Length of every choice in characters, without its leading space.
        lengths: Vec<usize>,
    },
    /// Which choices are true.
    Labels(Vec<bool>),
}

/// What a model gave for a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// Generated text, without stop string: one, or one per turn.
    Generated(Vec<String>),
    /// The log-likelihood of every choice, in nats.
    LogLikelihoods(#[serde(with = "python_json::numbers")] Vec<f64>),
}

/// A metric of one or more samples as sum and count: what several have together is the sum of both.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Sum of the scores.
    #[serde(with = "python_json::number")]
    pub sum: f64,
    /// Number of scores: 1 for most samples, the number of turns for a conversation.
    #[serde(with = "python_json::number")]
    pub count: f64,
}

impl Tally {
    /// One score.
    pub fn one(score: f64) -> Self {
        Self { sum: score, count: 1.0 }
    }

    /// Several scores.
    pub fn of(scores: &[f64]) -> Self {
        Self { sum: scores.iter().sum(), count: scores.len() as f64 }
    }

    /// The mean.
    pub fn mean(self) -> f64 {
        self.sum / self.count
    }
}

/// The metrics of one sample, by name.
pub type Scores = IndexMap<&'static str, Tally>;

/// An output that does not answer its request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}")]
pub struct ScoreError {
    /// What the task asks for.
    pub expected: String,
    /// What there is.
    pub found: String,
}

/// How the field prints a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// As it is: lm-evaluation-harness.
    Plain,
    /// Times 100, two decimals: LongBench.
    Percent,
}

impl Scale {
    /// A mean as the field prints it, not rounded.
    pub fn apply(self, tally: Tally) -> f64 {
        match self {
            Self::Plain => tally.mean(),
            Self::Percent => 100.0 * tally.sum / tally.count,
        }
    }

    /// The value with as many decimals as the field prints.
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::Plain => value,
            // By way of the decimal text: what Python's `round(x, 2)` does.
            Self::Percent => format!("{value:.2}").parse().unwrap_or(value),
        }
    }
}

/// One document: what is asked and what is right.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Document {
    /// Unique within its task: the record's own id or its number.
    pub id: String,
    /// Name of the task.
    pub task: &'static str,
    /// What is asked.
    pub request: Request,
    /// What is right.
    pub reference: Reference,
}

/// A task.
pub trait Task: Sync {
    /// Name, as in experiment files.
    fn name(&self) -> &'static str;

    /// One line on what it is and where its form comes from.
    fn about(&self) -> String;

    /// Its data.
    fn dataset(&self) -> Dataset;

    /// How it differs from where its form comes from.
    fn note(&self) -> Option<&'static str> {
        None
    }

    /// Records of each part of its data that the first `documents` documents, or all of them, are made from; all
    /// records of parts beyond those named.
    fn needs(&self, documents: Option<usize>) -> Vec<Option<usize>> {
        vec![documents]
    }

    /// The documents in order, and the few-shot examples, of a data set as loaded.
    fn arrange(&self, parts: Vec<Vec<Record>>) -> (Vec<Record>, Vec<Record>) {
        let mut parts = parts.into_iter();
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    }

    /// The document of a record.
    ///
    /// # Errors
    /// A field that is absent or of another type.
    fn document(&self, record: &Record, shots: &[Record]) -> Result<Document>;

    /// The record as plain text with its answer: for similarity, fidelity and calibration.
    ///
    /// # Errors
    /// A field that is absent or of another type.
    fn text(&self, record: &Record) -> Result<String>;

    /// Metric names; figures show the first.
    fn metrics(&self) -> &'static [&'static str];

    /// How its metrics are printed.
    fn scale(&self) -> Scale {
        Scale::Plain
    }

    /// Scores one output.
    ///
    /// # Errors
    /// An output of another kind or length than the request asks for.
    fn score(&self, reference: &Reference, output: &Output) -> std::result::Result<Scores, ScoreError>;

    /// The reference of a line with bare `answers`, where that is enough.
    fn reference(&self, answers: Vec<String>, classes: Vec<String>) -> Option<Reference> {
        let _ = (answers, classes);
        None
    }
}

/// Every task.
pub fn all() -> impl Iterator<Item = &'static dyn Task> {
    static TASKS: [&dyn Task; 10] = [
        &gsm8k::Gsm8k,
        &coqa::Coqa,
        &truthfulqa::Generation,
        &truthfulqa::SingleTrue,
        &truthfulqa::MultiTrue,
        &openbookqa::OpenBookQa,
        &mathqa::MathQa,
        &piqa::Piqa,
        &rte::Rte,
        &winogrande::WinoGrande,
    ];
    TASKS.into_iter().chain(longbench::TASKS.iter().map(|task| task as &dyn Task))
}

/// The tokens to keep of a prompt of `tokens` tokens of which at most `limit` are wanted: the first `limit / 2` and as
/// many of the last. `None` when it fits. LongBench decodes the two ranges apart, without special tokens, joins the
/// texts and encodes them again.
pub fn cut_middle(tokens: usize, limit: usize) -> Option<(std::ops::Range<usize>, std::ops::Range<usize>)> {
    (tokens > limit).then(|| (0..limit / 2, tokens - limit / 2..tokens))
}

impl Output {
    /// The one generated text.
    pub(crate) fn text(&self) -> std::result::Result<&str, ScoreError> {
        match self {
            Self::Generated(texts) if texts.len() == 1 => Ok(&texts[0]),
            other => Err(other.unlike("one generated text")),
        }
    }

    /// One log-likelihood for each of `count` choices.
    pub(crate) fn log_likelihoods(&self, count: usize) -> std::result::Result<&[f64], ScoreError> {
        match self {
            Self::LogLikelihoods(values) if values.len() == count => Ok(values),
            other => Err(other.unlike(&format!("{count} log-likelihoods"))),
        }
    }

    pub(crate) fn unlike(&self, expected: &str) -> ScoreError {
        let found = match self {
            Self::Generated(texts) => format!("{} generated texts", texts.len()),
            Self::LogLikelihoods(values) => format!("{} log-likelihoods", values.len()),
        };
        ScoreError { expected: expected.to_string(), found }
    }
}

impl Reference {
    pub(crate) fn unlike(&self, expected: &str) -> ScoreError {
        let found = match self {
            Self::Answer(_) => "one answer",
            Self::Answers { .. } => "a list of answers",
            Self::TurnAnswers(_) => "answers by turn",
            Self::TrueFalse { .. } => "true and false answers",
            Self::Label { .. } => "the index of a choice",
            Self::Labels(_) => "labels of choices",
        };
        ScoreError { expected: expected.to_string(), found: found.to_string() }
    }
}
