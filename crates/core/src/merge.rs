//! Merge functions: two vectors of adjacent layers to one shared vector and two magnitudes.

use std::f32::consts::PI;

/// What merging a pair of vectors gives besides the shared vector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merged {
    /// Factor that restores the shallower layer's vector.
    pub magnitude_a: f32,
    /// Factor that restores the deeper layer's vector.
    pub magnitude_b: f32,
    /// Angle between the two over pi, in 0..=1.
    pub distance: f32,
    /// The pair has no meaningful shared direction (a zero vector, or nearly opposite) and must be kept apart.
    pub apart: bool,
}

/// A merge function.
pub trait Merge: Send + Sync {
    /// Writes the shared vector of `a` (shallower) and `b` (deeper) to `shared`; all of one length.
    fn merge(&self, a: &[f32], b: &[f32], shared: &mut [f32]) -> Merged;
    /// Whether the magnitudes have to be stored (they are 1 otherwise).
    fn has_magnitudes(&self) -> bool;
}

/// Dot product and squared norms, accumulated in f64: the angle of nearly parallel vectors is all in the last digits.
pub(crate) fn products(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    // Sums side by side, which a compiler turns into vectors.
    const LANES: usize = 8;
    let mut sums = [[0.0; LANES]; 3];
    let mut add = |lane: usize, x: f32, y: f32| {
        let (x, y) = (f64::from(x), f64::from(y));
        sums[0][lane] += x * y;
        sums[1][lane] += x * x;
        sums[2][lane] += y * y;
    };
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (lane, (&x, &y)) in a.remainder().iter().zip(b.remainder()).enumerate() {
        add(lane, x, y);
    }
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            add(lane, a[lane], b[lane]);
        }
    }
    let [ab, aa, bb] = sums.map(|s| s.iter().sum());
    (ab, aa, bb)
}

/// Angle between `a` and `b` in 0..=pi, pi/2 if either is zero.
fn angle(ab: f64, aa: f64, bb: f64) -> f64 {
    let norm = (aa * bb).sqrt();
    if norm > 0.0 { (ab / norm).clamp(-1.0, 1.0).acos() } else { std::f64::consts::FRAC_PI_2 }
}

/// Lengths of `a` and `b`: the magnitudes by themselves, for timing.
pub(crate) fn norms(a: &[f32], b: &[f32]) -> (f64, f64) {
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    (square(a).sqrt(), square(b).sqrt())
}

/// Angle between `a` and `b` of known lengths: the distance by itself, for timing.
pub(crate) fn distance(a: &[f32], b: &[f32], norm_a: f64, norm_b: f64) -> f64 {
    let ab = a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    angle(ab, norm_a * norm_a, norm_b * norm_b)
}

/// `(a + b) / 2` for both layers: the baseline of MiniCache's Figure 2a.
#[derive(Debug, Clone, Copy)]
pub struct Mean;

impl Merge for Mean {
    fn merge(&self, a: &[f32], b: &[f32], shared: &mut [f32]) -> Merged {
        for ((s, x), y) in shared.iter_mut().zip(a).zip(b) {
            *s = 0.5 * (x + y);
        }
        let (ab, aa, bb) = products(a, b);
        let distance = angle(ab, aa, bb) as f32 / PI;
        Merged { magnitude_a: 1.0, magnitude_b: 1.0, distance, apart: false }
    }

    fn has_magnitudes(&self) -> bool {
        false
    }
}

/// The direction of the longer vector, each layer with its own magnitude: the max-norm row of MiniCache's merge
/// function ablation.
#[derive(Debug, Clone, Copy)]
pub struct MaxNorm;

impl Merge for MaxNorm {
    fn merge(&self, a: &[f32], b: &[f32], shared: &mut [f32]) -> Merged {
        let (ab, aa, bb) = products(a, b);
        let (longer, norm) = if aa >= bb { (a, aa.sqrt()) } else { (b, bb.sqrt()) };
        let factor = if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 };
        for (s, x) in shared.iter_mut().zip(longer) {
            *s = x * factor;
        }
        let distance = angle(ab, aa, bb) as f32 / PI;
        Merged { magnitude_a: aa.sqrt() as f32, magnitude_b: bb.sqrt() as f32, distance, apart: false }
    }

    fn has_magnitudes(&self) -> bool {
        true
    }
}

/// Spherical linear interpolation of the directions (MiniCache, section 4.1, equation 3):
/// e = sin((1-t)W)/sin W * a/||a|| + sin(tW)/sin W * b/||b||, W the angle between a and b.
#[derive(Debug, Clone, Copy)]
pub struct Slerp {
    /// 0 gives the direction of the shallower layer, 1 of the deeper.
    pub t: f64,
}

/// Below this sine of the angle SLERP's weights lose precision; linear interpolation differs by less than f32 shows.
const PARALLEL: f64 = 1e-6;
/// An angle this close to pi has no shared direction: tiny changes of either vector turn it anywhere.
const OPPOSITE: f64 = 1e-4;

impl Slerp {
    /// The shared direction of two vectors of known lengths and angle.
    pub(crate) fn direction(&self, a: &[f32], b: &[f32], norms: (f64, f64), angle: f64, shared: &mut [f32]) {
        let sine = angle.sin();
        let (weight_a, weight_b) = if sine > PARALLEL {
            (((1.0 - self.t) * angle).sin() / sine, (self.t * angle).sin() / sine)
        } else {
            (1.0 - self.t, self.t)
        };
        let (wa, wb) = (weight_a / norms.0, weight_b / norms.1);
        let mut length = 0.0;
        for ((s, &x), &y) in shared.iter_mut().zip(a).zip(b) {
            let e = wa * f64::from(x) + wb * f64::from(y);
            length += e * e;
            *s = e as f32;
        }
        // Unit by construction but for rounding (and for the linear fallback): normalise what rounding left.
        let factor = (1.0 / length.sqrt()) as f32;
        shared.iter_mut().for_each(|s| *s *= factor);
    }
}

impl Merge for Slerp {
    fn merge(&self, a: &[f32], b: &[f32], shared: &mut [f32]) -> Merged {
        let (ab, aa, bb) = products(a, b);
        let (norm_a, norm_b) = (aa.sqrt(), bb.sqrt());
        let angle = angle(ab, aa, bb);
        let distance = angle as f32 / PI;
        let merged =
            Merged { magnitude_a: norm_a as f32, magnitude_b: norm_b as f32, distance, apart: false };
        if norm_a == 0.0 || norm_b == 0.0 || angle > std::f64::consts::PI - OPPOSITE {
            shared.fill(0.0);
            return Merged { apart: true, ..merged };
        }
        self.direction(a, b, (norm_a, norm_b), angle, shared);
        merged
    }

    fn has_magnitudes(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn norm(x: &[f32]) -> f32 {
        x.iter().map(|v| v * v).sum::<f32>().sqrt()
    }

    fn vector() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-10.0f32..10.0, 24)
    }

    proptest! {
        #[test]
        fn slerp_directions_are_unit_and_in_the_plane(a in vector(), b in vector(), t in 0.0f64..=1.0) {
            prop_assume!(norm(&a) > 1e-3 && norm(&b) > 1e-3);
            let mut e = vec![0.0; 24];
            let m = Slerp { t }.merge(&a, &b, &mut e);
            prop_assume!(!m.apart);
            prop_assert!((norm(&e) - 1.0).abs() < 1e-5);
            prop_assert!((m.magnitude_a - norm(&a)).abs() < 1e-4 * norm(&a));
            // The angle from a to e is t W.
            let cos: f32 = e.iter().zip(&a).map(|(x, y)| x * y / norm(&a)).sum();
            let want = (t as f32 * m.distance * PI).cos();
            prop_assert!((cos - want).abs() < 1e-4, "{cos} {want}");
        }

        #[test]
        fn equal_layers_are_restored_exactly(a in vector(), scale in 0.1f32..10.0) {
            prop_assume!(norm(&a) > 1e-2);
            let b: Vec<f32> = a.iter().map(|x| x * scale).collect();
            let mut e = vec![0.0; 24];
            let m = Slerp { t: 0.6 }.merge(&a, &b, &mut e);
            for (x, s) in a.iter().zip(&e) {
                prop_assert!((x - s * m.magnitude_a).abs() < 1e-4 * norm(&a));
            }
        }
    }

    #[test]
    fn zero_and_opposite_vectors_are_kept_apart() {
        let a = [1.0, 2.0, 3.0];
        let mut e = [0.0; 3];
        assert!(Slerp { t: 0.6 }.merge(&a, &[0.0; 3], &mut e).apart);
        assert!(Slerp { t: 0.6 }.merge(&a, &[-2.0, -4.0, -6.0], &mut e).apart);
        assert!(!MaxNorm.merge(&a, &[0.0; 3], &mut e).apart);
    }

    #[test]
    fn max_norm_takes_the_longer_direction() {
        let mut e = [0.0; 2];
        let m = MaxNorm.merge(&[3.0, 0.0], &[0.0, 4.0], &mut e);
        assert_eq!((e, m.magnitude_a, m.magnitude_b, m.distance), ([0.0, 1.0], 3.0, 4.0, 0.5));
    }
}
