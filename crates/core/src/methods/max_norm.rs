//! The direction of the longer state for both layers, each with its own magnitude: "max-norm" in MiniCache's merge
//! function ablation. No retained tokens.

use std::sync::Arc;

use super::pairing::{check_pair_settings, pair_method, pair_settings};
use super::Method;
use crate::layered::Plan;
use crate::merge::{self, Merge};
use crate::settings::{Checked, ModelShape};
use crate::{Resources, Result};

pair_settings! {
    /// Pairs share the direction of the longer state, each with its own magnitude.
    MaxNorm {}
}

impl MaxNorm {
    pub(super) const ABOUT: &'static str =
        "pairs share the direction of the longer state, each with its own magnitude";
}

impl Method for MaxNorm {
    pair_method!();

    fn validate(&self) -> Checked {
        check_pair_settings!(self)
    }

    fn plan(&self, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
        let merge: Arc<dyn Merge> = Arc::new(merge::MaxNorm);
        self.paired().plan(&self.stored(), shape, resources, &merge, None)
    }
}
