//! What a compressed cache does to a model's predictions on real text: perplexity, KL divergence from the full cache
//! and top-1 agreement with it.
//!
//! A window of a document is prefilled with `prefill` tokens, which the cache then compresses; the next
//! `continuation` tokens are teacher-forced `chunk` at a time: with 1, every prediction scored reads the compressed
//! cache and every token scored enters it before the next. The reference is the full FP16 cache on the same model and
//! text.
//!
//! All open cells of a task go through the model together: one prefill fills every cache (see `prefill`), and
//! the decode steps of several windows and all caches form one ragged batch.

use std::collections::HashSet;
use std::time::Instant;

use minicache_config::{Experiment, python_json};
use minicache_core::{CacheSpec, Sequence};
use minicache_models::Tokenizer;
use serde::{Deserialize, Serialize};

use super::calibration::joined;
use super::numbers::{mean_std, number, seconds};
use super::plan::{Plan, Planned};
use super::predictions::{Sums, feed};
use super::prefill::fill_all;
use super::progress::Progress;
use super::work::Work;
use super::{Result, RunError};
use crate::store::{Row, Samples, Store, digest};
use crate::tasks::TextDoc;

/// What is measured.
pub(crate) const COLUMNS: &[&str] = &[
    "perplexity",
    "perplexity_full",
    "kl",
    "kl_std",
    "agreement",
    "agreement_std",
    "ratio",
    "bytes",
    "samples",
    "tokens",
    "seconds",
];

/// Bytes of full caches that one batch of windows may come to.
const BATCH_BYTES: usize = 1 << 30;
/// The same on a GPU.
const GPU_BATCH_BYTES: usize = 16 << 30;
/// Windows side by side, at most, unless the experiment says otherwise.
const MOST_WINDOWS: usize = 8;

/// Piece of text that one sample looks at.
struct Window {
    id: String,
    /// The documents it is cut from.
    documents: Vec<String>,
    tokens: Vec<u32>,
}

/// One window's measures for one cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sample {
    id: String,
    /// Predictions scored.
    tokens: usize,
    /// Mean negative log-likelihood of the true next token, in nats.
    #[serde(with = "python_json::number")]
    nll: f64,
    /// The same with the full cache.
    #[serde(with = "python_json::number")]
    nll_full: f64,
    /// Mean KL(full || cache) in nats.
    #[serde(with = "python_json::number")]
    kl: f64,
    /// Share of predictions whose most likely token is that of the full cache.
    #[serde(with = "python_json::number")]
    agreement: f64,
    /// Footprint after the last token.
    bytes: usize,
    /// The full FP16 cache at this length.
    full_bytes: usize,
    /// This cache's share of the batch's time.
    #[serde(with = "python_json::number")]
    seconds: f64,
}

/// Tokens that go through the model for `cells`, at most.
pub(crate) fn tokens(plan: &Plan<'_>, cells: &[&Planned]) -> usize {
    let settings = &plan.experiment.fidelity;
    let mut tasks: Vec<_> = cells.iter().map(|p| (&p.cell.model, &p.cell.settings, &p.cell.task)).collect();
    let caches = tasks.len();
    tasks.dedup();
    let windows = |task: &String| windows_at_most(plan, task);
    let per_window = tasks.iter().map(|(_, _, t)| windows(t) * (settings.prefill + settings.continuation));
    let mean = tasks.iter().map(|(_, _, t)| windows(t)).max().unwrap_or(0);
    per_window.sum::<usize>() + caches * mean * settings.continuation
}

/// Tokens of `task` that all caches have in common, at most: those prefilled, and those of the full cache's continuation.
pub(crate) fn common_tokens(plan: &Plan<'_>, task: &str) -> [usize; 2] {
    let settings = &plan.experiment.fidelity;
    let windows = windows_at_most(plan, task);
    [windows * settings.prefill, windows * settings.continuation]
}

/// Tokens that one cache of `task` has for itself, at most.
pub(crate) fn own_tokens(plan: &Plan<'_>, task: &str) -> usize {
    windows_at_most(plan, task) * plan.experiment.fidelity.continuation
}

fn windows_at_most(plan: &Plan<'_>, task: &str) -> usize {
    plan.experiment.limit.or(plan.inputs.get(task).map(|i| i.len())).unwrap_or(0)
}

/// Runs the open cells of one task.
pub(crate) fn run(work: &Work<'_>, docs: &[TextDoc], store: &mut Store) -> Result<()> {
    let settings = &work.experiment.fidelity;
    let windows = windows_of(work.experiment, docs, work.tokenizer()?)?;
    let of: Vec<String> = windows.iter().map(|w| digest(&(&w.id, &w.tokens))).collect();
    let mut open: Vec<Samples<Sample>> = work
        .cells
        .iter()
        .map(|p| store.samples(&p.key, of.clone()))
        .collect::<std::result::Result<_, _>>()?;
    // Where one cell lacks one window, all cells take that batch again, so that batches are those of an undisturbed run.
    let batch = batch_size(work, settings.prefill + settings.continuation);
    let batches: Vec<usize> = (0..windows.len()).step_by(batch).collect();
    let is_there = |first: usize| {
        let windows = first..(first + batch).min(windows.len());
        open.iter().all(|samples| windows.clone().all(|w| samples.has(w)))
    };
    let missing: Vec<usize> = batches.iter().copied().filter(|&first| !is_there(first)).collect();
    let per_window = settings.prefill + settings.continuation * (work.cells.len() + 1);
    let progress = work.progress(windows.len() * per_window);
    let to_do: usize = missing.iter().map(|&first| batch.min(windows.len() - first)).sum();
    progress.resume((windows.len() - to_do) * per_window);
    for first in missing {
        work.stop.check()?;
        let group = &windows[first..(first + batch).min(windows.len())];
        let start = Instant::now();
        let mut results = measure(work, group, &progress)?;
        let share = start.elapsed().as_secs_f64() / (results.len() * group.len()) as f64;
        for (samples, results) in open.iter_mut().zip(&mut results) {
            results.iter_mut().for_each(|s| s.seconds = share);
            samples.put((first..).zip(std::mem::take(results)))?;
        }
    }
    for samples in &mut open {
        samples.settle()?;
    }
    let finished = work.cells.iter().zip(&open).map(|(p, s)| (p.key.clone(), vec![row(s.iter())]));
    store.finish(finished.collect::<Vec<_>>())?;
    Ok(())
}

/// Windows that go through the model side by side.
fn batch_size(work: &Work<'_>, tokens: usize) -> usize {
    let per_window = work.model.decoder.shape().full_bytes(tokens) * (work.cells.len() + 1);
    let most = work.experiment.fidelity.batch.unwrap_or(MOST_WINDOWS);
    // On a GPU memory is not what is short, and steps of few sequences are.
    let bytes = if work.model.decoder.is_on_gpu() { GPU_BATCH_BYTES } else { BATCH_BYTES };
    (bytes / per_window.max(1)).clamp(1, most)
}

/// The windows that an experiment measures on.
fn windows_of(experiment: &Experiment, docs: &[TextDoc], tokenizer: &Tokenizer) -> Result<Vec<Window>> {
    let length = experiment.fidelity.prefill + experiment.fidelity.continuation + 1;
    windows(docs, tokenizer, length, experiment.limit)
}

/// The ids of the documents that an experiment measures on.
pub(super) fn documents(
    experiment: &Experiment,
    docs: &[TextDoc],
    tokenizer: &Tokenizer,
) -> Result<HashSet<String>> {
    Ok(windows_of(experiment, docs, tokenizer)?.into_iter().flat_map(|w| w.documents).collect())
}

/// Cuts documents into windows of `length` tokens, each headed by what the tokenizer puts before a text (such as a
/// BOS). The first window of every document comes first, then the second of each, and so on, up to `limit`. Documents of
/// a task that has none of that length are joined until they have it, one window each.
fn windows(
    docs: &[TextDoc],
    tokenizer: &Tokenizer,
    length: usize,
    limit: Option<usize>,
) -> Result<Vec<Window>> {
    let head = tokenizer.encode("", true)?;
    let body = length.saturating_sub(head.len()).max(1);
    let encode = |doc: &TextDoc| -> Result<(Vec<String>, Vec<u32>)> {
        Ok((vec![doc.id.clone()], tokenizer.encode(&doc.text, false)?))
    };
    let mut stretches: Vec<Option<(Vec<String>, Vec<u32>)>> = vec![None; docs.len()];
    let mut out: Vec<Window> = Vec::new();
    for round in 0.. {
        let before = out.len();
        let mut long = false;
        for (index, stretch) in stretches.iter_mut().enumerate() {
            if limit.is_some_and(|l| out.len() >= l) {
                return Ok(out);
            }
            let (documents, tokens) = match stretch {
                Some(known) => known,
                None => stretch.insert(encode(&docs[index])?),
            };
            if let Some(piece) = tokens.get(round * body..(round + 1) * body) {
                let id = format!("{}#{round}", documents[0]);
                let tokens = head.iter().chain(piece).copied().collect();
                out.push(Window { id, documents: documents.clone(), tokens });
                long = true;
            }
        }
        if round == 0 && !long {
            // No document is long enough: they are joined, and windows cut from what comes out.
            let all: Vec<_> = stretches.drain(..).flatten().collect();
            stretches = joined(all, body, &tokenizer.encode("\n\n", false)?).into_iter().map(Some).collect();
            for (documents, tokens) in stretches.iter().flatten() {
                if tokens.len() >= body && limit.is_none_or(|l| out.len() < l) {
                    let id = format!("{}#{round}", documents[0]);
                    let tokens = head.iter().chain(&tokens[..body]).copied().collect();
                    out.push(Window { id, documents: documents.clone(), tokens });
                }
            }
            break;
        }
        if out.len() == before {
            break;
        }
    }
    if out.is_empty() {
        let message = "no document is that long; lower fidelity.prefill or fidelity.continuation, or choose a task with longer texts";
        return Err(RunError::Asked(format!("a sample takes {length} tokens and {message}")));
    }
    Ok(out)
}

/// Measures every cell's cache on `windows`: one list of samples per cell.
fn measure(work: &Work<'_>, windows: &[Window], progress: &Progress<'_>) -> Result<Vec<Vec<Sample>>> {
    let settings = &work.experiment.fidelity;
    let (prefill, steps) = (settings.prefill, settings.continuation);
    let reference = CacheSpec::default();
    // Per window: the reference, then one cache per cell. A cell that is the reference takes its numbers from it.
    let own: Vec<Option<usize>> = work
        .cells
        .iter()
        .scan(0, |next, p| {
            let is_reference = p.cell.cache.canonical(None) == reference.canonical(None);
            Some((!is_reference).then(|| {
                *next += 1;
                *next
            }))
        })
        .collect();
    let mut caches: Vec<Vec<Sequence>> = Vec::with_capacity(windows.len());
    for window in windows {
        let mut of_window = vec![work.model.sequence(&reference, prefill + steps)?];
        let mut specs = vec![&reference];
        for (planned, own) in work.cells.iter().zip(&own) {
            if own.is_some() {
                let label = || planned.cell.variant.clone();
                specs.push(&planned.cell.cache);
                of_window.push(
                    work.model
                        .sequence(&planned.cell.cache, prefill + steps)
                        .map_err(|e| RunError::from(e).in_cell(label()))?,
                );
            }
        }
        let tokens = &window.tokens[..prefill];
        fill_all(work.model, tokens, prefill + steps, &mut of_window, &specs)?;
        progress.add(prefill);
        caches.push(of_window);
    }
    let per_window = caches[0].len();
    let mut sums = vec![Sums::default(); windows.len() * per_window];
    let mut sequences: Vec<&mut Sequence> = caches.iter_mut().flatten().collect();
    for from in (prefill..prefill + steps).step_by(settings.chunk) {
        let to = (from + settings.chunk).min(prefill + steps);
        let text = |window: usize| &windows[window].tokens[from..=to];
        feed(work.model, &mut sequences, per_window, &text, &mut sums, &|n| progress.add(n))?;
    }
    let full_bytes = work.model.decoder.shape().full_bytes(prefill + steps);
    let sample = |window: usize, own: Option<usize>| {
        let (full, sum) = (sums[window * per_window], sums[window * per_window + own.unwrap_or(0)]);
        let n = steps as f64;
        Sample {
            id: windows[window].id.clone(),
            tokens: steps,
            nll: sum.nll / n,
            nll_full: full.nll / n,
            kl: sum.kl / n,
            agreement: sum.agreed as f64 / n,
            bytes: caches[window][own.unwrap_or(0)].footprint().total(),
            full_bytes,
            seconds: 0.0,
        }
    };
    Ok(own.iter().map(|&own| (0..windows.len()).map(|w| sample(w, own)).collect()).collect())
}

/// One cell's row over its samples; perplexities pool the tokens of all samples, spreads are over samples.
fn row<'a>(samples: impl Iterator<Item = &'a Sample>) -> Row {
    let samples: Vec<&Sample> = samples.collect();
    let tokens: usize = samples.iter().map(|s| s.tokens).sum();
    let pooled = |of: fn(&Sample) -> f64| {
        (samples.iter().map(|s| of(s) * s.tokens as f64).sum::<f64>() / tokens as f64).exp()
    };
    let (kl, kl_std) = mean_std(samples.iter().map(|s| s.kl));
    let (agreement, agreement_std) = mean_std(samples.iter().map(|s| s.agreement));
    let bytes: usize = samples.iter().map(|s| s.bytes).sum();
    let full: usize = samples.iter().map(|s| s.full_bytes).sum();
    let columns = [
        ("perplexity", number(pooled(|s| s.nll))),
        ("perplexity_full", number(pooled(|s| s.nll_full))),
        ("kl", number(kl)),
        ("kl_std", number(kl_std)),
        ("agreement", number(agreement)),
        ("agreement_std", number(agreement_std)),
        ("ratio", number(full as f64 / bytes as f64)),
        ("bytes", (bytes / samples.len().max(1)).to_string()),
        ("samples", samples.len().to_string()),
        ("tokens", tokens.to_string()),
        ("seconds", seconds(samples.iter().map(|s| s.seconds).sum())),
    ];
    columns.into_iter().map(|(c, text)| (c.to_string(), text)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_row_pools_tokens_and_counts_bytes() {
        let sample = |nll: f64, kl: f64| Sample {
            id: "a#0".into(),
            tokens: 4,
            nll,
            nll_full: 1.0,
            kl,
            agreement: 0.5,
            bytes: 50,
            full_bytes: 100,
            seconds: 0.5,
        };
        let row = row([sample(1.0, 0.2), sample(3.0, 0.4)].iter());
        assert_eq!(row["perplexity"], number(2f64.exp()));
        assert_eq!((row["kl"].as_str(), row["kl_std"].as_str()), ("0.3", "0.141421"));
        assert_eq!((row["ratio"].as_str(), row["bytes"].as_str(), row["tokens"].as_str()), ("2", "50", "8"));
        assert_eq!(row["seconds"], "1.000");
    }
}
