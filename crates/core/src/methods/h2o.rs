//! H2O (Zhang et al. 2023, arXiv 2306.14048): a window of recent tokens and the heavy hitters, the older tokens that
//! have received the most attention so far, summed over all queries and the query heads of a KV head; each head
//! keeps its own.

use minicache_config::{Budget, CacheSpec};

use crate::evicting::Evict;

pub(super) const ABOUT: &str =
    "recent tokens and those that received most attention; the rest is dropped (H2O)";

#[derive(Clone)]
pub(super) struct HeavyHitters {
    heavy: Budget,
    recent: Budget,
}

pub(super) fn policy(spec: &CacheSpec) -> HeavyHitters {
    HeavyHitters { heavy: spec.heavy, recent: spec.recent }
}

impl Evict for HeavyHitters {
    fn keep(&self, positions: &[u32], attention: &[f32], seen: usize, keep: &mut [bool]) {
        let from = seen.saturating_sub(self.recent.resolve(seen).max(1));
        let mut older: Vec<usize> =
            (0..positions.len()).filter(|&i| (positions[i] as usize) < from).collect();
        let heavy = self.heavy.resolve(seen);
        if older.len() > heavy {
            // Ties go to the older token, so that the outcome does not depend on the order of the slots.
            let order = |&i: &usize, &j: &usize| {
                attention[j].total_cmp(&attention[i]).then(positions[i].cmp(&positions[j]))
            };
            older.sort_unstable_by(order);
            older[heavy..].iter().for_each(|&i| keep[i] = false);
        }
    }

    fn needs_attention(&self) -> bool {
        true
    }
}
