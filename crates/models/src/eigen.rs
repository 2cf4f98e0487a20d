//! Eigendecompositions of symmetric matrices: small ones on the thread that asks, of which many do so at a time; large
//! ones, as groups of many layers and heads have them, on all threads.

use std::sync::Once;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, Par};

/// Rows from which on all threads take part.
const LARGE: usize = 2048;

/// Eigenvectors `(n, n)` in columns and eigenvalues `(n)`, ascending, of which the lower triangle is read; `None` where
/// there are none (numbers that are not finite).
pub(crate) fn symmetric(matrix: &Mat<f64>) -> Option<(Mat<f64>, Vec<f64>)> {
    // What else is asked of faer is small, and asked for many times side by side.
    static SMALL: Once = Once::new();
    SMALL.call_once(|| faer::set_global_parallelism(Par::Seq));
    let n = matrix.nrows();
    let par = if n < LARGE { Par::Seq } else { Par::rayon(0) };
    let (mut vectors, mut values) = (Mat::zeros(n, n), Diag::zeros(n));
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default());
    let mut room = MemBuffer::new(scratch);
    self_adjoint_evd(
        matrix.as_ref(),
        values.as_mut(),
        Some(vectors.as_mut()),
        par,
        MemStack::new(&mut room),
        Default::default(),
    )
    .ok()?;
    let values = (0..n).map(|c| values[c]).collect();
    Some((vectors, values))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_what_its_eigenvectors_make_of_it() {
        // A large one is cheap where it is the same block many times over.
        for n in [5, LARGE] {
            let entry = |r: usize, c: usize| match (r / 4 == c / 4, r == c) {
                (true, true) => 3.0 + (r % 4) as f64 + (r / 4) as f64 * 1e-3,
                (true, false) => 1.0 / (1 + r % 4 + c % 4) as f64,
                _ => 0.0,
            };
            let a = Mat::from_fn(n, n, entry);
            let (vectors, values) = symmetric(&a).unwrap();
            assert!(values.is_sorted());
            for c in [0, 1, n / 2, n - 1] {
                for r in (0..n).step_by(n.div_ceil(40)) {
                    let product: f64 = (0..n).map(|k| a[(r, k)] * vectors[(k, c)]).sum();
                    assert!((product - values[c] * vectors[(r, c)]).abs() < 1e-10, "{n}: {r}, {c}");
                }
                let norm: f64 = (0..n).map(|k| vectors[(k, c)].powi(2)).sum();
                assert!((norm - 1.0).abs() < 1e-10);
            }
        }
        let broken = Mat::from_fn(3, 3, |_, _| f64::NAN);
        assert!(symmetric(&broken).is_none_or(|(_, values)| values.iter().any(|x| !x.is_finite())));
    }
}
