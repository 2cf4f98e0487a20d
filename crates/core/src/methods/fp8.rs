//! Floats of eight bits, as the field's runtimes keep their caches (`kv_cache_dtype = fp8_e4m3`): each KV head's vector
//! of a token is divided by a scale of its own, so that its largest number becomes the format's largest, and rounded.
//!
//! x ~ scale * e4m3(x / scale), scale = max |x| / 448, kept as f16; the format is that of Micikevicius et al. 2022
//! (arXiv 2209.05433). Runtimes take one scale for a whole layer; one per token and head costs 2 bytes and saves
//! whoever comes after an outlier. <q, x> = scale <q, e>, and sum_i p_i x_i = sum_i (p_i scale_i) e_i.

use super::{Method, Stored};
use crate::layered::Plan;
use crate::scaled::Scaled;
use crate::settings::{Checked, ModelShape, StoreType};
use crate::store::Side;
use crate::{Resources, Result};

/// Floats of eight bits with a scale per token and KV head.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Fp8 {
    /// Storage type of the scales.
    pub dtype: StoreType,
}

impl Fp8 {
    pub(super) const ABOUT: &'static str = "floats of eight bits (e4m3) with a scale per token and KV head";
}

impl Method for Fp8 {
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
        let lane = |side| Box::new(Scaled::new(shape, self.dtype, side));
        Ok(Plan::unmerged(lane(Side::Keys), lane(Side::Values)))
    }

    fn nominal(&self, shape: &ModelShape, _: usize) -> Option<crate::Nominal> {
        let scale = 8 * self.dtype.bytes();
        let bits = 8.0 + scale as f64 / shape.head_dim as f64;
        let lines = vec![
            format!("8 bits, and {scale} for the scale of {} numbers: {bits:.3} bits a number", shape.head_dim),
            format!("16 / {bits:.3} = {:.2}x", 16.0 / bits),
        ];
        Some(crate::Nominal { ratio: 16.0 / bits, lines })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernels::f8::LARGEST;

    #[test]
    fn numbers_keep_three_bits_of_mantissa_beside_the_largest_of_their_head() {
        let shape = ModelShape { layers: 1, heads: 2, kv_heads: 2, head_dim: 16, window: None, scale: 1.0, ..ModelShape::PLAIN };
        for dtype in [StoreType::F16, StoreType::F32] {
            let mut cache = Fp8 { dtype }.build(&shape, &Resources::default()).unwrap();
            let states: Vec<f32> = (0..32 * 40).map(|i| (i as f32 * 0.37).sin() * 10f32.powi(i / 320)).collect();
            cache.append(0, &states, &states).unwrap();
            cache.finish_step().unwrap();
            let restored = cache.restored(0).unwrap();
            let vectors = states.chunks_exact(16).zip(restored.keys.chunks_exact(16));
            for (want, got) in vectors {
                let top = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (want, got) in want.iter().zip(got) {
                    // Half a step of the mantissa, or of the numbers near zero.
                    let step = (want.abs() / 16.0).max(top / LARGEST / 1024.0);
                    assert!((want - got).abs() <= 1.001 * step, "{want} {got} beside {top}");
                }
            }
            assert_eq!(restored.keys, restored.values);
        }
    }
}
