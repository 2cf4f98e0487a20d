//! Teacher-forced predictions of several caches on the same text, compared with those of a reference: on a GPU by a kernel,
//! so that no logits cross the bus.

use minicache_core::Sequence;
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;

use super::Result;
use super::numbers::{argmax, kl, log_softmax};

/// Bytes of logits that one step may come to.
const LOGITS_BYTES: usize = 256 << 20;

/// Sums over one window's predictions.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    /// -log of the probability of each next token, in nats.
    pub(super) nll: f64,
    /// Of KL(reference || cache), in nats.
    pub(super) kl: f64,
    /// Predictions whose most likely token is the reference's.
    pub(super) agreed: usize,
}

/// Feeds the same text to `per_window` sequences of each window, which follow each other, the reference first, and adds
/// their predictions to `sums`. `text` has the tokens fed to those of a window, and the one that follows; as many of each
/// window. `progress` is told of tokens fed.
pub(super) fn feed<'t>(
    model: &Model,
    sequences: &mut [&mut Sequence],
    per_window: usize,
    text: &(dyn Fn(usize) -> &'t [u32] + Sync),
    sums: &mut [Sums],
    progress: &dyn Fn(usize),
) -> Result<()> {
    let fed = text(0).len() - 1;
    let bytes = fed * model.config.vocab * size_of::<f32>();
    let on_gpu = windows_on_gpu(model, bytes * per_window)? * per_window;
    let at_once = if on_gpu > 0 { on_gpu } else { (LOGITS_BYTES / bytes).max(1) };
    let mut reference = Vec::new();
    for (part, group) in sequences.chunks_mut(at_once).enumerate() {
        let first = part * at_once;
        let tokens = |i: usize| &text((first + i) / per_window)[..fed];
        let targets = |sequence: usize| &text(sequence / per_window)[1..];
        let sums = &mut sums[first..first + group.len()];
        let mut batch: Vec<Step<'_>> = group
            .iter_mut()
            .enumerate()
            .map(|(i, sequence)| Step { tokens: tokens(i), sequence, logits: LogitsFor::All })
            .collect();
        if on_gpu > 0 {
            let references: Vec<usize> = (0..sums.len()).map(|i| i - i % per_window).collect();
            let next: Vec<u32> = (first..first + sums.len()).flat_map(targets).copied().collect();
            let scores = model.decoder.score_on_gpu(&mut batch, &references, &next)?.unwrap_or_default();
            for (i, (sum, scores)) in sums.iter_mut().zip(scores.chunks_exact(fed)).enumerate() {
                for score in scores {
                    sum.nll += score.nll;
                    // Of the reference itself, what rounding leaves.
                    sum.kl += if references[i] == i { 0.0 } else { score.kl };
                    sum.agreed += usize::from(score.agrees);
                }
            }
        } else {
            let logits = model.decoder.forward(&mut batch)?;
            let logits: Vec<&[f32]> = logits.iter().collect();
            score(&logits, first, per_window, &targets, &mut reference, sums);
        }
        progress(sums.len() * fed);
    }
    Ok(())
}

/// Windows whose logits, so many bytes each, a GPU compares in one step; 0 where that is not to be: on the host, or where
/// there is no room for those of one.
fn windows_on_gpu(model: &Model, bytes: usize) -> Result<usize> {
    let Some(free) = model.decoder.free_memory()? else { return Ok(0) };
    Ok((LOGITS_BYTES / bytes).max(usize::from(bytes as u64 <= free / 2)))
}

/// Adds the predictions of one step of the sequences from `first` on: a row of logits for each of their targets.
/// `reference` carries the last reference's log-probabilities from call to call.
fn score<'t>(
    logits: &[&[f32]],
    first: usize,
    per_window: usize,
    targets: &(dyn Fn(usize) -> &'t [u32] + Sync),
    reference: &mut Vec<f32>,
    sums: &mut [Sums],
) {
    let log_probs = |(i, logits): (usize, &&[f32])| {
        let mut x = logits.to_vec();
        x.chunks_exact_mut(logits.len() / targets(first + i).len()).for_each(log_softmax);
        x
    };
    let mut all: Vec<Vec<f32>> = logits.par_iter().enumerate().map(log_probs).collect();
    let reference_of = |i: usize| i.checked_sub((first + i) % per_window);
    sums.par_iter_mut().zip(&all).enumerate().for_each(|(i, (sum, own))| {
        let full = reference_of(i).map_or(&*reference, |r| &all[r]);
        let targets = targets(first + i);
        let vocab = own.len() / targets.len();
        let rows = own.chunks_exact(vocab).zip(full.chunks_exact(vocab));
        for ((own, full), &target) in rows.zip(targets) {
            sum.nll -= f64::from(own[target as usize]);
            if reference_of(i) != Some(i) {
                sum.kl += kl(full, own);
            }
            sum.agreed += usize::from(argmax(own) == argmax(full));
        }
    });
    if let Some(last) = all.len().checked_sub(1).and_then(reference_of) {
        *reference = std::mem::take(&mut all[last]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_compared_with_the_reference_of_their_window() {
        let logits: [&[f32]; 6] = [
            &[0.0, 1.0, 2.0],
            &[0.0, 1.0, 2.0],
            &[5.0, 0.0, 0.0],
            &[5.0, 0.0, 0.0],
            &[0.0, 5.0, 0.0],
            &[5.0, 0.0, 0.0],
        ];
        let targets = |sequence: usize| if sequence < 3 { &[2][..] } else { &[1][..] };
        let check = |sums: &[Sums]| {
            assert_eq!(sums.iter().map(|s| s.agreed).collect::<Vec<_>>(), [1, 1, 0, 1, 0, 1]);
            assert!(sums[1].kl.abs() < 1e-7 && (sums[0].nll - sums[1].nll).abs() < 1e-9);
            assert!(sums[2].kl > 2.0 && sums[4].kl > 4.0 && sums[5].kl.abs() < 1e-7);
            assert!(sums[3].nll > 4.0 && sums[4].nll < 0.1);
        };
        // However the sequences are cut into steps.
        for at_once in 1..=6 {
            let mut sums = vec![Sums::default(); 6];
            let mut reference = Vec::new();
            for (part, logits) in logits.chunks(at_once).enumerate() {
                let first = part * at_once;
                let sums = &mut sums[first..first + logits.len()];
                score(logits, first, 3, &targets, &mut reference, sums);
            }
            check(&sums);
        }
    }
}
