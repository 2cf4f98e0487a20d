//! Continuous batching: prompts are prefilled one after another, and their continuations, for every cache compared,
//! go through the model side by side. Sequences join as others finish; nothing waits for the longest.
//!
//! A prompt is computed once for all caches (see [`Prefill`]), and what prompts have in common is computed once: the
//! beginning that all prompts of a task share (instructions, few-shot examples), and the part of a story's turn that
//! the turn before it had. The choices of a question share its prefilled and compressed context.
//!
//! What a sequence computes does not depend on what goes beside it, so a run that was stopped ends as an undisturbed
//! one: products compute every row by itself, attention is cut by a sequence's own length, and what a prompt shares
//! follows from the data and not from what happens to be at hand.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use candle_core::Tensor;
use minicache_core::CacheSpec;
use minicache_core::KvCache;
use minicache_models::{DecodeStream, LogitsFor, Model, Step, Tokenizer};

use super::numbers::{argmax, log_softmax};
use super::prefill::Prefill;
use super::{Result, Stop};

/// Sequences in one decode step: more gain little, and their logits take memory.
const STEP_ROWS: usize = 48;

/// Beginnings shorter than this are not worth a prefill of their own.
const WORTH_SHARING: usize = 64;

/// Tokens at the end of a text that have to be repetitions of a few before it counts as a loop. Greedy decoding hardly
/// comes out of one that long.
pub(crate) const LOOP_TOKENS: usize = 96;

/// Tokens of the longest loop that is looked for.
const LONGEST_LOOP: usize = 24;

/// What is asked about a prompt.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    /// Continue it greedily.
    Generate(Generation),
    /// Score each of these continuations (at least one token each) after it.
    Score(Vec<Vec<u32>>),
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
    /// The context has no room for more than these, though more are asked for.
    pub(crate) fills_context: bool,
}

/// A prompt with what is asked about it.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    /// Whose it is: an index of the caller's. Prompts of one owner follow each other.
    pub(crate) owner: usize,
    /// Which of the owner's prompts it is.
    pub(crate) part: usize,
    /// Its tokens, at least one.
    pub(crate) tokens: Vec<u32>,
    /// How many of its first tokens other owners' prompts have too.
    pub(crate) beginning: usize,
    /// What is asked.
    pub(crate) ask: Ask,
    /// Which of the caches to run it with, at least one.
    pub(crate) caches: Vec<usize>,
}

impl Prompt {
    /// Length that its longest sequence may come to. The last token of a continuation to score is never fed.
    fn planned_len(&self) -> usize {
        let more = match &self.ask {
            Ask::Generate(g) => g.max_new_tokens,
            Ask::Score(continuations) => continuations.iter().map(|c| c.len() - 1).max().unwrap_or(0),
        };
        self.tokens.len() + more
    }

    /// Tokens that go through the model for it, at most: what [`run`] reports as progress in the end.
    pub(crate) fn work(&self) -> usize {
        let per_cache = match &self.ask {
            Ask::Generate(g) => g.max_new_tokens,
            Ask::Score(continuations) => continuations.iter().map(Vec::len).sum(),
        };
        self.tokens.len() + self.caches.len() * per_cache
    }
}

/// The answer to one prompt with one cache.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// The continuation as decoded, special tokens left out, without the stop text.
    Text(String),
    /// Sums of the log-probabilities of each continuation's tokens, in nats.
    LogLikelihoods(Vec<f64>),
}

/// An answer with where it belongs and what it took.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    /// [`Prompt::owner`].
    pub(crate) owner: usize,
    /// [`Prompt::part`].
    pub(crate) part: usize,
    /// Index of the cache.
    pub(crate) cache: usize,
    /// The answer.
    pub(crate) answer: Answer,
    /// What it took.
    pub(crate) cost: Cost,
}

/// What one or more sequences took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    /// Sequences.
    pub(crate) sequences: usize,
    /// Tokens generated or scored.
    pub(crate) tokens: usize,
    /// Texts that ended in a loop.
    pub(crate) loops: usize,
    /// Footprints of the sequences' caches at their ends.
    pub(crate) bytes: usize,
    /// Full FP16 caches of those lengths.
    pub(crate) full_bytes: usize,
    /// The sequences' share of the time, in seconds.
    pub(crate) seconds: f64,
}

impl Cost {
    fn of(model: &Model, cache: &dyn KvCache, tokens: usize) -> Self {
        let full_bytes = model.decoder.shape().full_bytes(cache.len());
        Self { sequences: 1, tokens, bytes: cache.footprint().total(), full_bytes, ..Self::default() }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.sequences += other.sequences;
        self.tokens += other.tokens;
        self.loops += other.loops;
        self.bytes += other.bytes;
        self.full_bytes += other.full_bytes;
        self.seconds += other.seconds;
    }
}

/// How much may go on side by side: constants, not the machine's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Sequences. A single prompt with more caches than that goes beyond.
    pub(crate) sequences: usize,
    /// Bytes of their caches, each counted as a full one of its final length. A single prompt may go beyond.
    pub(crate) bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sequences: STEP_ROWS, bytes: 2 << 30 }
    }
}

/// Runs all `prompts` with `caches` and hands every answer to `done` as it comes; `progress` hears of the tokens. Once
/// `stop` asks for it, what has no answer yet is dropped. Gives the owners of texts that ended because the context was
/// full.
///
/// # Errors
/// Of the model, the caches, of `done` and of `stop`.
#[allow(clippy::too_many_arguments)] // each is another thing, and there is one caller
pub(crate) fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    caches: &[&CacheSpec],
    prompts: Vec<Prompt>,
    limits: Limits,
    stop: &Stop,
    progress: &dyn Fn(usize),
    done: &mut dyn FnMut(Finished) -> Result<()>,
) -> Result<BTreeSet<usize>> {
    let mut full = BTreeSet::new();
    let mut waiting = VecDeque::from(prompts);
    let mut active: Vec<Sequence<'_>> = Vec::new();
    let mut shared = Shared::default();
    loop {
        while waiting.front().is_some_and(|p| active.is_empty() || fits(model, &active, p, limits)) {
            let Some(prompt) = waiting.pop_front() else { break };
            stop.check()?;
            let start = Instant::now();
            let filled = fill(model, caches, &prompt, waiting.front(), &mut shared)?;
            match &prompt.ask {
                Ask::Generate(generation) => {
                    let from = active.len();
                    active.extend(begin(tokenizer, &prompt, generation, filled)?);
                    share_time(&mut active[from..], start);
                    progress(prompt.tokens.len() + prompt.caches.len());
                    hand_over(model, &mut active, &mut full, progress, done)?;
                }
                Ask::Score(continuations) => {
                    let prefill = start.elapsed().as_secs_f64() / prompt.caches.len() as f64;
                    for (cache, &index) in filled.caches.iter().zip(&prompt.caches) {
                        let start = Instant::now();
                        let (answer, mut cost) = score(model, &prompt, continuations, cache.as_ref())?;
                        cost.seconds = prefill + start.elapsed().as_secs_f64();
                        let (owner, part) = (prompt.owner, prompt.part);
                        done(Finished { owner, part, cache: index, answer, cost })?;
                    }
                    progress(prompt.work());
                }
            }
        }
        if active.is_empty() {
            return Ok(full);
        }
        stop.check()?;
        for group in active.chunks_mut(STEP_ROWS) {
            let start = Instant::now();
            let mut steps: Vec<Step<'_>> = group.iter_mut().map(Sequence::step).collect();
            let logits = model.decoder.forward(&mut steps)?;
            for (sequence, logits) in group.iter_mut().zip(&logits) {
                sequence.take(&logits.flatten_all()?.to_vec1::<f32>()?)?;
            }
            progress(group.len());
            share_time(group, start);
        }
        hand_over(model, &mut active, &mut full, progress, done)?;
    }
}

/// A text being generated.
struct Sequence<'a> {
    owner: usize,
    part: usize,
    cache_index: usize,
    cache: Box<dyn KvCache>,
    planned_len: usize,
    /// The token of the next step.
    next: [u32; 1],
    writer: Writer<'a>,
    answer: Option<String>,
    seconds: f64,
}

impl Sequence<'_> {
    fn step(&mut self) -> Step<'_> {
        Step {
            tokens: &self.next,
            cache: self.cache.as_mut(),
            planned_len: self.planned_len,
            logits: LogitsFor::Last,
        }
    }

    /// Takes in the logits after its last token.
    fn take(&mut self, logits: &[f32]) -> Result<()> {
        let token = self.writer.choose(logits);
        self.next = [token];
        self.answer = self.writer.push(token)?;
        Ok(())
    }
}

/// Splits the time since `start` among `sequences`.
fn share_time(sequences: &mut [Sequence<'_>], start: Instant) {
    let share = start.elapsed().as_secs_f64() / sequences.len().max(1) as f64;
    sequences.iter_mut().for_each(|s| s.seconds += share);
}

/// Hands the answers of sequences that are over to `done`, and drops them; the owners of those that ran out of context
/// go to `full`.
fn hand_over(
    model: &Model,
    active: &mut Vec<Sequence<'_>>,
    full: &mut BTreeSet<usize>,
    progress: &dyn Fn(usize),
    done: &mut dyn FnMut(Finished) -> Result<()>,
) -> Result<()> {
    let (over, going): (Vec<_>, Vec<_>) =
        std::mem::take(active).into_iter().partition(|s| s.answer.is_some());
    *active = going;
    for s in over {
        let tokens = s.writer.tokens.len();
        if s.writer.ran_out() {
            full.insert(s.owner);
        }
        let loops = s.writer.loops.into();
        let cost = Cost { loops, seconds: s.seconds, ..Cost::of(model, s.cache.as_ref(), tokens) };
        // What it did not come to is done too.
        progress(s.writer.settings.max_new_tokens.saturating_sub(tokens.max(1)));
        let answer = Answer::Text(s.answer.unwrap_or_default());
        done(Finished { owner: s.owner, part: s.part, cache: s.cache_index, answer, cost })?;
    }
    Ok(())
}

/// Whether `prompt` may join.
fn fits(model: &Model, active: &[Sequence<'_>], prompt: &Prompt, limits: Limits) -> bool {
    let more = prompt.caches.len();
    let tokens = active.iter().map(|s| s.planned_len).sum::<usize>() + more * prompt.planned_len();
    active.len() + more <= limits.sequences && model.decoder.shape().full_bytes(1) * tokens <= limits.bytes
}

/// Prefills that later prompts go on from.
#[derive(Default)]
struct Shared {
    /// The beginning of a task's prompts.
    beginning: Option<Prefill>,
    /// The prompt before this one, of the same owner.
    previous: Option<(usize, Prefill)>,
}

impl Shared {
    /// The prefill of the first `tokens` tokens of `prompt`, at least one.
    fn prefill(
        &mut self,
        model: &Model,
        prompt: &Prompt,
        tokens: usize,
        next: Option<&Prompt>,
    ) -> Result<Prefill> {
        let (tokens, planned_len) = (&prompt.tokens[..tokens], prompt.planned_len());
        let previous = self.previous.take().filter(|(owner, _)| *owner == prompt.owner).map(|(_, p)| p);
        let mut from = previous.filter(|p| p.serves(model, tokens, planned_len));
        let wanted = prompt.beginning.min(tokens.len() - 1);
        if from.is_none() && wanted >= WORTH_SHARING {
            let known = self.beginning.take();
            let serves =
                |p: &Prefill| p.tokens() == &tokens[..wanted] && p.serves(model, tokens, planned_len);
            let beginning = match known.filter(serves) {
                Some(known) => known,
                None => Prefill::new(model, &tokens[..wanted], planned_len, None)?,
            };
            self.beginning = Some(beginning.clone());
            from = Some(beginning);
        }
        let whole = Prefill::new(model, tokens, planned_len, from.as_ref())?;
        let goes_on = |n: &Prompt| n.owner == prompt.owner && n.tokens.starts_with(tokens);
        self.previous = next.is_some_and(goes_on).then(|| (prompt.owner, whole.clone()));
        Ok(whole)
    }
}

/// A prompt's caches with the prompt in them.
struct Filled {
    caches: Vec<Box<dyn KvCache>>,
    /// Logits after the prompt's last token, where that is in the caches.
    logits: Vec<f32>,
}

/// Prefills a prompt. Of a context to be scored after, the last token is left out: fed together with the continuation
/// it makes every prediction that counts read the compressed cache.
fn fill(
    model: &Model,
    caches: &[&CacheSpec],
    prompt: &Prompt,
    next: Option<&Prompt>,
    shared: &mut Shared,
) -> Result<Filled> {
    let planned_len = prompt.planned_len();
    let specs: Vec<&CacheSpec> = prompt.caches.iter().map(|&index| caches[index]).collect();
    let new = |spec: &&CacheSpec| model.new_cache_for(spec, planned_len);
    let mut own: Vec<Box<dyn KvCache>> = specs.iter().map(new).collect::<minicache_models::Result<_>>()?;
    let filled = match prompt.ask {
        Ask::Generate(_) => prompt.tokens.len(),
        Ask::Score(_) => prompt.tokens.len() - 1,
    };
    let mut logits = Vec::new();
    if filled > 0 {
        let prefill = shared.prefill(model, prompt, filled, next)?;
        prefill.fill(&mut own, &specs)?;
        logits.extend_from_slice(prefill.logits());
    }
    Ok(Filled { caches: own, logits })
}

/// The sequences of a prompt that is to be continued, each with its first new token.
fn begin<'a>(
    tokenizer: &'a Tokenizer,
    prompt: &Prompt,
    generation: &Generation,
    filled: Filled,
) -> Result<Vec<Sequence<'a>>> {
    let sequence = |(cache, &cache_index): (Box<dyn KvCache>, &usize)| {
        let mut sequence = Sequence {
            owner: prompt.owner,
            part: prompt.part,
            cache_index,
            cache,
            planned_len: prompt.planned_len(),
            next: [0],
            writer: Writer::new(tokenizer, generation.clone()),
            answer: None,
            seconds: 0.0,
        };
        sequence.take(&filled.logits)?;
        Ok(sequence)
    };
    filled.caches.into_iter().zip(&prompt.caches).map(sequence).collect()
}

/// The log-likelihoods of all continuations after the context in `cache`, in one step.
fn score(
    model: &Model,
    prompt: &Prompt,
    continuations: &[Vec<u32>],
    cache: &dyn KvCache,
) -> Result<(Answer, Cost)> {
    let last = &prompt.tokens[prompt.tokens.len() - 1..];
    let fed: Vec<Vec<u32>> = continuations.iter().map(|c| [last, &c[..c.len() - 1]].concat()).collect();
    let mut forks: Vec<Box<dyn KvCache>> = continuations.iter().map(|_| cache.fork()).collect();
    let planned_len = prompt.planned_len();
    let mut steps: Vec<Step<'_>> = forks
        .iter_mut()
        .zip(&fed)
        .map(|(cache, tokens)| Step { tokens, cache: cache.as_mut(), planned_len, logits: LogitsFor::All })
        .collect();
    let logits = model.decoder.forward(&mut steps)?;
    let sums = logits.iter().zip(continuations).map(|(l, c)| log_likelihood(l, c)).collect::<Result<_>>()?;
    let mut cost = Cost::default();
    for (cache, continuation) in forks.iter().zip(continuations) {
        cost += Cost::of(model, cache.as_ref(), continuation.len());
    }
    Ok((Answer::LogLikelihoods(sums), cost))
}

/// Sum of the log-probabilities of `targets` in the rows of `logits` (targets, vocabulary).
fn log_likelihood(logits: &Tensor, targets: &[u32]) -> Result<f64> {
    let mut sum = 0.0;
    for (mut row, &target) in logits.to_vec2::<f32>()?.into_iter().zip(targets) {
        log_softmax(&mut row);
        sum += f64::from(row[target as usize]);
    }
    Ok(sum)
}

/// Collects a generated text and knows when it is over.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    stream: DecodeStream<'a>,
    settings: Generation,
    tokens: Vec<u32>,
    /// The text so far, as far as its characters are complete.
    text: String,
    /// It came to a stop text or a stop token.
    stopped: bool,
    /// It came to say the same over and over.
    loops: bool,
}

impl<'a> Writer<'a> {
    fn new(tokenizer: &'a Tokenizer, settings: Generation) -> Self {
        let stream = tokenizer.stream(true);
        let (tokens, text) = (Vec::new(), String::new());
        Self { tokenizer, stream, settings, tokens, text, stopped: false, loops: false }
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

    /// Takes a token; the whole text where it is the last one.
    fn push(&mut self, token: u32) -> Result<Option<String>> {
        if self.settings.stop_ids.contains(&token) {
            self.stopped = true;
            return self.answer().map(Some);
        }
        self.tokens.push(token);
        let from = self.text.len();
        self.text.push_str(&self.stream.push(token)?);
        // A stop text may have begun in earlier tokens.
        let longest = self.settings.until.iter().map(String::len).max().unwrap_or(0);
        let start = floor_boundary(&self.text, from.saturating_sub(longest));
        self.stopped =
            self.settings.until.iter().any(|stop| !stop.is_empty() && self.text[start..].contains(stop));
        let long = self.tokens.len() >= self.settings.max_new_tokens;
        self.loops = !self.stopped && !long && period(&self.tokens).is_some();
        if self.stopped || long || self.loops { self.answer().map(Some) } else { Ok(None) }
    }

    /// Whether it is as long as the context allows, and not at its end.
    fn ran_out(&self) -> bool {
        self.settings.fills_context && !self.stopped && !self.loops
    }

    /// The whole text. A loop is scored as what it would have become: itself, up to the most tokens that were asked for.
    fn answer(&self) -> Result<String> {
        let mut tokens = self.tokens.clone();
        if let Some(period) = period(&tokens).filter(|_| self.loops) {
            (tokens.len()..self.settings.max_new_tokens).for_each(|at| tokens.push(tokens[at - period]));
        }
        let text = self.tokenizer.decode(&tokens, true)?;
        Ok(cut_at(&text, &self.settings.until).to_string())
    }
}

/// The number of tokens over and over again at the end of `tokens`, where the last [`LOOP_TOKENS`] are nothing else.
fn period(tokens: &[u32]) -> Option<usize> {
    let tail = &tokens[tokens.len().checked_sub(LOOP_TOKENS)?..];
    (1..=LONGEST_LOOP).find(|&period| tail[period..] == tail[..LOOP_TOKENS - period])
}

/// `text` up to the first of `stops`, each in turn looked for in what the one before it left, as in the harness.
fn cut_at<'t>(text: &'t str, stops: &[String]) -> &'t str {
    let cut = |text: &'t str, stop: &String| text.split_once(stop.as_str()).map_or(text, |(head, _)| head);
    stops.iter().filter(|stop| !stop.is_empty()).fold(text, cut)
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
    fn loops_are_long_repetitions() {
        let of = |period: usize, length: usize| -> Vec<u32> {
            [5, 6, 7].into_iter().chain((0..length).map(|i| (i % period) as u32)).collect()
        };
        assert_eq!(period(&of(1, LOOP_TOKENS)), Some(1));
        assert_eq!(period(&of(LONGEST_LOOP, LOOP_TOKENS)), Some(LONGEST_LOOP));
        assert_eq!(period(&of(7, LOOP_TOKENS - 1)), None);
        assert_eq!(period(&of(LONGEST_LOOP + 1, 2 * LOOP_TOKENS)), None);
        assert_eq!(period(&[]), None);
        let mut broken = of(3, 2 * LOOP_TOKENS);
        let last = broken.len() - 40;
        broken[last] = 9;
        assert_eq!(period(&broken), None);
    }

    #[test]
    fn text_ends_before_the_first_stop() {
        let stops = ["\n\n".to_string(), "Q:".to_string(), String::new()];
        assert_eq!(cut_at("a b Q: c\n\n", &stops), "a b ");
        assert_eq!(cut_at("a b", &stops), "a b");
        assert_eq!(floor_boundary("a\u{e9}b", 2), 1);
    }
}
