//! The steps of a pass, grouped by where and how their caches are.
//!
//! Sequences of one method go through attention in the same launches, so that a pass of many sequences and few methods
//! takes as many launches as one of as many sequences as there are methods.

use std::ops::Range;

use minicache_core::{Batch, CacheSpec, Sequence};
use minicache_device::{DeviceCache, PartCache};

use super::super::Step;
use crate::Result;

/// Sequences next to each other that are taken through attention together.
pub(super) enum Run<'a> {
    Device {
        caches: Vec<(&'a mut DeviceCache, usize)>,
        rows: Range<usize>,
        /// Whether it says what these rows attend to; of a prompt that fills several caches one does.
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
    /// One of its caches on a device, of which all have the same method.
    pub(super) fn a_cache(&self, part: usize) -> Option<&PartCache> {
        let Run::Device { caches, .. } = self else { return None };
        caches.first().map(|(cache, _)| &cache.parts()[part])
    }
}

/// Steps grouped by where and how their caches are.
pub(super) fn runs<'a>(steps: &'a mut [Step<'_>]) -> Result<Vec<Run<'a>>> {
    enum Kind<'a> {
        Device(&'a mut DeviceCache),
        Host(&'a mut Sequence),
    }
    let mut runs = Vec::new();
    let mut hosts: Vec<(&mut Sequence, usize)> = Vec::new();
    let mut at = 0;
    fn close<'a>(
        runs: &mut Vec<Run<'a>>,
        hosts: &mut Vec<(&'a mut Sequence, usize)>,
        end: usize,
    ) -> Result<()> {
        let rows: usize = hosts.iter().map(|(_, n)| n).sum();
        if rows > 0 {
            runs.push(Run::Host { batch: Batch::begin(hosts.drain(..))?, rows: end - rows..end });
        }
        Ok(())
    }
    for step in steps {
        let n = step.tokens.len();
        let sequence: &mut Sequence = step.sequence;
        let here = device_cache_of(sequence).is_some();
        let kind = match here {
            false => Kind::Host(sequence),
            true => match device_cache_of(sequence) {
                Some(cache) => Kind::Device(cache),
                None => unreachable!("just asked"),
            },
        };
        match kind {
            Kind::Host(sequence) => hosts.push((sequence, n)),
            Kind::Device(cache) => {
                close(&mut runs, &mut hosts, at)?;
                match runs.last_mut() {
                    Some(Run::Device { caches, rows, .. })
                        if rows.end == at && caches[0].0.is_like(cache) =>
                    {
                        caches.push((cache, n));
                        rows.end += n;
                    }
                    _ => runs.push(Run::Device { caches: vec![(cache, n)], rows: at..at + n, attends: true }),
                }
            }
        }
        at += n;
    }
    close(&mut runs, &mut hosts, at)?;
    Ok(runs)
}

/// The first step of `sequences`, which all get the same `rows` rows.
pub(super) fn filled<'a>(
    sequences: &'a mut [Sequence],
    specs: &'a [&CacheSpec],
    rows: usize,
) -> Vec<Run<'a>> {
    let (mut runs, mut hosts) = (Vec::new(), Vec::new());
    for (sequence, spec) in sequences.iter_mut().zip(specs) {
        if device_cache_of(sequence).is_none() {
            hosts.push((sequence, *spec));
        } else if let Some(cache) = device_cache_of(sequence) {
            runs.push(Run::Device { caches: vec![(cache, rows)], rows: 0..rows, attends: false });
        }
    }
    if !hosts.is_empty() {
        runs.push(Run::Filled { sequences: hosts, rows: 0..rows });
    }
    runs
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
        let own = device_cache(&mut rest[0]);
        let like = firsts.iter().position(|&first| match (&own, device_cache(&mut before[first])) {
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

fn device_cache<'s>(step: &'s mut Step<'_>) -> Option<&'s mut DeviceCache> {
    device_cache_of(step.sequence)
}

/// A sequence's cache, if it lives on devices.
pub(super) fn device_cache_of(sequence: &mut Sequence) -> Option<&mut DeviceCache> {
    sequence.cache_mut().as_any_mut()?.downcast_mut()
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
