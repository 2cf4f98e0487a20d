//! The full cache: every state of every layer, exact in the storage type. The yardstick of every other method.

use minicache_config::{CacheSpec, ModelShape};

use crate::layered::Plan;

pub(super) const ABOUT: &str = "every state, f16 (or f32): the yardstick";

pub(super) fn plan(spec: &CacheSpec, shape: &ModelShape) -> Plan {
    super::unmerged(spec, shape, [super::exact(spec.dtype); 2])
}
