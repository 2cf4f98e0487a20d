//! Continuous batching: prompts are prefilled one after another, and their continuations, for every cache compared,
//! go through the model side by side. Sequences join as others finish; nothing waits for the longest.
//!
//! A prompt is computed once for all caches (see [`Prefill`]), and a prompt that shares its beginning with the one
//! before it (few-shot examples, the turns of a story, the choices of a question) computes only the rest.

use candle_core::Tensor;
use minicache_config::CacheSpec;
use minicache_core::KvCache;
use minicache_models::{DecodeStream, LogitsFor, Model, Step, Tokenizer};

use super::Result;
use super::numbers::{argmax, log_softmax};
use super::prefill::Prefill;

/// Beginnings shorter than this are not worth a prefill of their own.
const WORTH_SHARING: usize = 64;

/// What is asked about a prompt.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    /// Continue it greedily.
    Generate(Generation),
    /// Score these tokens (at least one) after it.
    Score(Vec<u32>),
}

/// Greedy generation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Generation {
    /// Ends before the first of these texts.
    pub(crate) until: Vec<String>,
    /// Tokens that end it.
    pub(crate) stop_ids: Vec<u32>,
    /// Tokens that may not come first.
    pub(crate) not_first: Vec<u32>,
    /// New tokens, at most.
    pub(crate) max_new_tokens: usize,
}

/// A prompt with what is asked about it.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    /// Whose it is: an index of the caller's.
    pub(crate) owner: usize,
    /// Its tokens, at least one.
    pub(crate) tokens: Vec<u32>,
    /// The asks, with an index of the caller's each.
    pub(crate) asks: Vec<(usize, Ask)>,
    /// Which of the caches to run it with.
    pub(crate) caches: Vec<usize>,
}

impl Prompt {
    /// Length that its longest sequence may come to.
    fn planned_len(&self) -> usize {
        let more = self.asks.iter().map(|(_, ask)| match ask {
            Ask::Generate(g) => g.max_new_tokens,
            Ask::Score(tokens) => tokens.len(),
        });
        self.tokens.len() + more.max().unwrap_or(0)
    }
}

/// The answer to one ask with one cache.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// The continuation, without the stop text.
    Text {
        /// As decoded, special tokens left out.
        text: String,
        /// Tokens generated.
        tokens: usize,
    },
    /// Sum of the log-probabilities of the tokens, in nats.
    LogLikelihood {
        /// The sum.
        sum: f64,
        /// Whether each of them was the most likely one.
        greedy: bool,
    },
}

/// An answer with where it belongs and what its cache came to.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    /// [`Prompt::owner`].
    pub(crate) owner: usize,
    /// Index of the ask.
    pub(crate) ask: usize,
    /// Index of the cache.
    pub(crate) cache: usize,
    /// The answer.
    pub(crate) answer: Answer,
    /// Footprint of the sequence's cache at its end.
    pub(crate) bytes: usize,
    /// The full FP16 cache of that length.
    pub(crate) full_bytes: usize,
}

/// How much may go on side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Sequences, at most.
    pub(crate) sequences: usize,
    /// Bytes of their caches, each counted as a full one of its final length. A single prompt may go beyond.
    pub(crate) bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sequences: 64, bytes: 2 << 30 }
    }
}

/// Runs all `prompts` with `caches` and hands every answer to `done` as it comes; `progress` hears of the tokens.
///
/// # Errors
/// Of the model, the caches and of `done`.
pub(crate) fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    caches: &[&CacheSpec],
    prompts: Vec<Prompt>,
    limits: Limits,
    progress: &dyn Fn(usize),
    done: &mut dyn FnMut(Finished) -> Result<()>,
) -> Result<()> {
    let mut waiting = prompts.into_iter().peekable();
    let mut active: Vec<Sequence<'_>> = Vec::new();
    let mut shared = Shared::default();
    loop {
        while waiting.peek().is_some_and(|p| active.is_empty() || fits(model, &active, p, limits)) {
            let Some(prompt) = waiting.next() else { break };
            let following = waiting.peek().map(|p| p.tokens.as_slice());
            active.extend(admit(model, tokenizer, caches, &prompt, following, &mut shared)?);
            progress(prompt.tokens.len());
            hand_over(model, &mut active, done)?;
        }
        if active.is_empty() {
            return Ok(());
        }
        let mut steps: Vec<Step<'_>> = active
            .iter_mut()
            .map(|s| Step {
                tokens: &s.next,
                cache: s.cache.as_mut(),
                planned_len: s.planned_len,
                logits: if matches!(s.doing, Doing::Scoring(_)) { LogitsFor::All } else { LogitsFor::Last },
            })
            .collect();
        let logits = model.decoder.forward(&mut steps)?;
        progress(active.len());
        for (sequence, logits) in active.iter_mut().zip(&logits) {
            sequence.take(logits)?;
        }
        hand_over(model, &mut active, done)?;
    }
}

/// One sequence on its way.
struct Sequence<'a> {
    owner: usize,
    ask: usize,
    cache_index: usize,
    cache: Box<dyn KvCache>,
    planned_len: usize,
    /// Tokens of the next step.
    next: Vec<u32>,
    doing: Doing<'a>,
}

enum Doing<'a> {
    Generating(Box<Writer<'a>>),
    /// The tokens that the last ones of the next step should predict.
    Scoring(Vec<u32>),
    Done(Answer),
}

impl Sequence<'_> {
    /// Takes in the logits of a step.
    fn take(&mut self, logits: &Tensor) -> Result<()> {
        match &mut self.doing {
            Doing::Generating(writer) => {
                let token = writer.choose(&logits.flatten_all()?.to_vec1::<f32>()?);
                self.push(token)
            }
            Doing::Scoring(targets) => {
                let rows = logits.to_vec2::<f32>()?;
                let first = rows.len() - targets.len();
                let (mut sum, mut greedy) = (0.0, true);
                for (mut row, &target) in rows.into_iter().skip(first).zip(targets.iter()) {
                    log_softmax(&mut row);
                    sum += f64::from(row[target as usize]);
                    greedy &= argmax(&row) == target as usize;
                }
                self.doing = Doing::Done(Answer::LogLikelihood { sum, greedy });
                Ok(())
            }
            Doing::Done(_) => Ok(()),
        }
    }

    /// Appends a generated token, or ends the generation with it.
    fn push(&mut self, token: u32) -> Result<()> {
        let Doing::Generating(writer) = &mut self.doing else { return Ok(()) };
        match writer.push(token)? {
            Some(answer) => self.doing = Doing::Done(answer),
            None => self.next = vec![token],
        }
        Ok(())
    }
}

/// Hands the answers of sequences that are done to `done`, and drops them.
fn hand_over(
    model: &Model,
    active: &mut Vec<Sequence<'_>>,
    done: &mut dyn FnMut(Finished) -> Result<()>,
) -> Result<()> {
    let (over, going): (Vec<_>, Vec<_>) =
        std::mem::take(active).into_iter().partition(|s| matches!(s.doing, Doing::Done(_)));
    *active = going;
    for s in over {
        let Doing::Done(answer) = s.doing else { continue };
        let bytes = s.cache.footprint().total();
        let full_bytes = model.decoder.shape().full_bytes(s.cache.len());
        done(Finished { owner: s.owner, ask: s.ask, cache: s.cache_index, answer, bytes, full_bytes })?;
    }
    Ok(())
}

/// Whether `prompt` may join.
fn fits(model: &Model, active: &[Sequence<'_>], prompt: &Prompt, limits: Limits) -> bool {
    let more = prompt.caches.len() * prompt.asks.len();
    let tokens = active.iter().map(|s| s.planned_len).sum::<usize>() + more * prompt.planned_len();
    active.len() + more <= limits.sequences && model.decoder.shape().full_bytes(1) * tokens <= limits.bytes
}

/// Prefills what of earlier prompts may serve the next one.
#[derive(Default)]
struct Shared {
    /// A beginning that several prompts have in common.
    beginning: Option<Prefill>,
    /// The prompt before this one.
    previous: Option<Prefill>,
}

impl Shared {
    /// The prefill of `tokens`, from the longest beginning at hand; prepares the one in common with `following`.
    fn prefill(
        &mut self,
        model: &Model,
        tokens: &[u32],
        planned_len: usize,
        following: Option<&[u32]>,
    ) -> Result<Prefill> {
        let common = |other: &[u32]| tokens.iter().zip(other).take_while(|(a, b)| a == b).count();
        // At least one token has to be left to compute logits from.
        let with_next = following.map_or(0, common).min(tokens.len() - 1);
        let known = self.beginning.as_ref().map_or(0, |p| common(p.tokens()));
        let serves = |p: &&Prefill| p.serves(model, tokens, planned_len);
        let at_hand = [&self.previous, &self.beginning].into_iter().flatten().filter(serves);
        let best = at_hand.max_by_key(|p| p.tokens().len()).cloned();
        let served = best.as_ref().map_or(0, |p| p.tokens().len());
        // A beginning that was too long for this prompt is cut to what they share, so that it soon is what all prompts
        // share. It grows again only by what is worth it, not by a word that two questions have in common.
        let grows = known < WORTH_SHARING || with_next >= known + WORTH_SHARING;
        let wanted = if grows { with_next } else { known.min(tokens.len() - 1) };
        let mut from = best;
        if wanted >= WORTH_SHARING && wanted > served {
            let beginning = Prefill::new(model, &tokens[..wanted], planned_len, from.as_ref())?;
            self.beginning = Some(beginning.clone());
            from = Some(beginning);
        }
        let whole = Prefill::new(model, tokens, planned_len, from.as_ref())?;
        self.previous = following.is_some_and(|f| f.starts_with(tokens)).then(|| whole.clone());
        Ok(whole)
    }
}

/// Prefills a prompt and makes its sequences.
fn admit<'a>(
    model: &Model,
    tokenizer: &'a Tokenizer,
    caches: &[&CacheSpec],
    prompt: &Prompt,
    following: Option<&[u32]>,
    shared: &mut Shared,
) -> Result<Vec<Sequence<'a>>> {
    let planned_len = prompt.planned_len();
    let mut out = Vec::new();
    let mut filled = |tokens: &[u32], following: Option<&[u32]>| -> Result<_> {
        let mut own: Vec<Box<dyn KvCache>> = prompt
            .caches
            .iter()
            .map(|&i| model.new_cache_for(caches[i], planned_len))
            .collect::<minicache_models::Result<_>>()?;
        let prefill = match tokens {
            [] => None,
            _ => Some(shared.prefill(model, tokens, planned_len, following)?),
        };
        if let Some(prefill) = &prefill {
            prefill.fill(&mut own)?;
        }
        Ok((own, prefill))
    };
    let sequence =
        |ask: usize, cache_index: usize, cache: Box<dyn KvCache>, next: Vec<u32>, doing: Doing<'a>| {
            Sequence { owner: prompt.owner, ask, cache_index, cache, planned_len, next, doing }
        };
    let generates = |ask: &Ask| matches!(ask, Ask::Generate(_));
    if prompt.asks.iter().any(|(_, a)| generates(a)) {
        let (own, prefill) = filled(&prompt.tokens, following)?;
        let logits = prefill.as_ref().map(|p| p.logits()).unwrap_or_default();
        for (cache, &index) in own.iter().zip(&prompt.caches) {
            for (ask, generation) in prompt.asks.iter().filter_map(|(i, a)| match a {
                Ask::Generate(g) => Some((*i, g)),
                Ask::Score(_) => None,
            }) {
                let writer = Writer::new(tokenizer, generation.clone());
                let first = writer.choose(logits);
                let mut s =
                    sequence(ask, index, cache.fork(), Vec::new(), Doing::Generating(Box::new(writer)));
                s.push(first)?;
                out.push(s);
            }
        }
    }
    if !prompt.asks.iter().all(|(_, a)| generates(a)) {
        // The last token of the context is fed together with the continuation, so that every prediction that is
        // scored reads the compressed cache.
        let (last, context) = prompt.tokens.split_last().map_or((None, &[][..]), |(l, c)| (Some(*l), c));
        let following = following.filter(|f| f.len() > context.len());
        let (own, _) = filled(context, following)?;
        for (cache, &index) in own.iter().zip(&prompt.caches) {
            for (ask, targets) in prompt.asks.iter().filter_map(|(i, a)| match a {
                Ask::Score(tokens) => Some((*i, tokens)),
                Ask::Generate(_) => None,
            }) {
                let fed = &targets[..targets.len().saturating_sub(1)];
                let next: Vec<u32> = last.iter().chain(fed).copied().collect();
                out.push(sequence(ask, index, cache.fork(), next, Doing::Scoring(targets.clone())));
            }
        }
    }
    Ok(out)
}

/// Collects a generated text and knows when it is over.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    stream: DecodeStream<'a>,
    settings: Generation,
    tokens: Vec<u32>,
    /// The text so far, as far as its characters are complete.
    text: String,
}

impl<'a> Writer<'a> {
    fn new(tokenizer: &'a Tokenizer, settings: Generation) -> Self {
        let stream = tokenizer.stream(true);
        Self { tokenizer, stream, settings, tokens: Vec::new(), text: String::new() }
    }

    /// The most likely token that may come now.
    fn choose(&self, logits: &[f32]) -> u32 {
        if !self.tokens.is_empty() || self.settings.not_first.is_empty() {
            return argmax(logits) as u32;
        }
        let mut allowed = logits.to_vec();
        for &id in &self.settings.not_first {
            if let Some(x) = allowed.get_mut(id as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
        argmax(&allowed) as u32
    }

    /// Takes a token; the answer where it is the last one.
    fn push(&mut self, token: u32) -> Result<Option<Answer>> {
        if self.settings.stop_ids.contains(&token) {
            return self.answer().map(Some);
        }
        self.tokens.push(token);
        let from = self.text.len();
        self.text.push_str(&self.stream.push(token)?);
        // A stop text may have begun in earlier tokens.
        let longest = self.settings.until.iter().map(String::len).max().unwrap_or(0);
        let start = floor_boundary(&self.text, from.saturating_sub(longest));
        let stopped =
            self.settings.until.iter().any(|stop| !stop.is_empty() && self.text[start..].contains(stop));
        if stopped || self.tokens.len() >= self.settings.max_new_tokens {
            return self.answer().map(Some);
        }
        Ok(None)
    }

    fn answer(&self) -> Result<Answer> {
        let text = self.tokenizer.decode(&self.tokens, true)?;
        let text = cut_at(&text, &self.settings.until).to_string();
        Ok(Answer::Text { text, tokens: self.tokens.len() })
    }
}

/// `text` up to the first of `stops`.
fn cut_at<'t>(text: &'t str, stops: &[String]) -> &'t str {
    let ends = stops.iter().filter(|s| !s.is_empty()).filter_map(|s| text.find(s.as_str()));
    &text[..ends.min().unwrap_or(text.len())]
}

/// The last character boundary of `text` at or before byte `at`.
fn floor_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_before_the_first_stop() {
        let stops = ["\n\n".to_string(), "Q:".to_string(), String::new()];
        assert_eq!(cut_at("a b Q: c\n\n", &stops), "a b ");
        assert_eq!(cut_at("a b", &stops), "a b");
        assert_eq!(floor_boundary("a\u{e9}b", 2), 1);
    }
}
