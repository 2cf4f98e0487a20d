//! Text that a model writes itself, to be calibrated on where there is no other.
//!
//! Tokens are drawn from the model's own distributions, as they are (temperature 1, no token left out, ends of texts
//! among them), after beginnings of several kinds of text: the states are then those of what the model takes text to be.
//! Data-free quantisation does the same (LLM-QAT, Liu et al. 2023, arXiv 2305.17888; self-calibration, Williams et al.
//! 2024, arXiv 2410.17170).

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use minicache_core::kernels::loops::{exp_sum, largest};
use minicache_core::{CacheSpec, Sequence};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::{Error, LogitsFor, Model, Result, Step};

/// What texts begin with, one after the other.
const BEGINNINGS: [&str; 16] = [
    "The",
    "Question:",
    "def ",
    "In",
    "Once upon a time",
    "# ",
    "1. ",
    "Dear",
    "import ",
    "According to",
    "A:",
    "{\"",
    "How to",
    "Die",
    "\u{5728}",
    "Abstract\n\n",
];

/// Texts written side by side, at most.
const TOGETHER: usize = 16;
/// Bytes of their full caches, about.
const CACHES_BYTES: usize = 2 << 30;
/// Of the random numbers.
const SEED: u64 = 0;

/// Tokens asked for, and of each text; and the texts.
type Written = ((usize, usize), Arc<[Vec<u32>]>);

/// What a model has written so far.
#[derive(Default)]
pub(crate) struct OwnTexts(Mutex<Vec<Written>>);

impl fmt::Debug for OwnTexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnTexts").finish_non_exhaustive()
    }
}

impl OwnTexts {
    /// What has been written of so many tokens, in texts of `chunk`, or else is by `write`, unless it stops.
    fn get(
        &self,
        asked: (usize, usize),
        write: impl FnOnce() -> Result<Option<Arc<[Vec<u32>]>>>,
    ) -> Result<Option<Arc<[Vec<u32>]>>> {
        // A thread that failed left nothing half written.
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, texts)) = written.iter().find(|(of, _)| *of == asked) {
            return Ok(Some(texts.clone()));
        }
        let texts = write()?;
        written.extend(texts.iter().map(|texts| (asked, texts.clone())));
        Ok(texts)
    }
}

impl Model {
    /// `tokens` tokens that the model writes, in texts of `chunk` tokens or as many as its context has room for, the last
    /// one shorter; the same in every call, and on every machine of one instruction set. Nothing where `go_on`, which is
    /// asked before every token, says no.
    ///
    /// # Errors
    /// As [`crate::Decoder::forward`].
    pub fn own_text(
        &self,
        tokens: usize,
        chunk: usize,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Arc<[Vec<u32>]>>> {
        let length = chunk.clamp(1, self.config.context.max(1));
        self.own_texts.get((tokens, chunk), || write(self, tokens, length, go_on))
    }
}

/// A text that is being written.
struct Draft {
    tokens: Vec<u32>,
    /// Tokens that it is to have.
    length: usize,
    sequence: Sequence,
    rng: ChaCha8Rng,
}

fn write(
    model: &Model,
    tokens: usize,
    chunk: usize,
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Arc<[Vec<u32>]>>> {
    let bytes = model.decoder.shape().full_bytes(chunk).max(1);
    let together = (CACHES_BYTES / bytes).clamp(1, TOGETHER);
    let lengths: Vec<usize> = (0..tokens).step_by(chunk).map(|first| chunk.min(tokens - first)).collect();
    let mut texts = Vec::with_capacity(lengths.len());
    for (batch, lengths) in lengths.chunks(together).enumerate() {
        let drafts =
            lengths.iter().enumerate().map(|(i, &length)| draft(model, batch * together + i, length));
        let mut drafts = drafts.collect::<Result<Vec<_>>>()?;
        loop {
            let mut open: Vec<&mut Draft> = drafts.iter_mut().filter(|d| d.tokens.len() < d.length).collect();
            if open.is_empty() {
                break;
            }
            if !go_on() {
                return Ok(None);
            }
            let mut steps: Vec<Step<'_>> = open
                .iter_mut()
                .map(|draft| {
                    let Draft { tokens, sequence, .. } = &mut **draft;
                    Step { tokens: &tokens[sequence.len()..], sequence, logits: LogitsFor::Last }
                })
                .collect();
            let logits = model.decoder.forward(&mut steps)?;
            open.par_iter_mut().enumerate().for_each(|(i, draft)| {
                let next = drawn(logits.of(i).to_vec(), &mut draft.rng);
                draft.tokens.push(next);
            });
        }
        texts.extend(drafts.into_iter().map(|draft| draft.tokens));
    }
    Ok(Some(texts.into()))
}

/// The beginning of the `nth` text: as a text of the model's tokenizer begins, or, without one, any token.
fn draft(model: &Model, nth: usize, length: usize) -> Result<Draft> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    rng.set_stream(nth as u64);
    let any = rng.random_range(0..model.config.vocab.max(1)) as u32;
    let mut tokens = match &model.tokenizer {
        Some(tokenizer) => tokenizer.encode(BEGINNINGS[nth % BEGINNINGS.len()], true)?,
        None => Vec::new(),
    };
    tokens.truncate(length);
    if tokens.is_empty() {
        tokens.push(any);
    }
    if tokens.iter().any(|&t| t as usize >= model.config.vocab) {
        let message = "the tokenizer has tokens that the model has not, so that it cannot write a text";
        return Err(Error::Calibration(message.to_string()));
    }
    let sequence = model.sequence(&CacheSpec::default(), length)?;
    Ok(Draft { tokens, length, sequence, rng })
}

/// A token drawn with the probabilities that `logits` say.
fn drawn(mut logits: Vec<f32>, rng: &mut ChaCha8Rng) -> u32 {
    let top = largest(&logits);
    let total = exp_sum(&mut logits, top);
    let mut left = rng.random::<f64>() * f64::from(total);
    // Rounding may leave a little: the most likely token then.
    let likeliest = || logits.iter().position(|&w| w >= 1.0).unwrap_or(0);
    let found = logits.iter().position(|&w| {
        left -= f64::from(w);
        left < 0.0
    });
    found.unwrap_or_else(likeliest) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let shares = [0.5_f32, 0.25, 0.0, 0.2, 0.05];
        let logits: Vec<f32> = shares.iter().map(|p| p.ln() + 3.0).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0_u32; 5];
        (0..20_000).for_each(|_| counts[drawn(logits.clone(), &mut rng) as usize] += 1);
        for (share, count) in shares.iter().zip(counts) {
            // Four standard deviations.
            let off = 4.0 * (share * (1.0 - share) / 20_000.0).sqrt();
            assert!((count as f32 / 20_000.0 - share).abs() <= off, "{counts:?}");
        }
    }
}
