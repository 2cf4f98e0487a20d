//! The direction of the longer state for both layers, each with its own magnitude: "max-norm" in MiniCache's merge
//! function ablation. No retained tokens.

use std::sync::Arc;

use minicache_config::{CacheSpec, ModelShape};

use crate::layered::Plan;
use crate::merge::MaxNorm;
use crate::{Resources, Result};

pub(super) const ABOUT: &str = "pairs share the direction of the longer state, each with its own magnitude";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
    super::merged(spec, shape, resources, Arc::new(MaxNorm), None)
}
