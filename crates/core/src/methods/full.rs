//! The full cache: every state of every layer, exact in the storage type. The yardstick of every other method.

use super::{Method, Stored};
use crate::layered::Plan;
use crate::settings::{Checked, ModelShape, StoreType};
use crate::{Resources, Result};

/// Every state, exact in the storage type.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Full {
    /// The storage type.
    pub dtype: StoreType,
}

impl Full {
    pub(super) const ABOUT: &'static str = "every state, f16 (or f32): the yardstick";
}

impl Method for Full {
    fn validate(&self) -> Checked {
        Ok(())
    }

    fn stored(&self) -> Stored {
        Stored::exact(self.dtype)
    }

    fn dtype(&mut self) -> &mut StoreType {
        &mut self.dtype
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        Ok(self.stored().unmerged(shape))
    }
}
