//! What a forward step predicts.

use std::ops::Range;

/// Of which of a step's tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogitsFor {
    /// None: prefill of all but the last chunk.
    None,
    /// The last token.
    #[default]
    Last,
    /// Every token.
    All,
}

impl LogitsFor {
    /// The rows wanted of those that a sequence's tokens have.
    pub(super) fn rows(self, tokens: &Range<usize>) -> Range<usize> {
        match self {
            LogitsFor::None => tokens.end..tokens.end,
            LogitsFor::Last => tokens.end - 1..tokens.end,
            LogitsFor::All => tokens.clone(),
        }
    }
}

/// What a token's prediction comes to, see [`super::Decoder::score_on_gpu`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// -log of the probability of the token that follows, in nats.
    pub nll: f64,
    /// KL(the prediction it is compared with || this one), in nats.
    pub kl: f64,
    /// Whether both have the same likeliest token.
    pub agrees: bool,
}

/// Logits of the tokens that a forward step was asked for, sequence by sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logits {
    /// `(rows, vocab)`.
    data: Vec<f32>,
    vocab: usize,
    /// Rows of each sequence.
    ranges: Vec<Range<usize>>,
}

impl Logits {
    /// `data (rows, vocab)`, of which each sequence has so many `rows`, one after the other.
    pub(super) fn new(data: Vec<f32>, vocab: usize, rows: impl Iterator<Item = usize>) -> Self {
        let mut first = 0;
        let ranges = rows.map(|n| {
            first += n;
            first - n..first
        });
        Self { ranges: ranges.collect(), data, vocab }
    }

    /// Sequences.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether the step had no sequences.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Words of the vocabulary: numbers of a row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Those of a sequence, `(tokens asked for, vocab)`.
    ///
    /// # Panics
    /// A sequence that the step did not have.
    pub fn of(&self, sequence: usize) -> &[f32] {
        let rows = &self.ranges[sequence];
        &self.data[rows.start * self.vocab..rows.end * self.vocab]
    }

    /// Those of each sequence.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        (0..self.len()).map(|sequence| self.of(sequence))
    }

    /// All of them, `(rows, vocab)`: of a step of one sequence, that one's.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }
}
