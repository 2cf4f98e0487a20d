//! Attention sinks (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453): the first tokens and a window of recent ones;
//! everything between is dropped. Keys keep the positions they were computed at.

use super::{Method, evicting_method};
use crate::account::{Nominal, nominal_kept};
use crate::cache::KvCache;
use crate::evicting::{Evict, Held, evicting};
use crate::settings::bounds::{MOST_TOKENS, check_number};
use crate::settings::{Budget, Checked, ModelShape, StoreType};
use crate::{Resources, Result};

/// First and recent tokens only (StreamingLLM).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Sinks {
    /// The storage type.
    pub dtype: StoreType,
    /// First tokens kept; the paper's 4.
    pub sinks: usize,
    /// Newest tokens kept.
    pub recent: Budget,
}

impl Default for Sinks {
    fn default() -> Self {
        Self { dtype: StoreType::F16, sinks: 4, recent: Budget::Fraction(0.1) }
    }
}

impl Sinks {
    pub(super) const ABOUT: &'static str =
        "the first tokens and a recent window; the rest is dropped (StreamingLLM)";
}

impl Method for Sinks {
    evicting_method!("sinks");

    fn validate(&self) -> Checked {
        check_number("sinks", self.sinks, 0..=MOST_TOKENS)?;
        self.recent.validate("recent")
    }

    fn build(&self, shape: &ModelShape, _: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(evicting(shape, self.dtype, self.clone()))
    }

    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let recent = self.recent.resolve(context).max(1);
        Some(nominal_kept(self.dtype, [(recent, "recent tokens"), (self.sinks, "first tokens")], shape, context))
    }
}

impl Evict for Sinks {
    fn keep(&self, held: &Held<'_>, keep: &mut [bool]) {
        let seen = held.seen();
        let from = seen.saturating_sub(self.recent.resolve(seen).max(1));
        for (keep, &p) in keep.iter_mut().zip(held.positions) {
            *keep = (p as usize) < self.sinks || p as usize >= from;
        }
    }
}
