//! MiniCache (Liu et al. 2024, arXiv 2405.14366): pairs of adjacent layers share the SLERP of their directions; each
//! keeps its magnitudes; the tokens whose directions differ most are retained exactly in both layers.
//!
//! x_a ~ ||x_a|| e, x_b ~ ||x_b|| e, e = slerp(x_a/||x_a||, x_b/||x_b||; t). Quantisation on top acts on e.

use std::sync::Arc;

use minicache_config::{CacheSpec, ModelShape};

use crate::layered::Plan;
use crate::merge::Slerp;
use crate::{Resources, Result};

pub(super) const ABOUT: &str =
    "pairs share the SLERP of their directions; magnitudes and distinct tokens apart (MiniCache)";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
    super::merged(spec, shape, resources, Arc::new(Slerp { t: spec.t }), Some(spec.retention.clone()))
}
