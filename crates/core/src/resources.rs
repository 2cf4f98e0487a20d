//! What some caches need of the model besides its shape.

use std::ops::Range;
use std::sync::Arc;

use crate::{Error, Result};

/// The rotary embedding of a sequence: its frequencies, which may depend on how long it is going to be.
pub trait Rotary: Send + Sync {
    /// Writes the cosines, then the sines of the angles of `position` to `out` (`rotary_dim` numbers).
    fn angles_into(&self, position: usize, out: &mut [f32]);
    /// Rotates one head vector (`head_dim` numbers, half-split order: pair j is (j, j + rotary_dim/2)) from position 0
    /// to `position`.
    fn rotate(&self, position: usize, x: &mut [f32]);
    /// The inverse of [`Rotary::rotate`].
    fn unrotate(&self, position: usize, x: &mut [f32]);
    /// Numbers of a head that are rotated (the first ones); the rest pass through.
    fn rotary_dim(&self) -> usize;
}

impl dyn Rotary {
    /// Cosines, then sines, averaged over `positions`.
    pub fn mean_angles(&self, positions: Range<usize>) -> Vec<f32> {
        let mut sums = vec![0.0_f64; self.rotary_dim()];
        let mut angles = vec![0.0; sums.len()];
        let count = positions.len() as f64;
        for position in positions {
            self.angles_into(position, &mut angles);
            sums.iter_mut().zip(&angles).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        sums.iter().map(|sum| (sum / count) as f32).collect()
    }
}

/// Shared, read-only helpers of a cache.
#[derive(Clone, Default)]
pub struct Resources {
    /// The model's rotary embedding (`key_space = "pre_rope"`, some latents).
    pub rotary: Option<Arc<dyn Rotary>>,
    /// The transforms of `method = "latent"`, made once per model and specification.
    pub latent: Option<Arc<crate::latent::LatentPlan>>,
}

impl Resources {
    /// The transforms of `method = "latent"`.
    ///
    /// # Errors
    /// There are none.
    pub fn latent_plan(&self) -> Result<&Arc<crate::latent::LatentPlan>> {
        let message = "method = \"latent\" needs a calibrated basis of the model";
        self.latent.as_ref().ok_or_else(|| Error::Missing(message.to_string()))
    }
}
