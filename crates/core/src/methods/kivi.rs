//! KIVI (Liu et al. 2024, arXiv 2402.02750): keys are quantised per channel over groups of tokens, because their
//! outliers sit in fixed channels; values per token; the newest tokens stay in full precision until a group is full.

use super::quantised::{quant_method, quant_settings};
use super::{Method, Stored};
use crate::layered::Plan;
use crate::settings::{Axis, Checked, ModelShape, Quant};
use crate::{Resources, Result};

quant_settings! {
    /// Keys per channel, values per token, with a residual window (KIVI).
    Kivi {}
}

impl Kivi {
    pub(super) const ABOUT: &'static str =
        "keys per channel, values per token, residual window in full precision (KIVI)";

    fn own() -> Quant {
        Quant::default()
    }
}

impl Method for Kivi {
    quant_method!(Axis::Channel, Axis::Token);

    fn validate(&self) -> Checked {
        self.check()
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        Ok(self.stored().unmerged(shape))
    }
}
