//! The bases that latent caches of a loaded model take, and the transforms made from them.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use minicache_core::latent::{Basis, LatentPlan};
use minicache_core::{Latent, ModelShape};

use crate::{Error, Frequencies, Result, calibrate};

/// Bases with a specification that they are for, and plans by specification and frequencies: made once, shared by all
/// caches of the model.
#[derive(Default)]
pub(crate) struct Latents {
    bases: Mutex<Vec<(Latent, Arc<Basis>)>>,
    plans: Mutex<Vec<Planned>>,
}

/// A plan with what it is for.
struct Planned {
    spec: Latent,
    frequencies: Arc<Frequencies>,
    plan: Arc<LatentPlan>,
}

impl std::fmt::Debug for Latents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Latents")
    }
}

impl Latents {
    pub(crate) fn add(&self, spec: &Latent, basis: Basis) {
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        bases.retain(|(of, _)| !of.shares_basis(spec));
        bases.push((spec.clone(), Arc::new(basis)));
    }

    pub(crate) fn basis(&self, spec: &Latent) -> Option<Arc<Basis>> {
        let bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        bases.iter().find(|(of, _)| of.shares_basis(spec)).map(|(_, basis)| basis.clone())
    }

    pub(crate) fn plan(
        &self,
        spec: &Latent,
        shape: &ModelShape,
        frequencies: &Arc<Frequencies>,
        fingerprint: &str,
    ) -> Result<Arc<LatentPlan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        // Frequencies may depend on a sequence's length.
        let same = |p: &&Planned| p.spec == *spec && p.frequencies == *frequencies;
        if let Some(found) = plans.iter().find(same) {
            return Ok(found.plan.clone());
        }
        let basis = match &spec.basis {
            Some(path) => Arc::new(calibrate::load(Path::new(path), fingerprint, shape)?.0),
            None => self.basis(spec).ok_or_else(|| {
                Error::Calibration(
                    "method = \"latent\" needs a calibrated basis: experiments make one of [cache.calibration]; elsewhere name a file, `basis = \"FILE\"`"
                        .to_string(),
                )
            })?,
        };
        let plan = Arc::new(LatentPlan::new(spec, shape, &basis, frequencies.clone())?);
        plans.push(Planned { spec: spec.clone(), frequencies: frequencies.clone(), plan: plan.clone() });
        Ok(plan)
    }
}
