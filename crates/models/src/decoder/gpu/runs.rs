//! The steps of a pass, grouped by where and how their caches are.

use std::ops::Range;

use minicache_core::{Batch, Sequence};
use minicache_device::DeviceCache;

use super::super::Step;
use crate::Result;

/// Sequences next to each other that are taken through attention together.
pub(super) enum Run<'a> {
    Device { caches: Vec<(&'a mut DeviceCache, usize)>, rows: Range<usize> },
    Host { batch: Batch<'a>, rows: Range<usize> },
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
        let here = sequence.cache_mut().as_any_mut().is_some_and(|cache| cache.is::<DeviceCache>());
        let kind = match here {
            false => Kind::Host(sequence),
            true => match sequence.cache_mut().as_any_mut().and_then(|cache| cache.downcast_mut()) {
                Some(cache) => Kind::Device(cache),
                None => unreachable!("just asked"),
            },
        };
        match kind {
            Kind::Host(sequence) => hosts.push((sequence, n)),
            Kind::Device(cache) => {
                close(&mut runs, &mut hosts, at)?;
                match runs.last_mut() {
                    Some(Run::Device { caches, rows }) if rows.end == at && caches[0].0.is_like(cache) => {
                        caches.push((cache, n));
                        rows.end += n;
                    }
                    _ => runs.push(Run::Device { caches: vec![(cache, n)], rows: at..at + n }),
                }
            }
        }
        at += n;
    }
    close(&mut runs, &mut hosts, at)?;
    Ok(runs)
}
