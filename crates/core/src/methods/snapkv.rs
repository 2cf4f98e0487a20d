//! SnapKV (Li et al. 2024, arXiv 2404.14469): of the prompt, each KV head keeps the last tokens, the observation window,
//! and those older ones that the window's queries look at most; all tokens after the prompt are kept.
//!
//! The score of an older token is the attention that it receives from the queries of the window, summed over them and
//! over the query heads of the KV head, and then averaged over `kernel` tokens around it, so that what stands beside
//! something important stays with it. (Where query heads share a KV head the paper's code repeats keys; the mean over
//! them is what its authors propose and kvpress does.) A prompt is the first step, so it has to come in one.

use std::ops::Range;

use super::{Method, evicting_method};
use crate::account::{Nominal, nominal_kept};
use crate::cache::KvCache;
use crate::evicting::{Evict, Held, drop_least, evicting};
use crate::settings::bounds::{MOST_TOKENS, check_number};
use crate::settings::{Budget, Checked, ModelShape, SettingError, StoreType};
use crate::{Resources, Result};

/// Prompt tokens that the last queries look at (SnapKV).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct SnapKv {
    /// The storage type.
    pub dtype: StoreType,
    /// Tokens of the prompt kept, those of the window among them.
    pub kept: Budget,
    /// Last tokens of the prompt, whose queries decide; always kept.
    pub window: usize,
    /// Tokens that scores are averaged over; odd.
    pub kernel: usize,
}

impl Default for SnapKv {
    /// The window and the kernel of the paper's LongBench runs with 1,024 tokens.
    fn default() -> Self {
        Self { dtype: StoreType::F16, kept: Budget::Fraction(0.2), window: 32, kernel: 7 }
    }
}

impl SnapKv {
    pub(super) const ABOUT: &'static str =
        "prompt tokens that its last queries attend to; later tokens are kept (SnapKV)";
}

impl Method for SnapKv {
    evicting_method!("snapkv", by_attention);

    fn validate(&self) -> Checked {
        self.kept.validate("kept")?;
        check_number("window", self.window, 1..=MOST_TOKENS)?;
        check_number("kernel", self.kernel, 1..=MOST_TOKENS)?;
        if self.kernel.is_multiple_of(2) {
            return Err(SettingError::new("kernel", format!("must be odd, not {}", self.kernel)));
        }
        Ok(())
    }

    fn build(&self, shape: &ModelShape, _: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(evicting(shape, self.dtype, self.clone()))
    }

    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let window = self.window.min(context);
        let older = self.kept.resolve(context).saturating_sub(window);
        Some(nominal_kept(self.dtype, [(window, "last tokens"), (older, "others")], shape, context))
    }
}

impl Evict for SnapKv {
    fn counted(&self, len: usize, tokens: usize) -> Range<usize> {
        if len > 0 { 0..0 } else { tokens.saturating_sub(self.window)..tokens }
    }

    fn keep(&self, held: &Held<'_>, keep: &mut [bool]) {
        let older = held.seen().saturating_sub(self.window);
        if held.len > 0 || older == 0 {
            return;
        }
        let most = self.kept.resolve(held.seen()).saturating_sub(self.window);
        let received = held.received.get(..older).unwrap_or(&[]);
        let score = |i: usize| -> f32 {
            let around = i.saturating_sub(self.kernel / 2)..(i + self.kernel / 2 + 1).min(older);
            received.get(around).unwrap_or(&[]).iter().sum()
        };
        let scores: Vec<f32> = (0..older).map(score).collect();
        drop_least((0..older).collect(), most, held, |i| scores[i], keep);
    }
}
