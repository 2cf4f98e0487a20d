//! Round-to-nearest quantisation per token: groups run along the channels of one token, for keys and values alike.
//!
//! x ~ zero + scale * code, scale = (max - min) / (2^bits - 1), zero = min, both f16. This is the RTN baseline of
//! MiniCache's Table 1 and the per-token baseline of KIVI (Liu et al. 2024, arXiv 2402.02750, section 3.1).

use super::quantised::{quant_method, quant_settings};
use super::{Method, Stored};
use crate::layered::Plan;
use crate::settings::{Axis, Checked, ModelShape, Quant};
use crate::{Resources, Result};

quant_settings! {
    /// Round-to-nearest quantisation per token.
    Rtn {}
}

impl Rtn {
    pub(super) const ABOUT: &'static str = "round-to-nearest quantisation per token";

    fn own() -> Quant {
        Quant { residual: 0, ..Quant::default() }
    }
}

impl Method for Rtn {
    quant_method!(Axis::Token, Axis::Token);

    fn validate(&self) -> Checked {
        self.check()
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        Ok(self.stored().unmerged(shape))
    }
}
