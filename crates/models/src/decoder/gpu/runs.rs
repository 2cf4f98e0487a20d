//! The steps of a pass, grouped by where and how their caches are.
//!
//! Sequences of one method go through attention in the same launches, so that a pass of many sequences and few methods
//! takes as many launches as one of as many sequences as there are methods.

use std::ops::Range;

use minicache_core::{Batch, CacheSpec, Sequence};
use minicache_device::{DeviceCache, DeviceStep, Devices};
use rayon::prelude::*;

use super::super::Step;
use crate::Result;

/// Sequences next to each other that are taken through attention together.
pub(super) enum Run<'a> {
    /// Caches on the devices. `attends`: whether what these rows attend to is taken from them; of a prompt that fills
    /// several caches one says it.
    Device {
        step: DeviceStep<'a>,
        rows: Range<usize>,
        attends: bool,
    },
    Host {
        batch: Batch<'a>,
        rows: Range<usize>,
    },
    /// Caches on the host that are given what others attend to.
    Filled {
        sequences: Vec<(&'a mut Sequence, &'a CacheSpec)>,
        rows: Range<usize>,
    },
}

impl Run<'_> {
    /// Its rows of the pass.
    pub(super) fn rows(&self) -> &Range<usize> {
        match self {
            Run::Device { rows, .. } | Run::Host { rows, .. } | Run::Filled { rows, .. } => rows,
        }
    }

    /// Ends its step.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Run::Device { step, .. } => step.end()?,
            Run::Host { batch, .. } => batch.finish()?,
            // Where all of a prompt is compressed.
            Run::Filled { sequences, .. } => {
                sequences.into_par_iter().try_for_each(|(s, _)| s.cache_mut().finish_step())?;
            }
        }
        Ok(())
    }
}

/// Steps grouped by where their caches are, and begun there.
pub(super) fn runs<'a>(devices: &'a Devices, steps: &'a mut [Step<'_>]) -> Result<Vec<Run<'a>>> {
    let there: Vec<bool> = steps.iter_mut().map(|step| DeviceCache::of(step.sequence).is_some()).collect();
    let mut runs = Vec::new();
    let mut steps = steps.iter_mut().map(|step| (&mut *step.sequence, step.tokens.len()));
    let mut start = 0;
    for run in there.chunk_by(|a, b| a == b) {
        let own: Vec<_> = steps.by_ref().take(run.len()).collect();
        let rows = start..start + own.iter().map(|(_, tokens)| tokens).sum::<usize>();
        start = rows.end;
        runs.push(if run[0] {
            let cache = |(sequence, n): (&'a mut Sequence, usize)| Some((DeviceCache::of(sequence)?, n));
            let step = devices.step(own.into_iter().filter_map(cache).collect())?;
            Run::Device { step, rows, attends: true }
        } else {
            Run::Host { batch: Batch::begin(own)?, rows }
        });
    }
    Ok(runs)
}

/// The first step of `sequences`, which all get the same `rows` rows.
pub(super) fn filled<'a>(
    devices: &'a Devices,
    sequences: &'a mut [Sequence],
    specs: &'a [&CacheSpec],
    rows: usize,
) -> Result<Vec<Run<'a>>> {
    let (mut caches, mut hosts) = (Vec::new(), Vec::new());
    for (sequence, spec) in sequences.iter_mut().zip(specs) {
        match DeviceCache::of(sequence).is_some() {
            true => caches.extend(DeviceCache::of(sequence)),
            false => hosts.push((sequence, *spec)),
        }
    }
    // Each is a step of its own, but their kernels are compiled together.
    caches.par_iter().try_for_each(|cache| cache.compile())?;
    let mut runs = Vec::new();
    for cache in caches {
        let step = devices.step(vec![(cache, rows)])?;
        runs.push(Run::Device { step, rows: 0..rows, attends: false });
    }
    if !hosts.is_empty() {
        runs.push(Run::Filled { sequences: hosts, rows: 0..rows });
    }
    Ok(runs)
}

/// Calls `work` with the steps in an order in which those of one method follow each other, and with the place that each has
/// in it; afterwards they are as they were.
pub(in crate::decoder) fn grouped<T>(
    steps: &mut [Step<'_>],
    work: impl FnOnce(&mut [Step<'_>], &[usize]) -> Result<T>,
) -> Result<T> {
    // The first step of each method's, and of which method each step is: as many as there are caches of the host's.
    let mut firsts: Vec<usize> = Vec::new();
    let mut keys = Vec::with_capacity(steps.len());
    for at in 0..steps.len() {
        let (before, rest) = steps.split_at_mut(at);
        let own = DeviceCache::of(rest[0].sequence);
        let like = firsts.iter().position(|&first| match (&own, DeviceCache::of(before[first].sequence)) {
            (Some(own), Some(other)) => own.is_like(other),
            (own, other) => own.is_none() && other.is_none(),
        });
        keys.push(like.unwrap_or_else(|| {
            firsts.push(at);
            firsts.len() - 1
        }));
    }
    // order[new] = old, places[old] = new.
    let mut order: Vec<usize> = (0..steps.len()).collect();
    order.sort_by_key(|&at| keys[at]);
    let mut places = vec![0; steps.len()];
    order.iter().enumerate().for_each(|(new, &old)| places[old] = new);
    arrange(steps, &places);
    let done = work(steps, &places);
    arrange(steps, &order);
    done
}

/// Brings the item at i to `places[i]`.
fn arrange<T>(items: &mut [T], places: &[usize]) {
    let mut places = places.to_vec();
    for at in 0..items.len() {
        while places[at] != at {
            let to = places[at];
            items.swap(at, to);
            places.swap(at, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_arranged_comes_back() {
        let mut items = ["a", "b", "c", "d", "e"];
        let places = [2, 0, 4, 1, 3];
        arrange(&mut items, &places);
        assert_eq!(items, ["b", "d", "a", "e", "c"]);
        let mut back = [0; 5];
        places.iter().enumerate().for_each(|(old, &new)| back[new] = old);
        arrange(&mut items, &back);
        assert_eq!(items, ["a", "b", "c", "d", "e"]);
    }
}
