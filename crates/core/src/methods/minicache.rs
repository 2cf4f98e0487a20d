//! MiniCache (Liu et al. 2024, arXiv 2405.14366): pairs of adjacent layers share the SLERP of their directions; each
//! keeps its magnitudes; the tokens whose directions differ most are retained exactly in both layers.
//!
//! x_a ~ ||x_a|| e, x_b ~ ||x_b|| e, e = slerp(x_a/||x_a||, x_b/||x_b||; t). Quantisation on top acts on e.

use std::sync::Arc;

use super::pairing::{check_pair_settings, pair_method, pair_settings};
use super::Method;
use crate::layered::Plan;
use crate::merge::{Merge, Slerp};
use crate::settings::bounds::check_unit;
use crate::settings::{Checked, ModelShape, Retention};
use crate::{Resources, Result};

pair_settings! {
    /// Pairs share the SLERP of their directions (MiniCache).
    MiniCache {
        /// SLERP parameter, 0..=1: 0 is the shallower layer, 1 the deeper.
        t: f64 = 0.6,
        /// Token retention.
        retention: Retention = Retention::default(),
    }
}

impl MiniCache {
    pub(super) const ABOUT: &'static str =
        "pairs share the SLERP of their directions; magnitudes and distinct tokens apart (MiniCache)";
}

impl Method for MiniCache {
    pair_method!();

    fn validate(&self) -> Checked {
        check_unit("t", self.t)?;
        check_unit("retention.gamma", self.retention.gamma)?;
        check_pair_settings!(self)
    }

    fn plan(&self, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
        let merge: Arc<dyn Merge> = Arc::new(Slerp { t: self.t });
        self.paired().plan(&self.stored(), shape, resources, &merge, Some(&self.retention))
    }
}
