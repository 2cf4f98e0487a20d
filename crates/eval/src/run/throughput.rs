//! Tokens per second and peak memory of whole batches, sequences joining and leaving as in a server.
//!
//! A batch of B has B sequences at every moment: where one ends, the next request takes its place, and its prompt goes
//! through the model in the same step as the others' next tokens. Lengths of prompts and outputs are geometric with the
//! given means. Geometric lengths have no memory, so the state of a server that has run for long can be drawn at once:
//! every sequence has some of its output behind it, geometric too, and the time to warm up and to run dry, in which
//! batches are small, need not be run. All caches get the same requests, and take turns, a few steps each, so that
//! what else the machine does meets them alike.
//!
//! Tokens are greedy; prompts are made up. Which tokens they are makes a difference to merged caches only by how many
//! tokens are retained.

use std::time::Instant;

use minicache_core::Sequence;
use minicache_models::{LogitsFor, Model, Step};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::numbers::{number, seconds};
use super::plan::Planned;
use super::prefill::Prefill;
use super::{Overall, Result, Stop};
use crate::store::{Row, Store};
use minicache_config::{Bench, Experiment};

/// What is measured. `peak_bytes` are those of all caches at the step after which they were most, `memory_bytes` with
/// the model's weights; `fits` says whether they stayed within the budget.
pub(crate) const COLUMNS: &[&str] =
    &["batch", "fits", "tokens_per_s", "peak_bytes", "memory_bytes", "ratio", "joined", "seconds"];

/// Turns of every cache.
const ROUNDS: usize = 4;
/// Steps before the first turn that are not timed.
const WARM_UP: usize = 2;

/// Tokens that go through the model for `cells` cells, at most: without the requests that join.
pub(crate) fn tokens(bench: &Bench, cells: usize) -> usize {
    bench.batch.iter().map(|b| b * (bench.steps + WARM_UP) * cells).sum()
}

/// Runs the open cells of one model side by side: a row for each batch size.
pub(crate) fn run(
    experiment: &Experiment,
    model: &Model,
    cells: &[&Planned],
    stop: &Stop,
    store: &mut Store,
    overall: &Overall,
) -> Result<()> {
    let bench = &experiment.bench;
    let context = model.config.context;
    let mut batches = bench.batch.clone();
    batches.sort_unstable();
    batches.dedup();
    let workloads: Vec<Workload> =
        batches.iter().map(|&b| Workload::new(bench, b, context, experiment.seed)).collect();
    let longest = workloads.iter().flat_map(|w| &w.running).map(|r| r.prompt + r.written).max().unwrap_or(1);
    let prefix = prompt(longest, model.config.vocab);
    let states = Prefill::new(model, &prefix, longest + 1, None)?;
    let progress = overall.progress(&experiment.id, tokens(bench, cells.len()));
    let mut rows: Vec<Vec<Row>> = vec![Vec::new(); cells.len()];
    // A cache that did not fit with fewer sequences will not with more.
    let mut fits = vec![true; cells.len()];
    let budget = match bench.memory_budget {
        Some(bytes) => Some(bytes),
        None => model.decoder.free_memory()?,
    };
    // Side by side, so that what slows the machine down for a while slows all of them; but for those that would share a
    // card's memory, of which each is to have the whole.
    let together = if model.decoder.free_memory()?.is_some() { 1 } else { cells.len().max(1) };
    for workload in &workloads {
        let batch = workload.running.len();
        let mut done: Vec<Row> = vec![stopped(batch); cells.len()];
        let open: Vec<usize> = (0..cells.len()).filter(|i| fits[*i]).collect();
        for open in open.chunks(together) {
            let mut lanes = Vec::new();
            for &index in open {
                stop.check()?;
                lanes.push((index, Lane::new(model, cells[index], workload, &states, budget)?));
            }
            for _ in 0..WARM_UP {
                for (_, lane) in &mut lanes {
                    stop.check()?;
                    lane.step(false)?;
                    progress.add(batch);
                }
            }
            for round in 0..ROUNDS {
                let steps = bench.steps * (round + 1) / ROUNDS - bench.steps * round / ROUNDS;
                for (_, lane) in &mut lanes {
                    for _ in 0..steps {
                        stop.check()?;
                        lane.step(true)?;
                        progress.add(batch);
                    }
                }
            }
            for (index, lane) in lanes {
                fits[index] = !lane.over;
                if !lane.over {
                    done[index] = lane.row(batch);
                }
            }
        }
        rows.iter_mut().zip(done).for_each(|(rows, row)| rows.push(row));
    }
    let finished = cells.iter().zip(rows).map(|(p, rows)| (p.key.clone(), rows));
    Ok(store.finish(finished)?)
}

/// The row of a batch that did not fit.
fn stopped(batch: usize) -> Row {
    [("batch", batch.to_string()), ("fits", "no".to_string())].map(|(c, t)| (c.to_string(), t)).into()
}

/// A request, on its way or not.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Request {
    /// Tokens of the prompt, at least 1.
    prompt: usize,
    /// Tokens of the output that are there already.
    written: usize,
    /// Tokens of the output that are still to come, at least 1.
    left: usize,
}

/// The requests of one batch size: those running when the measurement begins, and those that follow, in order.
struct Workload {
    running: Vec<Request>,
    waiting: Vec<Request>,
}

impl Workload {
    fn new(bench: &Bench, batch: usize, context: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(batch as u64);
        let mut request = |started: bool| {
            let prompt = geometric(&mut rng, bench.input).min(context / 2);
            let room = context - prompt;
            let written = if started { geometric(&mut rng, bench.output) - 1 } else { 0 };
            let left = geometric(&mut rng, bench.output);
            let written = written.min(room - 1);
            Request { prompt, written, left: left.min(room - written) }
        };
        let running = (0..batch).map(|_| request(true)).collect();
        // No step can end more sequences than there are.
        let waiting = (0..batch * (bench.steps + WARM_UP)).map(|_| request(false)).collect();
        Self { running, waiting }
    }
}

/// A geometric number, at least 1, of the given mean.
fn geometric(rng: &mut ChaCha8Rng, mean: usize) -> usize {
    let uniform: f64 = rng.random();
    let stay = 1.0 - 1.0 / mean as f64;
    if stay <= 0.0 { 1 } else { 1 + ((1.0 - uniform).ln() / stay.ln()) as usize }
}

/// Made-up tokens, spread over the vocabulary.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens as u64).map(|i| ((i * 2_654_435_761 % (1 << 32) * vocab as u64) >> 32) as u32).collect()
}

/// A request that is being served.
struct Running {
    sequence: Sequence,
    /// Tokens of the next step.
    next: Vec<u32>,
    /// Tokens still to be generated.
    left: usize,
}

/// One cache with its batch.
struct Lane<'a> {
    model: &'a Model,
    planned: &'a Planned,
    running: Vec<Running>,
    waiting: std::slice::Iter<'a, Request>,
    budget: Option<u64>,
    /// The caches came to more than the budget.
    over: bool,
    generated: usize,
    joined: usize,
    time: f64,
    /// Bytes of all caches at their most, and of full ones of the same lengths.
    peak: (usize, usize),
}

impl<'a> Lane<'a> {
    fn new(
        model: &'a Model,
        planned: &'a Planned,
        workload: &'a Workload,
        states: &Prefill,
        budget: Option<u64>,
    ) -> Result<Self> {
        let mut lane = Self {
            model,
            planned,
            running: Vec::with_capacity(workload.running.len()),
            waiting: workload.waiting.iter(),
            budget,
            over: false,
            generated: 0,
            joined: 0,
            time: 0.0,
            peak: (0, 0),
        };
        for (i, request) in workload.running.iter().enumerate() {
            let mut running = lane.begin(request)?;
            // Its past as it came about: the prompt at once, then token by token.
            let prompt = std::iter::once(0..request.prompt);
            let written = (request.prompt..request.prompt + request.written).map(|p| p..p + 1);
            for range in prompt.chain(written) {
                states.append(running.sequence.cache_mut(), range)?;
            }
            running.next = vec![(i % model.config.vocab) as u32];
            lane.running.push(running);
            lane.watch();
            if lane.over {
                lane.running.clear();
                break;
            }
        }
        Ok(lane)
    }

    /// An empty sequence for a request.
    fn begin(&self, request: &Request) -> Result<Running> {
        let planned_len = request.prompt + request.written + request.left;
        let sequence = self.model.sequence(&self.planned.cell.cache, planned_len)?;
        Ok(Running { sequence, next: Vec::new(), left: request.left })
    }

    /// One step of all sequences; those that end make room for the next requests.
    fn step(&mut self, counts: bool) -> Result<()> {
        if self.over {
            return Ok(());
        }
        let start = Instant::now();
        let mut steps: Vec<Step<'_>> = self
            .running
            .iter_mut()
            .map(|r| Step { tokens: &r.next, sequence: &mut r.sequence, logits: LogitsFor::Last })
            .collect();
        let tokens = match self.model.decoder.forward_greedy(&mut steps) {
            // A device that is full says so before anything has changed.
            Err(error) if error.is_out_of_memory() => {
                self.over = true;
                self.running.clear();
                return Ok(());
            }
            tokens => tokens?,
        };
        for (running, token) in self.running.iter_mut().zip(tokens) {
            running.next = vec![token];
            running.left -= 1;
        }
        let forward = start.elapsed();
        // Not timed: the most memory is taken before a sequence leaves.
        self.watch();
        let start = Instant::now();
        for i in 0..self.running.len() {
            if self.running[i].left == 0
                && let Some(request) = self.waiting.next()
            {
                let mut next = self.begin(request)?;
                next.next = prompt(request.prompt, self.model.config.vocab);
                self.running[i] = next;
                self.joined += usize::from(counts);
            }
        }
        if counts {
            self.time += (forward + start.elapsed()).as_secs_f64();
            self.generated += self.running.len();
        }
        if self.over {
            self.running.clear();
        }
        Ok(())
    }

    /// Notes what the caches hold.
    fn watch(&mut self) {
        let shape = self.model.decoder.shape();
        let bytes: usize = self.running.iter().map(|r| r.sequence.footprint().total()).sum();
        if bytes > self.peak.0 {
            let full = self.running.iter().map(|r| shape.full_bytes(r.sequence.len())).sum();
            self.peak = (bytes, full);
        }
        self.over |= self.budget.is_some_and(|budget| bytes as u64 > budget);
    }

    fn row(&self, batch: usize) -> Row {
        let (peak, full) = self.peak;
        let columns = [
            ("batch", batch.to_string()),
            ("fits", "yes".to_string()),
            ("tokens_per_s", number(self.generated as f64 / self.time)),
            ("peak_bytes", peak.to_string()),
            ("memory_bytes", (peak + self.model.decoder.weight_bytes()).to_string()),
            ("ratio", number(full as f64 / peak as f64)),
            ("joined", self.joined.to_string()),
            ("seconds", seconds(self.time)),
        ];
        columns.map(|(c, text)| (c.to_string(), text)).into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_the_means_asked_for() {
        let bench = Bench { steps: 2000, ..Bench::default() };
        let workload = Workload::new(&bench, 8, 100_000, 1);
        let mean = |of: fn(&Request) -> usize| {
            workload.waiting.iter().map(of).sum::<usize>() as f64 / workload.waiting.len() as f64
        };
        assert!((mean(|r| r.prompt) / 161.0 - 1.0).abs() < 0.03);
        assert!((mean(|r| r.left) / 338.0 - 1.0).abs() < 0.03);
        assert!(workload.waiting.iter().all(|r| r.written == 0 && r.left > 0 && r.prompt > 0));
        assert!(workload.running.iter().any(|r| r.written > 0));
        assert_eq!(workload.running, Workload::new(&bench, 8, 100_000, 1).running);
        assert_ne!(workload.running, Workload::new(&bench, 8, 100_000, 2).running);
        // A short context is kept to.
        for request in Workload::new(&bench, 8, 64, 1).waiting {
            assert!(request.prompt + request.left <= 64 && request.left > 0);
        }
        let ones = Bench { input: 1, output: 1, ..bench };
        assert!(Workload::new(&ones, 1, 64, 1).waiting.iter().all(|r| (r.prompt, r.left) == (1, 1)));
    }
}
