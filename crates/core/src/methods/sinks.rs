//! Attention sinks (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453): the first tokens and a window of recent ones;
//! everything between is dropped. Keys keep the positions they were computed at.

use minicache_config::{Budget, CacheSpec};

use crate::evicting::Evict;

pub(super) const ABOUT: &str = "the first tokens and a recent window; the rest is dropped (StreamingLLM)";

#[derive(Clone)]
pub(super) struct Sinks {
    first: usize,
    recent: Budget,
}

pub(super) fn policy(spec: &CacheSpec) -> Sinks {
    Sinks { first: spec.first_exact(), recent: spec.recent }
}

impl Evict for Sinks {
    fn keep(&self, positions: &[u32], _: &[f32], seen: usize, keep: &mut [bool]) {
        let from = seen.saturating_sub(self.recent.resolve(seen).max(1));
        for (keep, &p) in keep.iter_mut().zip(positions) {
            *keep = (p as usize) < self.first || p as usize >= from;
        }
    }

    fn needs_attention(&self) -> bool {
        false
    }
}
