//! Merging as well as one shared direction allows: the leading singular vector of a pair's two states, each layer with
//! its own signed coefficient.
//!
//! What a merged pair stores of a token, a direction and two numbers, is a rank-one approximation of the 2 x d matrix of
//! its two states, and by Eckart and Young (1936) the best one has the matrix's leading singular vector e as direction
//! and the projections <x_a, e>, <x_b, e> as coefficients; what it loses is the square of the smaller singular value.
//! SLERP's direction is another one (it does not know which state is the longer), and its coefficients, the states' own
//! norms, are the best only where both states point along e: of a state at angle W from e a coefficient of ||x|| loses
//! 2 (1 - cos W) ||x||^2, the projection sin^2 W ||x||^2. A key of full length in a wrong direction makes scores that
//! nothing asked for.
//!
//! With the Gram matrix G = [aa ab; ab bb] and its larger eigenvalue l, eigenvector (u_a, u_b):
//! e = (u_a x_a + u_b x_b) / sqrt(l), <x_a, e> = sqrt(l) u_a, <x_b, e> = sqrt(l) u_b. The same bytes as MiniCache.

use std::sync::Arc;

use super::Method;
use super::pairing::{check_pair_settings, pair_method, pair_settings};
use crate::layered::Plan;
use crate::merge::{Merge, Merged, products};
use crate::settings::bounds::check_unit;
use crate::settings::{Checked, ModelShape, Retention, RetentionRule};
use crate::{Resources, Result};

pair_settings! {
    /// Pairs share the leading singular vector of their states.
    RankOne {
        /// Token retention, by the share of a token's energy that is lost: twice the smaller of the squared singular
        /// values over their sum, in 0..=1.
        retention: Retention =
            Retention { rule: RetentionRule::TopFraction, ..Retention::default() },
    }
}

impl RankOne {
    pub(super) const ABOUT: &'static str =
        "pairs share the leading singular vector of their states, with signed coefficients: the best one direction";
}

impl Method for RankOne {
    pair_method!();

    fn validate(&self) -> Checked {
        check_unit("retention.gamma", self.retention.gamma)?;
        check_pair_settings!(self)
    }

    fn plan(&self, shape: &ModelShape, resources: &Resources) -> Result<Plan> {
        let merge: Arc<dyn Merge> = Arc::new(LeadingVector);
        self.paired().plan(&self.stored(), shape, resources, &merge, Some(&self.retention))
    }
}

/// The merge function.
struct LeadingVector;

impl Merge for LeadingVector {
    fn merge(&self, a: &[f32], b: &[f32], shared: &mut [f32]) -> Merged {
        let (ab, aa, bb) = products(a, b);
        let half = 0.5 * (aa - bb);
        let root = half.hypot(ab);
        let larger = 0.5 * (aa + bb) + root;
        if larger <= 0.0 {
            shared.fill(0.0);
            return Merged { magnitude_a: 0.0, magnitude_b: 0.0, distance: 0.0, apart: false };
        }
        // Of the two ways to write the eigenvector the one without cancellation.
        let (u_a, u_b) = if half >= 0.0 { (root + half, ab) } else { (ab, root - half) };
        let length = u_a.hypot(u_b);
        let (u_a, u_b) = if length > 0.0 { (u_a / length, u_b / length) } else { (1.0, 0.0) };
        let singular = larger.sqrt();
        let (weight_a, weight_b) = (u_a / singular, u_b / singular);
        let mut square = 0.0;
        for ((s, &x), &y) in shared.iter_mut().zip(a).zip(b) {
            let e = weight_a * f64::from(x) + weight_b * f64::from(y);
            square += e * e;
            *s = e as f32;
        }
        // Unit by construction but for rounding: normalise what rounding left.
        let factor = (1.0 / square.sqrt()) as f32;
        shared.iter_mut().for_each(|s| *s *= factor);
        let smaller = (0.5 * (aa + bb) - root).max(0.0);
        Merged {
            magnitude_a: (singular * u_a) as f32,
            magnitude_b: (singular * u_b) as f32,
            distance: (2.0 * smaller / (aa + bb)) as f32,
            apart: false,
        }
    }

    fn has_magnitudes(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::Slerp;
    use proptest::prelude::*;

    fn vector() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-10.0f32..10.0, 24)
    }

    /// Squared error of both states as they are restored.
    fn lost(a: &[f32], b: &[f32], e: &[f32], merged: &Merged) -> f64 {
        let error = |x: &[f32], m: f32| -> f64 {
            x.iter().zip(e).map(|(x, e)| (f64::from(*x) - f64::from(m) * f64::from(*e)).powi(2)).sum()
        };
        error(a, merged.magnitude_a) + error(b, merged.magnitude_b)
    }

    proptest! {
        #[test]
        fn no_other_direction_loses_less(a in vector(), b in vector(), scale in 0.0f32..3.0, t in 0.0f64..1.0) {
            let b: Vec<f32> = b.iter().map(|x| x * scale).collect();
            let mut e = vec![0.0; a.len()];
            let merged = LeadingVector.merge(&a, &b, &mut e);
            let ours = lost(&a, &b, &e, &merged);
            let energy: f64 = a.iter().chain(&b).map(|x| f64::from(*x).powi(2)).sum();
            prop_assert!((e.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
            prop_assert!((ours / energy - f64::from(merged.distance) / 2.0).abs() < 1e-5);
            let mut other = vec![0.0; a.len()];
            let slerp = Slerp { t }.merge(&a, &b, &mut other);
            prop_assert!(ours <= lost(&a, &b, &other, &slerp) + 1e-5 * energy);
            // Any direction between the two, with its best coefficients.
            let direction: Vec<f64> =
                a.iter().zip(&b).map(|(x, y)| (1.0 - t) * f64::from(*x) + (2.0 * t - 1.0) * f64::from(*y)).collect();
            let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
            let kept = |x: &[f32]| (x.iter().zip(&direction).map(|(x, e)| f64::from(*x) * e).sum::<f64>() / norm).powi(2);
            prop_assert!(ours <= energy - kept(&a) - kept(&b) + 1e-5 * energy);
        }
    }

    #[test]
    fn states_along_one_line_come_back_whatever_their_signs() {
        let a = [3.0f32, -4.0, 0.0];
        for factor in [2.0f32, -0.5, 0.0] {
            let b = a.map(|x| x * factor);
            let mut e = [0.0; 3];
            let merged = LeadingVector.merge(&a, &b, &mut e);
            assert!(merged.distance < 1e-6 && lost(&a, &b, &e, &merged) < 1e-8, "{factor}: {merged:?}");
            let swapped = LeadingVector.merge(&b, &a, &mut e);
            assert!(lost(&b, &a, &e, &swapped) < 1e-8, "{factor}: {swapped:?}");
        }
        let mut e = [1.0; 3];
        let merged = LeadingVector.merge(&[0.0; 3], &[0.0; 3], &mut e);
        assert_eq!((merged.magnitude_a, merged.magnitude_b, merged.apart, e), (0.0, 0.0, false, [0.0; 3]));
        // Orthogonal and equally long: either direction loses half.
        let merged = LeadingVector.merge(&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &mut e);
        assert!((merged.distance - 1.0).abs() < 1e-6 && (lost(&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &e, &merged) - 1.0).abs() < 1e-6);
    }
}
