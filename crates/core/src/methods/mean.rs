//! The mean of a pair's states for both layers: the simple baseline of MiniCache's Figure 2a. No magnitudes, no
//! retained tokens.

use std::sync::Arc;

use minicache_config::{CacheSpec, ModelShape};

use crate::layered::Plan;
use crate::merge::Mean;
use crate::{Resources, Result};

pub(super) const ABOUT: &str = "pairs of layers share the mean of their states";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
    super::merged(spec, shape, resources, Arc::new(Mean), None)
}
