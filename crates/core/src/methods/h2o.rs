//! H2O (Zhang et al. 2023, arXiv 2306.14048): a window of recent tokens and the heavy hitters, the older tokens that
//! have received the most attention so far, summed over all queries and the query heads of a KV head; each head
//! keeps its own.

use std::ops::Range;

use super::{Method, evicting_method};
use crate::account::{Nominal, nominal_kept};
use crate::cache::KvCache;
use crate::evicting::{Evict, Held, drop_least, evicting};
use crate::settings::{Budget, Checked, ModelShape, StoreType};
use crate::{Resources, Result};

/// Heavy hitters and recent tokens only.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct H2o {
    /// The storage type.
    pub dtype: StoreType,
    /// Newest tokens kept.
    pub recent: Budget,
    /// Heavy hitters kept.
    pub heavy: Budget,
}

impl Default for H2o {
    fn default() -> Self {
        Self { dtype: StoreType::F16, recent: Budget::Fraction(0.1), heavy: Budget::Fraction(0.1) }
    }
}

impl H2o {
    pub(super) const ABOUT: &'static str =
        "recent tokens and those that received most attention; the rest is dropped (H2O)";
}

impl Method for H2o {
    evicting_method!("h2o", by_attention);

    fn validate(&self) -> Checked {
        self.recent.validate("recent")?;
        self.heavy.validate("heavy")
    }

    fn build(&self, shape: &ModelShape, _: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(evicting(shape, self.dtype, self.clone()))
    }

    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let heavy = self.heavy.resolve(context);
        let recent = self.recent.resolve(context).max(1);
        Some(nominal_kept(self.dtype, [(recent, "recent tokens"), (heavy, "heavy hitters")], shape, context))
    }
}

impl Evict for H2o {
    fn counted(&self, _: usize, tokens: usize) -> Range<usize> {
        0..tokens
    }

    fn remembers(&self) -> bool {
        true
    }

    fn keep(&self, held: &Held<'_>, keep: &mut [bool]) {
        let (positions, seen) = (held.positions, held.seen());
        let from = seen.saturating_sub(self.recent.resolve(seen).max(1));
        let older = (0..positions.len()).filter(|&i| (positions[i] as usize) < from).collect();
        drop_least(older, self.heavy.resolve(seen), held, |i| held.received[i], keep);
    }
}
