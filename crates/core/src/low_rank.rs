//! The truncated singular value decomposition of a sequence's states: the best product of two thin matrices (Eckart and
//! Young 1936).

use crate::dense::{Strided, View, add_wide_product, mul_transposed};
use crate::eigen::leading_eigenvectors;

/// Singular values below this share of the largest one are rounding, and their vectors are left out.
const LEAST: f64 = 1e-7;

/// X as U S times V^T.
pub(crate) struct LowRank {
    /// U S `(rows, rank)`: X V.
    pub(crate) coefficients: Vec<f32>,
    /// V^T `(rank, cols)`: orthonormal rows, by descending singular value; zeros where X has no more.
    pub(crate) vectors: Vec<f32>,
}

/// The `rank` largest singular values of `x (rows, cols)` with their vectors, by the eigenvectors of its Gram matrix on
/// the shorter side, in f64.
pub(crate) fn truncated_svd(x: &[f32], rows: usize, cols: usize, rank: usize) -> LowRank {
    assert!(x.len() == rows * cols && rank <= rows.min(cols));
    let vectors = if rows < cols { by_rows(x, rows, cols, rank) } else { by_columns(x, cols, rank) };
    let vectors: Vec<f32> = vectors.iter().map(|v| *v as f32).collect();
    let mut coefficients = vec![0.0; rows * rank];
    mul_transposed(View::new(x, rows, cols, cols), View::new(&vectors, rank, cols, cols), &mut coefficients);
    LowRank { coefficients, vectors }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// The eigenvectors of X^T X.
fn by_columns(x: &[f32], cols: usize, rank: usize) -> Vec<f64> {
    let mut gram = vec![0.0; cols * cols];
    // As many rows at a time as the Gram matrix has, so that not all of X lies there twice.
    for part in x.chunks(cols * cols) {
        let data = &wide(part);
        let part = Strided { data, rows: data.len() / cols, cols, steps: (cols, 1) };
        add_wide_product(part.transposed(), part, &mut gram);
    }
    leading_eigenvectors(&mut gram, cols, rank)
}

/// With U those of X X^T, V^T = S^-1 U^T X.
fn by_rows(x: &[f32], rows: usize, cols: usize, rank: usize) -> Vec<f64> {
    let data = &wide(x);
    let x = Strided { data, rows, cols, steps: (cols, 1) };
    let mut gram = vec![0.0; rows * rows];
    add_wide_product(x, x.transposed(), &mut gram);
    let u = leading_eigenvectors(&mut gram, rows, rank);
    let u = Strided { data: &u, rows: rank, cols: rows, steps: (rows, 1) };
    let mut vectors = vec![0.0; rank * cols];
    add_wide_product(u, x, &mut vectors);
    let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let largest = vectors.chunks_exact(cols).map(norm).fold(0.0, f64::max);
    for v in vectors.chunks_exact_mut(cols) {
        let singular = norm(v);
        let factor = if singular > LEAST * largest { 1.0 / singular } else { 0.0 };
        v.iter_mut().for_each(|v| *v *= factor);
    }
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Singular values, descending, by Jacobi's rotations of columns in f64 (Hestenes 1958).
    fn singular_values(x: &[f32], rows: usize, cols: usize) -> Vec<f64> {
        let mut columns: Vec<Vec<f64>> =
            (0..cols).map(|c| (0..rows).map(|r| f64::from(x[r * cols + c])).collect()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for _ in 0..30 {
            for p in 0..cols {
                for q in p + 1..cols {
                    let (left, right) = columns.split_at_mut(q);
                    let (a, b) = (&mut left[p], &mut right[0]);
                    let angle = 0.5 * (2.0 * dot(a, b)).atan2(dot(a, a) - dot(b, b));
                    let (s, c) = angle.sin_cos();
                    a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (c * *a + s * *b, c * *b - s * *a));
                }
            }
        }
        let mut values: Vec<f64> = columns.iter().map(|c| dot(c, c).sqrt()).collect();
        values.sort_by(|a, b| b.total_cmp(a));
        values
    }

    #[test]
    fn no_product_of_this_rank_is_nearer() {
        for (rows, cols) in [(1, 5), (5, 1), (30, 12), (12, 30), (20, 20)] {
            // Directions of falling size, and a mean far from zero, as states have.
            let x: Vec<f32> = (0..rows * cols)
                .map(|i| {
                    let (r, c) = ((i / cols) as f32, (i % cols) as f32);
                    3.0 + (r * 1.3 + c * 0.7).sin() + 0.1 * (r * r * 0.9 + c).cos() / (1.0 + c)
                })
                .collect();
            let values = singular_values(&x, rows, cols);
            for rank in 1..=rows.min(cols) {
                let LowRank { coefficients, vectors } = truncated_svd(&x, rows, cols, rank);
                let entry = |i: usize| -> f64 {
                    let (z, c) = (&coefficients[i / cols * rank..][..rank], i % cols);
                    (0..rank).map(|k| f64::from(z[k]) * f64::from(vectors[k * cols + c])).sum()
                };
                let error: f64 = (0..x.len()).map(|i| (f64::from(x[i]) - entry(i)).powi(2)).sum();
                let least: f64 = values[rank..].iter().map(|s| s * s).sum();
                let rounding = 1e-12 * values[0] * values[0];
                assert!(
                    error <= 1.0001 * least + rounding,
                    "{rows} x {cols}, rank {rank}: {error}, {least} at the least"
                );
                // U S: columns of the singular values' lengths.
                for k in 0..rank {
                    let square: f64 = (0..rows).map(|r| f64::from(coefficients[r * rank + k]).powi(2)).sum();
                    assert!((square.sqrt() - values[k]).abs() < 1e-5 * values[0], "{rows} x {cols}, {k}");
                }
            }
        }
    }

    #[test]
    fn states_without_so_many_directions_come_back_finite() {
        for (rows, cols) in [(9, 6), (6, 9)] {
            for x in [vec![0.0; 54], (0..54).map(|i| (i % cols) as f32).collect::<Vec<f32>>()] {
                let LowRank { coefficients, vectors } = truncated_svd(&x, rows, cols, 5);
                for (i, x) in x.iter().enumerate() {
                    let z = &coefficients[i / cols * 5..][..5];
                    let got: f32 = (0..5).map(|k| z[k] * vectors[k * cols + i % cols]).sum();
                    assert!((got - x).abs() < 1e-4, "{rows} x {cols}, number {i}: {got}, not {x}");
                }
            }
        }
    }
}
