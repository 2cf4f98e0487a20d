//! What some caches need of the model besides its shape.

use std::sync::Arc;

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

/// Shared, read-only helpers of a cache.
#[derive(Clone, Default)]
pub struct Resources {
    /// The model's rotary embedding (`key_space = "pre_rope"`, some latents).
    pub rotary: Option<Arc<dyn Rotary>>,
    /// The transforms of `method = "latent"`, made once per model and specification.
    pub latent: Option<Arc<crate::latent::LatentPlan>>,
}
