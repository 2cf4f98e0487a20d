//! Round-to-nearest quantisation per token after a Hadamard rotation of each head: outliers that sit in a few channels
//! are spread over all of them before scales are taken.
//!
//! x ~ H^T (zero + scale * code), with code, scale and zero of H x in groups along the channels of one token, as in
//! [`crate::Rtn`]. <q, H^T z> = <H q, z> and sum_i p_i H^T z_i = H^T (sum_i p_i z_i): the query and the output are
//! rotated once per step, and nothing is restored.
//!
//! The rotation of QuaRot's cache (Ashkboos et al. 2024, arXiv 2404.00456, section 4) and of RotateKV (Su et al. 2025,
//! arXiv 2501.16383). What differs: QuaRot folds the values' rotation into the weights and clips ranges to 0.95 of
//! their width, where this one rotates states and clips nothing; RotateKV rotates several heads together, in an order of
//! channels that it calibrates, before RoPE, and keeps the tokens of attention sinks exact, where this one rotates each
//! head as it is cached. Head sizes that are no power of two have the rotation of [`crate::turned`].

use super::quantised::{quant_method, quant_settings};
use super::{Method, Stored};
use crate::layered::Plan;
use crate::settings::{Axis, Checked, ModelShape, Quant};
use crate::store::Side;
use crate::turned::{Turned, Turning, turn};
use crate::{Resources, Result};

quant_settings! {
    /// Per-token quantisation of heads that are rotated by a Hadamard matrix.
    Rotated {}
}

impl Rotated {
    pub(super) const ABOUT: &'static str =
        "per-token quantisation of states rotated by a Hadamard matrix (as in QuaRot)";

    fn own() -> Quant {
        Quant { residual: 0, ..Quant::default() }
    }
}

impl Method for Rotated {
    quant_method!(Axis::Token, Axis::Token);

    fn validate(&self) -> Checked {
        self.check()
    }

    fn plan(&self, shape: &ModelShape, _: &Resources) -> Result<Plan> {
        let stored = self.stored();
        let hadamard = turn(Turning::Hadamard, shape.head_dim);
        let lane = |scheme, side| {
            Turned::boxed(hadamard.clone(), None, stored.store(shape, scheme, side))
        };
        let [keys, values] = stored.schemes();
        Ok(Plan::unmerged(lane(keys, Side::Keys), lane(values, Side::Values)))
    }

    fn shared_bytes(&self, shape: &ModelShape, _: usize) -> Result<usize> {
        Ok(turn(Turning::Hadamard, shape.head_dim).bytes())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;
    use crate::Rtn;
    use crate::cache::KvCache;

    /// Mean squared error of keys, relative to their square.
    fn error(cache: Box<dyn KvCache>, states: &[f32]) -> f64 {
        let mut cache = cache;
        cache.append(0, states, states).unwrap();
        cache.finish_step().unwrap();
        let restored = cache.restored(0).unwrap().keys;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = restored.iter().zip(states).map(|(a, b)| square(a - b)).sum();
        off / states.iter().map(|x| square(*x)).sum::<f64>()
    }

    /// Sylvester's construction over the norm, and codes by their definition in f64.
    #[test]
    fn states_come_back_as_the_formula_says() {
        const DIM: usize = 64;
        let hadamard = |x: &[f64]| {
            let mut x = x.to_vec();
            for half in [1, 2, 4, 8, 16, 32] {
                for i in (0..DIM).filter(|i| i & half == 0) {
                    (x[i], x[i + half]) = (x[i] + x[i + half], x[i] - x[i + half]);
                }
            }
            x.iter().map(|x| x / 8.0).collect::<Vec<f64>>()
        };
        let f16 = |x: f64| half::f16::from_f64(x).to_f64();
        let shape = ModelShape { heads: 2, kv_heads: 2, head_dim: DIM, ..ModelShape::PLAIN };
        let states: Vec<f32> = (0..50 * 2 * DIM).map(|i| (i as f32 * 0.831).sin()).collect();
        let quant = Some(Quant { bits: 3, group: 32, residual: 0, ..Quant::default() });
        // Beside f32 numbers nothing else is rounded.
        let settings = Rotated { quant, dtype: crate::settings::StoreType::F32, ..Rotated::default() };
        let mut cache = settings.build(&shape, &Resources::default()).unwrap();
        cache.append(0, &states, &states).unwrap();
        cache.finish_step().unwrap();
        let restored = cache.restored(0).unwrap();
        let mut off = 0;
        for (vector, got) in states.chunks_exact(DIM).zip(restored.values.chunks_exact(DIM)) {
            let mut turned = hadamard(&vector.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
            for group in turned.chunks_exact_mut(32) {
                let low = group.iter().copied().fold(f64::INFINITY, f64::min);
                let high = group.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let (scale, zero) = (f16((high - low) / 7.0), f16(low));
                group.iter_mut().for_each(|x| *x = zero + scale * ((*x - zero) / scale).round().clamp(0.0, 7.0));
            }
            let want = hadamard(&turned);
            // A number in the middle between two codes may go to either in f32.
            let close = want.iter().zip(got).all(|(want, got)| (want - f64::from(*got)).abs() < 1e-5);
            off += usize::from(!close);
        }
        assert!(off <= 1, "{off} of 100 vectors are others");
        assert_eq!(restored.keys, restored.values);
    }

    #[test]
    fn outliers_of_some_channels_cost_the_others_less_than_without_the_rotation() {
        let none = Resources::default();
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for head_dim in [64, 80, 128] {
            let shape = ModelShape { heads: 2, kv_heads: 2, head_dim, ..ModelShape::PLAIN };
            let mut states = Vec::new();
            for i in 0..100 * 2 * head_dim {
                let x: f32 = StandardNormal.sample(&mut rng);
                states.push(x + if i % head_dim == 5 { 12.0 } else { 0.0 });
            }
            for bits in [2, 3, 4] {
                let quant = Some(Quant { bits, group: 128, residual: 0, ..Quant::default() });
                let plain = Rtn { quant: quant.clone(), ..Rtn::default() }.build(&shape, &none).unwrap();
                let turned = Rotated { quant, ..Rotated::default() }.build(&shape, &none).unwrap();
                let (plain, turned) = (error(plain, &states), error(turned, &states));
                assert!(turned < 0.5 * plain, "{bits} bits of {head_dim}: {turned} and {plain}");
            }
        }
    }
}
