//! Cross-layer latents in a calibrated basis: see [`crate::latent`].

use crate::latent::LatentCache;
use crate::{Error, Resources, Result};

pub(super) const ABOUT: &str =
    "cross-layer latents in a calibrated basis; attention works on the coefficients";

pub(super) fn cache(resources: &Resources) -> Result<LatentCache> {
    let message = "method = \"latent\" needs a calibrated basis of the model";
    let plan = resources.latent.clone().ok_or_else(|| Error::Missing(message.to_string()))?;
    Ok(LatentCache::new(plan))
}
