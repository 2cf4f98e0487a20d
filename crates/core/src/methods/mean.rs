//! The mean of a pair's states for both layers: the simple baseline of MiniCache's Figure 2a. No magnitudes, no
//! retained tokens.

use std::sync::Arc;

use super::pairing::{check_pair_settings, pair_method, pair_settings};
use super::Method;
use crate::layered::Plan;
use crate::merge::{self, Merge};
use crate::settings::{Checked, ModelShape};
use crate::{Resources, Result};

pair_settings! {
    /// Pairs of layers share their mean.
    Mean {}
}

impl Mean {
    pub(super) const ABOUT: &'static str = "pairs of layers share the mean of their states";
}

impl Method for Mean {
    pair_method!();

    fn validate(&self) -> Checked {
        check_pair_settings!(self)
    }

    fn plan(&self, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
        let merge: Arc<dyn Merge> = Arc::new(merge::Mean);
        self.paired().plan(&self.stored(), shape, resources, &merge, None)
    }
}
