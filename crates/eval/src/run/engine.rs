//! Continuous batching: prompts are prefilled one after another, and their continuations, for every cache compared,
//! go through the model side by side. Sequences join as others finish; nothing waits for the longest.
//!
//! A prompt is computed once for all caches (see [`Prefill`]), and what prompts have in common is computed once: the
//! beginning that all prompts of a task share (instructions, few-shot examples), and the part of a story's turn that
//! the turn before it had. The choices of a question share its prefilled and compressed context.
//!
//! What a sequence computes does not depend on what goes beside it, so a run that was stopped ends as an undisturbed
//! one: products compute every row by itself, attention is cut by a sequence's own length, and what a prompt shares
//! follows from the data and not from what happens to be at hand. (On a GPU the library of matrix products may round
//! otherwise for other numbers of rows.)

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use minicache_core::{CacheSpec, Sequence};
use minicache_models::{LogitsFor, Model, Step, Tokenizer};

use super::numbers::log_softmax;
use super::prefill::Prefill;
use super::writer::{Generation, Writer};
use super::{Result, Stop};

/// Sequences in one decode step: more gain little, and their logits take memory.
const STEP_ROWS: usize = 48;

/// The same on a GPU, which takes as long for one sequence as for many.
const GPU_STEP_ROWS: usize = 256;

/// Beginnings shorter than this are not worth a prefill of their own.
const WORTH_SHARING: usize = 64;

/// What is asked about a prompt.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    /// Continue it greedily.
    Generate(Generation),
    /// Score each of these continuations (at least one token each) after it.
    Score(Vec<Vec<u32>>),
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
    fn of(sequence: &Sequence, tokens: usize) -> Self {
        let full_bytes = sequence.shape().full_bytes(sequence.len());
        Self { sequences: 1, tokens, bytes: sequence.footprint().total(), full_bytes, ..Self::default() }
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

/// How much may go on side by side: constants, not the machine's (but for a GPU's memory).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Sequences in one decode step.
    pub(crate) rows: usize,
    /// Sequences. A single prompt with more caches than that goes beyond.
    pub(crate) sequences: usize,
    /// Bytes of their caches, each counted as a full one of its final length. A single prompt may go beyond.
    pub(crate) bytes: usize,
}

impl Limits {
    /// Those of `model`, with at most `batch` sequences where a number is given.
    ///
    /// # Errors
    /// Of a GPU.
    pub(crate) fn of(model: &Model, batch: Option<usize>) -> Result<Self> {
        let limits = match model.decoder.free_memory()? {
            None => Self::default(),
            Some(free) => Self { rows: GPU_STEP_ROWS, sequences: GPU_STEP_ROWS, bytes: free as usize / 2 },
        };
        Ok(Self { sequences: batch.unwrap_or(limits.sequences), ..limits })
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { rows: STEP_ROWS, sequences: STEP_ROWS, bytes: 2 << 30 }
    }
}

/// Runs all `prompts` with `caches` and hands every answer to `done` as it comes; `progress` hears of the tokens. Once
/// `stop` asks for it, only prompts of owners that have begun are; what has no answer when that takes too long is dropped.
/// Gives the owners of texts that ended because the context was full.
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
    let mut active: Vec<Writing<'_>> = Vec::new();
    let mut shared = Shared::default();
    let (mut begun, mut given_up) = (None, false);
    loop {
        while waiting.front().is_some_and(|p| active.is_empty() || fits(model, &active, p, limits)) {
            let Some(prompt) = waiting.pop_front() else { break };
            if stop.signal().is_some() && begun != Some(prompt.owner) {
                waiting.clear();
                given_up = true;
                break;
            }
            stop.check_grace()?;
            begun = Some(prompt.owner);
            let start = Instant::now();
            let filled = fill(model, caches, &prompt, waiting.front(), &mut shared)?;
            match &prompt.ask {
                Ask::Generate(generation) => {
                    let from = active.len();
                    active.extend(begin(tokenizer, &prompt, generation, filled)?);
                    share_time(&mut active[from..], start);
                    progress(prompt.tokens.len() + prompt.caches.len());
                    hand_over(&mut active, &mut full, progress, done)?;
                }
                Ask::Score(continuations) => {
                    let prefill = start.elapsed().as_secs_f64() / prompt.caches.len() as f64;
                    for (context, &index) in filled.sequences.iter().zip(&prompt.caches) {
                        let start = Instant::now();
                        let (answer, mut cost) = score(model, &prompt, continuations, context)?;
                        cost.seconds = prefill + start.elapsed().as_secs_f64();
                        let (owner, part) = (prompt.owner, prompt.part);
                        done(Finished { owner, part, cache: index, answer, cost })?;
                    }
                    progress(prompt.work());
                }
            }
        }
        if active.is_empty() {
            if given_up {
                stop.check()?;
            }
            return Ok(full);
        }
        stop.check_grace()?;
        for group in active.chunks_mut(limits.rows) {
            let start = Instant::now();
            let mut steps: Vec<Step<'_>> = group.iter_mut().map(Writing::step).collect();
            let tokens = model.decoder.forward_greedy(&mut steps)?;
            for (writing, token) in group.iter_mut().zip(tokens) {
                writing.take(token)?;
            }
            progress(group.len());
            share_time(group, start);
        }
        hand_over(&mut active, &mut full, progress, done)?;
    }
}

/// A text being generated.
struct Writing<'a> {
    owner: usize,
    part: usize,
    cache_index: usize,
    sequence: Sequence,
    /// The token of the next step.
    next: [u32; 1],
    writer: Writer<'a>,
    answer: Option<String>,
    seconds: f64,
}

impl Writing<'_> {
    fn step(&mut self) -> Step<'_> {
        Step { tokens: &self.next, sequence: &mut self.sequence, logits: LogitsFor::Last }
    }

    /// Takes in the token after its last one.
    fn take(&mut self, token: u32) -> Result<()> {
        self.next = [token];
        self.answer = self.writer.push(token)?;
        Ok(())
    }
}

/// Splits the time since `start` among `sequences`.
fn share_time(sequences: &mut [Writing<'_>], start: Instant) {
    let share = start.elapsed().as_secs_f64() / sequences.len().max(1) as f64;
    sequences.iter_mut().for_each(|s| s.seconds += share);
}

/// Hands the answers of sequences that are over to `done`, and drops them; the owners of those that ran out of context
/// go to `full`.
fn hand_over(
    active: &mut Vec<Writing<'_>>,
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
        let cost = Cost { loops, seconds: s.seconds, ..Cost::of(&s.sequence, tokens) };
        // What it did not come to is done too.
        progress(s.writer.settings.max_new_tokens.saturating_sub(tokens.max(1)));
        let answer = Answer::Text(s.answer.unwrap_or_default());
        done(Finished { owner: s.owner, part: s.part, cache: s.cache_index, answer, cost })?;
    }
    Ok(())
}

/// Whether `prompt` may join.
fn fits(model: &Model, active: &[Writing<'_>], prompt: &Prompt, limits: Limits) -> bool {
    let more = prompt.caches.len();
    let tokens = active.iter().map(|s| s.sequence.planned_len()).sum::<usize>() + more * prompt.planned_len();
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

/// Sequences with a prompt in their caches.
struct Filled {
    sequences: Vec<Sequence>,
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
    let new = |spec: &&CacheSpec| model.sequence(spec, planned_len);
    let mut sequences: Vec<Sequence> = specs.iter().map(new).collect::<minicache_models::Result<_>>()?;
    let filled = match prompt.ask {
        Ask::Generate(_) => prompt.tokens.len(),
        Ask::Score(_) => prompt.tokens.len() - 1,
    };
    let mut logits = Vec::new();
    if filled > 0 {
        match model.decoder.fill_on_gpu(&prompt.tokens[..filled], &specs, &mut sequences)? {
            Some(last) => logits = last,
            None => {
                let prefill = shared.prefill(model, prompt, filled, next)?;
                prefill.fill(&mut sequences, &specs)?;
                logits.extend_from_slice(prefill.logits());
            }
        }
    }
    Ok(Filled { sequences, logits })
}

/// The sequences of a prompt that is to be continued, each with its first new token.
fn begin<'a>(
    tokenizer: &'a Tokenizer,
    prompt: &Prompt,
    generation: &Generation,
    filled: Filled,
) -> Result<Vec<Writing<'a>>> {
    let begin = |(sequence, &cache_index): (Sequence, &usize)| {
        let mut writing = Writing {
            owner: prompt.owner,
            part: prompt.part,
            cache_index,
            sequence,
            next: [0],
            writer: Writer::new(tokenizer, generation.clone()),
            answer: None,
            seconds: 0.0,
        };
        writing.take(writing.writer.first(&filled.logits))?;
        Ok(writing)
    };
    filled.sequences.into_iter().zip(&prompt.caches).map(begin).collect()
}

/// The log-likelihoods of all continuations after `context`, in one step.
fn score(
    model: &Model,
    prompt: &Prompt,
    continuations: &[Vec<u32>],
    context: &Sequence,
) -> Result<(Answer, Cost)> {
    let last = &prompt.tokens[prompt.tokens.len() - 1..];
    let fed: Vec<Vec<u32>> = continuations.iter().map(|c| [last, &c[..c.len() - 1]].concat()).collect();
    let mut forks: Vec<Sequence> = continuations.iter().map(|_| context.fork()).collect();
    let step = |(sequence, tokens)| Step { tokens, sequence, logits: LogitsFor::All };
    let mut steps: Vec<Step<'_>> = forks.iter_mut().zip(fed.iter().map(Vec::as_slice)).map(step).collect();
    let logits = model.decoder.forward(&mut steps)?;
    let vocab = logits.vocab();
    let sums = logits.iter().zip(continuations).map(|(l, c)| log_likelihood(l, vocab, c)).collect();
    let mut cost = Cost::default();
    for (sequence, continuation) in forks.iter().zip(continuations) {
        cost += Cost::of(sequence, continuation.len());
    }
    Ok((Answer::LogLikelihoods(sums), cost))
}

/// Sum of the log-probabilities of `targets` in the rows of `logits` (targets, vocab).
fn log_likelihood(logits: &[f32], vocab: usize, targets: &[u32]) -> f64 {
    let mut row = vec![0.0; vocab];
    let mut sum = 0.0;
    for (logits, &target) in logits.chunks_exact(vocab).zip(targets) {
        row.copy_from_slice(logits);
        log_softmax(&mut row);
        sum += f64::from(row[target as usize]);
    }
    sum
}
