//! Round-to-nearest quantisation per token: groups run along the channels of one token, for keys and values alike.
//!
//! x ~ zero + scale * code, scale = (max - min) / (2^bits - 1), zero = min, both f16. This is the RTN baseline of
//! MiniCache's Table 1 and the per-token baseline of KIVI (Liu et al. 2024, arXiv 2402.02750, section 3.1).

use minicache_config::{Axis, CacheSpec, ModelShape};

use crate::layered::Plan;

pub(super) const ABOUT: &str = "round-to-nearest quantisation per token";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape) -> Plan {
    super::unmerged(spec, shape, super::schemes(spec, Axis::Token, Axis::Token))
}
