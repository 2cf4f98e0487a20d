//! `kind = "accuracy"`: tasks as the field scores them, with every cache.
//!
//! All caches of one model and task go through the model together: a prompt is prefilled once, exactly, and handed to
//! every cache, which compresses it; then each goes on with its own answer. Choices are scored through the compressed
//! cache as well: the context is prefilled and compressed, and its last token is fed together with the continuation,
//! whose tokens read the compressed context (and, within that one step, each other exactly). One forward pass over
//! context and continuation, as it is usual for choices, would read no compressed state at all and find every cache
//! equal.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use minicache_config::Experiment;
use serde::{Deserialize, Serialize};

use super::engine::{self, Answer, Cost, Finished, Limits};
use super::input::Input;
use super::numbers::{number, seconds};
use super::plan::{Plan, Planned};
use super::prompts::Prompter;
use super::work::Work;
use super::{Result, RunError};
use crate::metrics::Interval;
use crate::store::{Row, Samples, Store, digest};
use crate::tasks::{Aggregate, Document, Output, Overflow, Reference, Request, Suite, Tally};

/// Characters of a token, for estimates.
const CHARS_PER_TOKEN: usize = 4;

/// One document's answer with one cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sample {
    id: String,
    task: String,
    prediction: Output,
    reference: Reference,
    /// Metrics by the names of their columns.
    scores: IndexMap<String, Tally>,
    /// Sequences: turns or choices, otherwise one.
    sequences: usize,
    /// Tokens generated or scored.
    tokens: usize,
    /// Texts that ended in a loop (see [`super::writer::LOOP_TOKENS`]).
    loops: usize,
    /// Footprint of the sequences' caches at their ends.
    bytes: usize,
    /// The full FP16 caches of those lengths.
    full_bytes: usize,
    /// This cache's share of the time.
    seconds: f64,
}

/// The columns of an experiment over `inputs`: the main score of every row with its interval, its difference from the
/// full cache's on the same samples with that of the paired bootstrap, each metric of each task, and what it took.
pub(crate) fn columns<'a>(inputs: impl Iterator<Item = &'a Input>) -> Vec<String> {
    let first = ["score", "score_lo", "score_hi", "diff", "diff_lo", "diff_hi"];
    let mut columns = first.map(str::to_string).to_vec();
    for metric in inputs.flat_map(Input::metrics) {
        if !columns.contains(&metric) {
            columns.push(metric);
        }
    }
    columns.extend(["ratio", "bytes", "samples", "tokens", "loops", "seconds"].map(str::to_string));
    columns
}

/// Tokens that go through the model for `cells`, at most, by the length of the prompts' texts.
pub(crate) fn tokens(plan: &Plan<'_>, cells: &[&Planned]) -> usize {
    let mut groups: Vec<(&Planned, usize)> = Vec::new();
    for p in cells {
        let same = |q: &Planned| q.cell.task == p.cell.task && q.is_of(&p.cell.model, &p.cell.settings);
        match groups.iter_mut().find(|(q, _)| same(q)) {
            Some((_, caches)) => *caches += 1,
            None => groups.push((p, 1)),
        }
    }
    groups.iter().map(|(p, caches)| requests(plan, &p.cell.task, *caches)).sum()
}

/// Tokens of the prompts of `task`, which all caches have in common, by the length of their texts.
pub(crate) fn common_tokens(plan: &Plan<'_>, task: &str) -> usize {
    requests(plan, task, 0)
}

/// Tokens that one cache of `task` has for itself, at most.
pub(crate) fn own_tokens(plan: &Plan<'_>, task: &str) -> usize {
    requests(plan, task, 1) - requests(plan, task, 0)
}

fn requests(plan: &Plan<'_>, task: &str, caches: usize) -> usize {
    let limit = plan.experiment.accuracy.prompt_tokens.unwrap_or(usize::MAX);
    let documents = plan.inputs.get(task).map_or(&[][..], Input::documents);
    let all: usize = documents.iter().map(|d| estimate(&d.request, caches, limit)).sum();
    // What all prompts of a task begin with goes through the model once.
    let mut beginnings: IndexMap<&str, (&str, usize)> = IndexMap::new();
    for document in documents {
        let text = beginning(&document.request);
        let (shared, count) = beginnings.entry(document.task).or_insert((text, 0));
        let same = shared.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        *shared = &shared[..(0..=same).rev().find(|&at| shared.is_char_boundary(at)).unwrap_or(0)];
        *count += 1;
    }
    let again = |(shared, count): &(&str, usize)| (shared.len() / CHARS_PER_TOKEN).min(limit) * (count - 1);
    all.saturating_sub(beginnings.values().map(again).sum())
}

/// The text of a request's prompt that others may begin with too.
fn beginning(request: &Request) -> &str {
    match request {
        Request::Generate(g) => &g.prompt,
        Request::Turns(t) => t.prompts.first().map_or("", String::as_str),
        Request::Choices(choices) => choices.first().map_or("", |c| &c.context),
    }
}

/// Tokens of one request with `caches` caches.
fn estimate(request: &Request, caches: usize, limit: usize) -> usize {
    let length = |text: &str| text.len() / CHARS_PER_TOKEN;
    match request {
        Request::Generate(g) => {
            let limit = if g.overflow == Overflow::CutMiddle { limit } else { usize::MAX };
            length(&g.prompt).min(limit) + caches * g.max_new_tokens
        }
        // Every turn goes on from the one before it.
        Request::Turns(t) => {
            t.prompts.last().map_or(0, |p| length(p)) + caches * t.prompts.len() * t.max_new_tokens
        }
        Request::Choices(choices) => {
            let context = choices.first().map_or(0, |c| length(&c.context));
            context + caches * choices.iter().map(|c| length(&c.continuation)).sum::<usize>()
        }
    }
}

/// Runs the open cells of one task.
pub(crate) fn run(work: &Work<'_>, suite: &Suite, documents: &[Document], store: &mut Store) -> Result<()> {
    let model = work.model;
    let prompter = Prompter::new(model, work.experiment.accuracy.prompt_tokens)?;
    let mut open: Vec<Cell<'_>> = Vec::new();
    let of: Vec<String> = documents.iter().map(digest).collect();
    for planned in work.cells {
        let samples: Samples<Sample> = store.samples(&planned.key, of.clone())?;
        open.push(Cell { suite, documents, samples, parts: BTreeMap::new() });
    }
    let mut prompts = prompter.all(documents, open.len())?;
    let parts = prompts.iter().fold(vec![0; documents.len()], |mut parts, p| {
        parts[p.owner] += 1;
        parts
    });
    let total: usize = prompts.iter().map(engine::Prompt::work).sum();
    for prompt in &mut prompts {
        prompt.caches.retain(|&c| !open[c].samples.has(prompt.owner));
    }
    prompts.retain(|p| !p.caches.is_empty());
    let left: usize = prompts.iter().map(engine::Prompt::work).sum();
    let progress = work.progress(total);
    progress.resume(total - left);
    let caches: Vec<_> = work.cells.iter().map(|p| &p.cell.cache).collect();
    let full = engine::run(
        model,
        work.tokenizer()?,
        &caches,
        prompts,
        Limits::of(model, work.experiment.accuracy.batch)?,
        work.stop,
        &|tokens| progress.add(tokens),
        &mut |finished| {
            let cell = finished.cache;
            let place = |e: RunError| e.in_cell(work.cells[cell].cell.variant.clone());
            open[cell].take(finished, &parts).map_err(place)
        },
    )?;
    for cell in &mut open {
        cell.samples.settle()?;
    }
    if !full.is_empty() {
        let (count, of) = (full.len(), documents.len());
        let what = format!("{count} of {of} samples end because the model's context is full");
        work.overall.warn(format_args!("{} {}: {what}", work.cells[0].cell.model, suite.name));
    }
    drop(open);
    store.refresh()?;
    let unfinished = |r: &&Planned| !store.is_done(&r.key) && !work.cells.iter().any(|p| p.key == r.key);
    if work.reference.as_ref().is_some_and(unfinished) {
        // Another run computes what these are compared with.
        return Ok(());
    }
    conclude(work.experiment, suite, documents, work.cells, work.reference, store)
}

/// Finishes those of `cells` that have all of their samples, of `documents`, with the full cache's cell `reference` to
/// compare with.
pub(crate) fn conclude(
    experiment: &Experiment,
    suite: &Suite,
    documents: &[Document],
    cells: &[&Planned],
    reference: Option<&Planned>,
    store: &mut Store,
) -> Result<()> {
    let of: Vec<String> = documents.iter().map(digest).collect();
    let full: Option<Samples<Sample>> = reference.map(|r| store.samples(&r.key, of.clone())).transpose()?;
    let mut rows = Vec::with_capacity(cells.len());
    for planned in cells {
        let own: Samples<Sample> = store.samples(&planned.key, of.clone())?;
        if own.is_whole() {
            let other = reference.filter(|r| r.key != planned.key).and(full.as_ref());
            let others = other.map_or_else(Vec::new, |r| r.iter().collect());
            let row = row(suite, &own.iter().collect::<Vec<_>>(), &others, experiment.seed);
            rows.push((planned.key.clone(), vec![row]));
        }
    }
    Ok(store.finish(rows)?)
}

/// One cell while it is computed.
struct Cell<'a> {
    suite: &'a Suite,
    documents: &'a [Document],
    samples: Samples<Sample>,
    /// Answers by document and part, of documents that lack others.
    parts: BTreeMap<usize, BTreeMap<usize, (Answer, Cost)>>,
}

impl Cell<'_> {
    /// Takes an answer in, and writes the sample where that makes it whole.
    fn take(&mut self, finished: Finished, parts: &[usize]) -> Result<()> {
        let Finished { owner, part, answer, cost, .. } = finished;
        let answers = self.parts.entry(owner).or_default();
        answers.insert(part, (answer, cost));
        if answers.len() == parts[owner] {
            let answers = self.parts.remove(&owner).unwrap_or_default();
            let sample = self.sample(owner, answers.into_values())?;
            self.samples.put([(owner, sample)])?;
        }
        Ok(())
    }

    /// The sample of a document with its answers in order.
    fn sample(&self, document: usize, answers: impl Iterator<Item = (Answer, Cost)>) -> Result<Sample> {
        let document = &self.documents[document];
        let mut cost = Cost::default();
        let (mut texts, mut sums) = (Vec::new(), Vec::new());
        for (answer, took) in answers {
            cost += took;
            match answer {
                Answer::Text(text) => texts.push(text),
                Answer::LogLikelihoods(more) => sums.extend(more),
            }
        }
        let prediction = match document.request {
            Request::Choices(_) => Output::LogLikelihoods(sums),
            Request::Generate(_) | Request::Turns(_) => Output::Generated(texts),
        };
        let scores = self
            .suite
            .score(document, &prediction)
            .map_err(|e| RunError::Asked(format!("{}, document {}: {e}", document.task, document.id)))?;
        Ok(Sample {
            id: document.id.clone(),
            task: document.task.to_string(),
            prediction,
            reference: document.reference.clone(),
            scores,
            sequences: cost.sequences,
            tokens: cost.tokens,
            loops: cost.loops,
            bytes: cost.bytes,
            full_bytes: cost.full_bytes,
            seconds: cost.seconds,
        })
    }
}

/// One cell's row over its samples; `others` are the full cache's.
fn row(suite: &Suite, samples: &[&Sample], others: &[&Sample], seed: u64) -> Row {
    let [scores, full] = [samples, others].map(|s| s.iter().map(|s| &s.scores).collect::<Vec<_>>());
    let mut row = Row::new();
    for (metric, aggregate) in suite.aggregate(scores.iter().copied(), seed) {
        row.insert(metric, number(aggregate.printed()));
    }
    if let Some(main) = suite.main_score(&scores, seed) {
        insert(&mut row, "score", &main);
    }
    if let Some(difference) = suite.difference(&scores, &full, seed) {
        insert(&mut row, "diff", &difference);
    }
    let sum = |of: fn(&Sample) -> usize| samples.iter().map(|s| of(s)).sum::<usize>();
    let (bytes, full) = (sum(|s| s.bytes), sum(|s| s.full_bytes));
    row.insert("ratio".into(), number(full as f64 / bytes as f64));
    row.insert("bytes".into(), (bytes / sum(|s| s.sequences).max(1)).to_string());
    row.insert("samples".into(), samples.len().to_string());
    row.insert("tokens".into(), sum(|s| s.tokens).to_string());
    row.insert("loops".into(), sum(|s| s.loops).to_string());
    row.insert("seconds".into(), seconds(samples.iter().map(|s| s.seconds).sum()));
    row
}

/// Puts a number with its interval into `row`.
fn insert(row: &mut Row, column: &str, aggregate: &Aggregate) {
    row.insert(column.into(), number(aggregate.printed()));
    if let Some(Interval { low, high }) = aggregate.interval {
        row.insert(format!("{column}_lo"), number(aggregate.scale.round(low)));
        row.insert(format!("{column}_hi"), number(aggregate.scale.round(high)));
    }
}
