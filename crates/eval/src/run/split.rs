//! How the work on a plan is divided among processes: pieces by model, so that each is loaded in few of them, of about
//! equal estimated time.
//!
//! Estimates are in seconds of the machine that the rates below were measured on. What is estimated is the number of
//! tokens that go through the model, at most, times its weights, by twelve times layers times the square of the width:
//! attention, experts that are not asked, and answers that end early make the real time another, though mostly by the
//! same factor for all cells of a kind. [`super::Preview::measured`] gives that factor where rows are there.

use std::collections::{HashMap, HashSet};

use minicache_config::{Bench, Kind, ModelSettings, WeightMode};
use minicache_core::ModelShape;
use minicache_core::settings::Calibration;

use super::plan::{Plan, Planned};
use super::share::slot;
use super::{accuracy, fidelity, throughput};

/// Weights times tokens in a second, of prompts and of continuations of 16 sequences, on two cores of an EPYC: measured on
/// SmolLM2-135M-Instruct and Qwen2.5-Coder-1.5B-Instruct, by their geometric means.
const PREFILL_RATE: f64 = 3.5e11;
const DECODE_RATE: f64 = 1.3e11;
/// Weights of a model that is not there to be looked at, where none of the others is either.
const UNKNOWN_WEIGHTS: f64 = 1e9;
/// Times that weights in f32 take longer.
const F32_COST: f64 = 2.5;
/// Weights that are read in a second.
const LOAD_RATE: f64 = 5e8;
/// Numbers of a synthetic cache that are made, stored and read in a second.
const SYNTHETIC_RATE: f64 = 2e7;
/// Until it is known what a cache of a context holds.
const MEMORY_SECONDS: f64 = 0.05;
/// Times that the bound on the time is halved.
const HALVINGS: usize = 40;

/// What has to be in memory for a piece of work: a model, as it is loaded, with what it is calibrated on.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// The model.
    pub model: String,
    /// How it is loaded.
    pub settings: ModelSettings,
    /// What latent caches of its cells are calibrated on.
    pub calibration: Option<Calibration>,
    /// Seconds until it is there.
    pub seconds: f64,
}

/// Cells of one experiment, model and task: they have a prefill in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The experiment.
    pub experiment: String,
    /// The task; empty for kinds without tasks.
    pub task: String,
    /// What has to be loaded.
    pub load: Load,
    /// Seconds for what the cells have in common.
    pub common: f64,
    /// The cells, each with its [`slot`], its own seconds, and whether it is finished.
    pub cells: Vec<(String, f64, bool)>,
    /// The cells are timed side by side, and stay together.
    pub whole: bool,
}

impl Load {
    /// Whether this is in memory where `other` is, however long either takes to get there.
    fn is(&self, other: &Load) -> bool {
        let named = (&self.model, &self.settings, &self.calibration);
        let needs_weights = self.seconds > 0.0;
        named == (&other.model, &other.settings, &other.calibration) && needs_weights == (other.seconds > 0.0)
    }
}

impl Job {
    /// Makes every estimate `pace` times as long.
    pub fn scale(&mut self, pace: f64) {
        self.load.seconds *= pace;
        self.common *= pace;
        self.cells.iter_mut().for_each(|cell| cell.1 *= pace);
    }
}

/// The work of one process.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Task {
    /// Estimated seconds.
    pub seconds: f64,
    /// The cells, by [`slot`].
    pub cells: Vec<String>,
    /// Models, in the order in which they are loaded first.
    pub models: Vec<String>,
    /// What is loaded, and which jobs there are pieces of.
    loads: HashSet<usize>,
    jobs: HashSet<usize>,
}

/// The work on a plan.
pub(super) fn jobs(plan: &Plan<'_>, is_done: impl Fn(&Planned) -> bool) -> Vec<Job> {
    let experiment = plan.experiment;
    let mut jobs: Vec<Job> = Vec::new();
    let known = plan.cells.iter().map(|p| (&p.cell, is_done(p)));
    let unknown = plan.unknown.iter().flat_map(|(cells, _)| cells).map(|cell| (cell, false));
    for (cell, done) in known.chain(unknown) {
        let weights = weights(plan, &cell.model) * form_cost(cell.settings.weights);
        let load = Load {
            model: cell.model.clone(),
            settings: cell.settings.clone(),
            calibration: cell.cache.calibration().filter(|_| experiment.kind.needs_weights()).cloned(),
            seconds: load_seconds(
                plan,
                cell.settings.align.as_ref().map(|align| &align.text),
                cell.cache.calibration(),
                weights,
            ),
        };
        let own = (slot(experiment, cell), own_seconds(plan, &cell.task, &cell.model, weights), done);
        match jobs.iter_mut().find(|job| job.task == cell.task && job.load.is(&load)) {
            Some(job) => job.cells.push(own),
            None => jobs.push(Job {
                experiment: experiment.id.clone(),
                task: cell.task.clone(),
                load,
                common: common_seconds(plan, &cell.task, weights),
                cells: vec![own],
                whole: experiment.kind == Kind::Throughput,
            }),
        }
    }
    jobs
}

/// Seconds that each cell of `jobs` is estimated to take, by its [`slot`], with an even part of what it has in common
/// with others: as rows have their seconds.
pub fn estimates(jobs: &[Job]) -> HashMap<String, f64> {
    let of_job = |job: &Job| {
        let part = job.common / job.cells.len().max(1) as f64;
        job.cells.iter().map(|(slot, own, _)| (slot.clone(), own + part)).collect::<Vec<_>>()
    };
    jobs.iter().flat_map(of_job).collect()
}

/// Weights of a model, by what all of the kind have: four squares of the width for attention and eight for what follows
/// it. Of experts it counts one. A model that is not there has as many as the others on average.
fn weights(plan: &Plan<'_>, model: &str) -> f64 {
    let of = |s: &ModelShape| 12.0 * s.layers as f64 * ((s.heads * s.head_dim) as f64).powi(2);
    match plan.shapes.get(model) {
        Some(shape) => of(shape),
        None if plan.shapes.is_empty() => UNKNOWN_WEIGHTS,
        None => plan.shapes.values().map(of).sum::<f64>() / plan.shapes.len() as f64,
    }
}

/// How much more a weight costs in this form than in the fast one.
fn form_cost(form: WeightMode) -> f64 {
    match form {
        WeightMode::Auto => 1.0,
        WeightMode::F32 | WeightMode::Quantized => F32_COST,
    }
}

fn load_seconds(
    plan: &Plan<'_>,
    align: Option<&Calibration>,
    calibration: Option<&Calibration>,
    weights: f64,
) -> f64 {
    if !plan.experiment.kind.needs_weights() {
        return 0.0;
    }
    let tokens: usize = align.into_iter().chain(calibration).map(|c| c.tokens).sum();
    weights / LOAD_RATE + weights * tokens as f64 / PREFILL_RATE
}

fn common_seconds(plan: &Plan<'_>, task: &str, weights: f64) -> f64 {
    match plan.experiment.kind {
        Kind::Accuracy => weights * accuracy::common_tokens(plan, task) as f64 / PREFILL_RATE,
        Kind::Fidelity => {
            let [prefill, reference] = fidelity::common_tokens(plan, task).map(|n| weights * n as f64);
            prefill / PREFILL_RATE + reference / DECODE_RATE
        }
        Kind::Similarity | Kind::Memory | Kind::Throughput | Kind::Overhead => 0.0,
    }
}

fn own_seconds(plan: &Plan<'_>, task: &str, model: &str, weights: f64) -> f64 {
    let Bench { context, .. } = &plan.experiment.bench;
    match plan.experiment.kind {
        Kind::Accuracy => weights * accuracy::own_tokens(plan, task) as f64 / DECODE_RATE,
        Kind::Fidelity => weights * fidelity::own_tokens(plan, task) as f64 / DECODE_RATE,
        Kind::Similarity => {
            let tokens = plan.inputs.get(task).map_or(0, |i| i.len()) * plan.experiment.similarity.tokens;
            weights * tokens as f64 / PREFILL_RATE
        }
        Kind::Throughput => weights * throughput::tokens(&plan.experiment.bench, 1) as f64 / DECODE_RATE,
        // Of layers that hold alike one is filled, and models of one shape once.
        Kind::Memory => context.len() as f64 * MEMORY_SECONDS,
        Kind::Overhead => {
            let numbers = plan.shapes.get(model).map_or(0, |s| 2 * s.layers * s.kv_heads * s.head_dim);
            (numbers * context.iter().sum::<usize>()) as f64 / SYNTHETIC_RATE
        }
    }
}

/// Divides the cells of `jobs` that are not finished (all of them with `finished`) among `most` processes, or fewer where
/// each would have less than `least` seconds of work, so that the longest takes as little time as can be: the bound on
/// it is halved until the pieces do not fit any more, each put where its prefill is in common, or else its model, or else
/// where there is most room. The same jobs give the same division everywhere.
pub fn split(jobs: &[Job], most: usize, least: f64, finished: bool) -> Vec<Task> {
    let pieces = pieces(jobs, finished);
    // With everything in one process nothing is loaded twice.
    let Some(all) = packed(jobs, &pieces, 1, f64::INFINITY) else { return Vec::new() };
    let sum = all.iter().map(|task| task.seconds).sum::<f64>();
    let (mut low, mut high) = (least.max(sum / most.max(1) as f64).min(sum), sum);
    let mut best = all;
    if let Some(tasks) = packed(jobs, &pieces, most, low) {
        return tasks;
    }
    for _ in 0..HALVINGS {
        let bound = f64::midpoint(low, high);
        match packed(jobs, &pieces, most, bound) {
            Some(tasks) => (high, best) = (bound, tasks),
            None => low = bound,
        }
    }
    best
}

/// Cells that stay together: a job's number, and which of its cells.
struct Piece {
    job: usize,
    cells: Vec<usize>,
    seconds: f64,
}

/// The pieces in the order in which they are placed: large models first, and of each the jobs with the longest cells.
fn pieces(jobs: &[Job], finished: bool) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (job, of) in jobs.iter().enumerate() {
        let open = (0..of.cells.len()).filter(|&i| finished || !of.cells[i].2);
        if of.whole {
            let cells: Vec<usize> = open.collect();
            let seconds = cells.iter().map(|&i| of.cells[i].1).sum();
            pieces.extend((!cells.is_empty()).then_some(Piece { job, cells, seconds }));
        } else {
            pieces.extend(open.map(|i| Piece { job, cells: vec![i], seconds: of.cells[i].1 }));
        }
    }
    let first = |job: usize| jobs.iter().position(|of| of.load.is(&jobs[job].load)).unwrap_or(job);
    pieces.sort_by(|a, b| {
        let size = |p: &Piece| jobs[p.job].load.seconds;
        let longest = |p: &Piece| jobs[p.job].common + p.seconds;
        let by_load = size(b).total_cmp(&size(a)).then(first(a.job).cmp(&first(b.job)));
        by_load.then(longest(b).total_cmp(&longest(a))).then(a.job.cmp(&b.job)).then(a.cells.cmp(&b.cells))
    });
    pieces
}

/// The pieces in at most `most` tasks of at most `bound` seconds; `None` where they do not fit.
fn packed(jobs: &[Job], pieces: &[Piece], most: usize, bound: f64) -> Option<Vec<Task>> {
    let mut tasks: Vec<Task> = Vec::new();
    for piece in pieces {
        let job = &jobs[piece.job];
        let load = jobs.iter().position(|of| of.load.is(&job.load))?;
        let more = |task: &Task| {
            let loaded = if task.loads.contains(&load) { 0.0 } else { job.load.seconds };
            let common = if task.jobs.contains(&piece.job) { 0.0 } else { job.common };
            loaded + common + piece.seconds
        };
        let fitting = (0..tasks.len()).filter(|&i| tasks[i].seconds + more(&tasks[i]) <= bound);
        // What is shared counts most, then how full it is.
        let place = fitting.max_by(|&a, &b| {
            let shared = |i: usize| (tasks[i].jobs.contains(&piece.job), tasks[i].loads.contains(&load));
            shared(a).cmp(&shared(b)).then(tasks[b].seconds.total_cmp(&tasks[a].seconds)).then(b.cmp(&a))
        });
        let place = match place {
            Some(place) => place,
            None if tasks.len() < most && more(&Task::default()) <= bound => {
                tasks.push(Task::default());
                tasks.len() - 1
            }
            None => return None,
        };
        let seconds = more(&tasks[place]);
        let task = &mut tasks[place];
        task.seconds += seconds;
        task.loads.insert(load);
        task.jobs.insert(piece.job);
        if !task.models.contains(&job.load.model) {
            task.models.push(job.load.model.clone());
        }
        task.cells.extend(piece.cells.iter().map(|&i| job.cells[i].0.clone()));
    }
    Some(tasks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(model: &str, load: f64, common: f64, cells: &[f64]) -> Job {
        let slot = |i: usize| format!("{model} {common} {i}");
        Job {
            experiment: "e".into(),
            task: format!("{common}"),
            load: Load {
                model: model.into(),
                settings: ModelSettings::default(),
                calibration: None,
                seconds: load,
            },
            common,
            cells: cells.iter().enumerate().map(|(i, &seconds)| (slot(i), seconds, false)).collect(),
            whole: false,
        }
    }

    fn longest(tasks: &[Task]) -> f64 {
        tasks.iter().map(|t| t.seconds).fold(0.0, f64::max)
    }

    #[test]
    fn every_cell_is_in_one_task_and_the_longest_is_not_long() {
        let jobs = [
            job("large", 60.0, 100.0, &[400.0; 17]),
            job("large", 60.0, 30.0, &[50.0; 9]),
            job("small", 5.0, 10.0, &[20.0; 40]),
            job("tiny", 1.0, 0.0, &[1.0; 100]),
        ];
        let sum = longest(&split(&jobs, 1, 0.0, false));
        assert_eq!(sum, 60.0 + 100.0 + 6800.0 + 30.0 + 450.0 + 5.0 + 10.0 + 800.0 + 1.0 + 100.0);
        for most in [1, 2, 3, 7, 20] {
            let tasks = split(&jobs, most, 0.0, false);
            let mut cells: Vec<&String> = tasks.iter().flat_map(|t| &t.cells).collect();
            cells.sort();
            cells.dedup();
            assert!(tasks.len() <= most && cells.len() == 166, "{most}: {}", cells.len());
            assert_eq!(tasks.iter().map(|t| t.cells.len()).sum::<usize>(), 166);
            let ideal = (sum / most as f64).max(560.0);
            assert!(longest(&tasks) <= 1.3 * ideal, "{most}: {} of {ideal}", longest(&tasks));
            assert_eq!(tasks, split(&jobs, most, 0.0, false), "the same everywhere");
        }
    }

    #[test]
    fn a_model_is_loaded_where_it_is_needed_and_no_more() {
        let jobs = [job("a", 50.0, 0.0, &[10.0; 10]), job("b", 50.0, 1.0, &[10.0; 10])];
        let tasks = split(&jobs, 2, 0.0, false);
        assert_eq!(tasks.iter().map(|t| t.models.len()).collect::<Vec<_>>(), [1, 1]);
        // Not worth a second process.
        assert_eq!(split(&jobs, 8, 10_000.0, false).len(), 1);
    }

    #[test]
    fn what_is_finished_is_left_out_where_that_is_asked_and_what_is_timed_stays_together() {
        let mut jobs = [job("a", 1.0, 0.0, &[10.0; 10]), job("b", 1.0, 1.0, &[10.0; 4])];
        jobs[0].cells.iter_mut().skip(1).for_each(|c| c.2 = true);
        jobs[1].whole = true;
        let tasks = split(&jobs, 8, 0.0, false);
        let mut sizes: Vec<usize> = tasks.iter().map(|t| t.cells.len()).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [1, 4]);
        assert_eq!(split(&jobs, 8, 0.0, true).iter().map(|t| t.cells.len()).sum::<usize>(), 14);
        assert!(split(&[], 8, 0.0, true).is_empty());
    }
}
