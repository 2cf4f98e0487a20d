//! KIVI (Liu et al. 2024, arXiv 2402.02750): keys are quantised per channel over groups of tokens, because their
//! outliers sit in fixed channels; values per token; the newest tokens stay in full precision until a group is full.

use minicache_config::{Axis, CacheSpec, ModelShape};

use crate::layered::Plan;

pub(super) const ABOUT: &str = "keys per channel, values per token, residual window in full precision (KIVI)";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape) -> Plan {
    super::unmerged(spec, shape, super::schemes(spec, Axis::Channel, Axis::Token))
}
