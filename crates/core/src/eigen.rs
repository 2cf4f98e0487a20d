//! Eigenvectors of a symmetric matrix, in f64: those of the largest eigenvalues alone, because that is what a truncated
//! singular value decomposition needs.
//!
//! Householder reflections make the matrix tridiagonal, bisection by Sturm's count finds the eigenvalues, inverse
//! iteration the vectors, and the reflections take them back (Golub and Van Loan, *Matrix Computations*, sections 8.3,
//! 8.4 and 7.6). 2 n^3 operations for the first, 2 n^2 for each vector.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Solves of inverse iteration: one finds a vector of an eigenvalue that stands alone, the others settle those among
/// neighbours.
const SOLVES: usize = 3;

/// Sums that run side by side, so that one addition does not wait for the other.
const SUMS: usize = 8;

/// The eigenvectors of the `count` largest eigenvalues of the symmetric matrix `a (n, n)`, orthonormal, by descending
/// eigenvalue: `(count, n)`. `a` is worked on in place.
///
/// # Panics
/// A slice of another length; more vectors than there are.
pub(crate) fn leading_eigenvectors(a: &mut [f64], n: usize, count: usize) -> Vec<f64> {
    assert!(a.len() == n * n && count <= n);
    // Thresholds are then relative to one, and nothing overflows.
    let largest = a.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    if largest > 0.0 {
        a.iter_mut().for_each(|x| *x /= largest);
    }
    let reflections = tridiagonalise(a, n);
    let values = reflections.matrix.largest_eigenvalues(count);
    let mut vectors = reflections.matrix.eigenvectors(&values);
    vectors.par_chunks_exact_mut(n.max(1)).for_each(|x| reflections.apply(a, x));
    vectors
}

/// A symmetric matrix with nothing but its diagonal and the one beside it.
struct Tridiagonal {
    diagonal: Vec<f64>,
    beside: Vec<f64>,
}

/// A = H T H^T, H the product of the reflections 1 - f v v^T. The vector of the k-th is in row k of what was A, from the
/// diagonal on.
struct Reflections {
    matrix: Tridiagonal,
    factors: Vec<f64>,
}

fn tridiagonalise(a: &mut [f64], n: usize) -> Reflections {
    let (mut diagonal, mut beside, mut factors) = (Vec::new(), Vec::new(), Vec::new());
    let mut w = vec![0.0; n];
    for k in 0..n {
        let (done, rest) = a.split_at_mut((k + 1) * n);
        let row = &mut done[k * n + k..];
        let (first, v) = row.split_at_mut(1);
        diagonal.push(first[0]);
        if v.is_empty() {
            break;
        }
        // Reflected to (alpha, 0, .., 0), of the sign that cancels nothing.
        let norm = dot(v, v).sqrt();
        let alpha = -norm.copysign(v[0]);
        v[0] -= alpha;
        let square = dot(v, v);
        beside.push(alpha);
        factors.push(if square > 0.0 { 2.0 / square } else { 0.0 });
        if square == 0.0 {
            continue;
        }
        // B - v w^T - w v^T with p = f B v and w = p - f/2 (v^T p) v.
        let factor = 2.0 / square;
        let w = &mut w[..v.len()];
        w.fill(0.0);
        let rows = |rest: &mut [f64], work: &mut dyn FnMut(usize, &mut [f64])| {
            rest.chunks_exact_mut(n).enumerate().for_each(|(i, row)| work(i, &mut row[k + 1..]));
        };
        rows(rest, &mut |i, row| add(w, factor * v[i], row));
        let along = 0.5 * factor * dot(v, w);
        add(w, -along, v);
        rows(rest, &mut |i, row| {
            let (of_w, of_v) = (v[i], w[i]);
            row.iter_mut().zip(&*w).zip(&*v).for_each(|((b, w), v)| *b -= of_w * w + of_v * v);
        });
    }
    Reflections { matrix: Tridiagonal { diagonal, beside }, factors }
}

impl Reflections {
    /// x = H x, with the reflections' vectors where [`tridiagonalise`] left them.
    fn apply(&self, a: &[f64], x: &mut [f64]) {
        let n = x.len();
        for (k, factor) in self.factors.iter().enumerate().rev() {
            let (v, x) = (&a[k * n + k + 1..(k + 1) * n], &mut x[k + 1..]);
            let along = dot(v, x);
            add(x, -factor * along, v);
        }
    }
}

impl Tridiagonal {
    fn len(&self) -> usize {
        self.diagonal.len()
    }

    /// No eigenvalue is larger in size (Gershgorin). Not below one, which the largest number was made: of a matrix of zeros
    /// thresholds would be zero.
    fn bound(&self) -> f64 {
        let beside = |i: usize| self.beside.get(i).map_or(0.0, |x| x.abs());
        let row = |i: usize| self.diagonal[i].abs() + beside(i) + i.checked_sub(1).map_or(0.0, beside);
        (0..self.len()).map(row).fold(1.0, f64::max)
    }

    /// Eigenvalues below `x`: the negative pivots of T - x (Sturm).
    fn below(&self, x: f64, least: f64) -> usize {
        let (mut count, mut pivot) = (0, 1.0);
        for (i, d) in self.diagonal.iter().enumerate() {
            let beside = if i > 0 { self.beside[i - 1] } else { 0.0 };
            pivot = d - x - beside * beside / pivot;
            if pivot.abs() < least {
                pivot = -least;
            }
            count += usize::from(pivot < 0.0);
        }
        count
    }

    /// The `count` largest eigenvalues, descending, to the last digits of the largest.
    fn largest_eigenvalues(&self, count: usize) -> Vec<f64> {
        let bound = self.bound();
        let least = f64::EPSILON * f64::EPSILON * bound;
        let mut above = bound;
        let find = |nth: usize| {
            let mut low = -bound;
            let mut high = above;
            while high - low > f64::EPSILON * bound {
                let middle = 0.5 * (low + high);
                if self.below(middle, least) >= self.len() - nth { high = middle } else { low = middle }
            }
            above = high;
            0.5 * (low + high)
        };
        (0..count).map(find).collect()
    }

    /// Orthonormal eigenvectors of these eigenvalues, `(values, n)`, by inverse iteration. Where eigenvalues are close
    /// the vectors of earlier ones are taken out after every solve.
    fn eigenvectors(&self, values: &[f64]) -> Vec<f64> {
        let n = self.len();
        let least = f64::EPSILON * self.bound();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut vectors: Vec<f64> = Vec::with_capacity(values.len() * n);
        let mut shifted = Shifted::default();
        for value in values {
            shifted.eliminate(self, *value, least);
            let mut x: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
            for _ in 0..SOLVES {
                shifted.solve(&mut x);
                normalise(&mut x);
                for of in vectors.chunks_exact(n) {
                    let along = dot(&x, of);
                    add(&mut x, -along, of);
                }
                normalise(&mut x);
            }
            vectors.extend(x);
        }
        vectors
    }
}

/// T - x as the product of a lower and an upper triangular matrix, rows exchanged for the larger pivot.
#[derive(Default)]
struct Shifted {
    /// Of each row of the upper one: the diagonal and the two beside it.
    rows: Vec<[f64; 3]>,
    /// What of each row was taken from the next, and whether the two were exchanged before.
    steps: Vec<(f64, bool)>,
}

impl Shifted {
    /// Pivots are at least `least` in size: T - x is singular where x is an eigenvalue.
    fn eliminate(&mut self, t: &Tridiagonal, x: f64, least: f64) {
        let at_least = |pivot: f64| if pivot.abs() < least { least } else { pivot };
        let beside = |i: usize| t.beside.get(i).copied().unwrap_or(0.0);
        self.rows.clear();
        self.steps.clear();
        let (mut pivot, mut next) = (t.diagonal[0] - x, beside(0));
        for i in 0..t.len() - 1 {
            let below = [beside(i), t.diagonal[i + 1] - x, beside(i + 1)];
            let exchanged = below[0].abs() > pivot.abs();
            let row = if exchanged { below } else { [at_least(pivot), next, 0.0] };
            let other = if exchanged { [pivot, next, 0.0] } else { below };
            let factor = other[0] / row[0];
            (pivot, next) = (other[1] - factor * row[1], other[2] - factor * row[2]);
            self.rows.push(row);
            self.steps.push((factor, exchanged));
        }
        self.rows.push([at_least(pivot), 0.0, 0.0]);
    }

    fn solve(&self, x: &mut [f64]) {
        for (i, (factor, exchanged)) in self.steps.iter().enumerate() {
            if *exchanged {
                x.swap(i, i + 1);
            }
            x[i + 1] -= factor * x[i];
        }
        let (mut one, mut two) = (0.0, 0.0);
        for (x, row) in x.iter_mut().zip(&self.rows).rev() {
            *x = (*x - row[1] * one - row[2] * two) / row[0];
            (one, two) = (*x, one);
        }
    }
}

fn normalise(x: &mut [f64]) {
    // By the largest first: squares of what a solve gives may overflow.
    let top = x.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    if top > 0.0 {
        x.iter_mut().for_each(|x| *x /= top);
        let norm = dot(x, x).sqrt();
        x.iter_mut().for_each(|x| *x /= norm);
    }
}

/// `to += factor * of`.
fn add(to: &mut [f64], factor: f64, of: &[f64]) {
    to.iter_mut().zip(of).for_each(|(to, of)| *to += factor * of);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; SUMS];
    let (a, b) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All eigenvalues, descending, by Jacobi's rotations.
    fn jacobi(a: &[f64], n: usize) -> Vec<f64> {
        let mut a = a.to_vec();
        for _ in 0..30 {
            for p in 0..n {
                for q in p + 1..n {
                    let angle = 0.5 * (2.0 * a[p * n + q]).atan2(a[q * n + q] - a[p * n + p]);
                    let (s, c) = angle.sin_cos();
                    for i in 0..n {
                        let (x, y) = (a[i * n + p], a[i * n + q]);
                        (a[i * n + p], a[i * n + q]) = (c * x - s * y, s * x + c * y);
                    }
                    for i in 0..n {
                        let (x, y) = (a[p * n + i], a[q * n + i]);
                        (a[p * n + i], a[q * n + i]) = (c * x - s * y, s * x + c * y);
                    }
                }
            }
        }
        let mut values: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
        values.sort_by(|a, b| b.total_cmp(a));
        values
    }

    fn check(a: &[f64], n: usize, count: usize, what: &str) {
        let top = a.iter().fold(f64::MIN_POSITIVE, |top: f64, x| top.max(x.abs()));
        let want = jacobi(a, n);
        let got = leading_eigenvectors(&mut a.to_vec(), n, count);
        for (i, x) in got.chunks_exact(n).enumerate() {
            for (j, y) in got.chunks_exact(n).enumerate() {
                let product = f64::from(u8::from(i == j));
                assert!((dot(x, y) - product).abs() < 1e-12, "{what}: vectors {i} and {j}: {}", dot(x, y));
            }
            for (row, x_row) in a.chunks_exact(n).zip(x) {
                let error = (dot(row, x) - want[i] * x_row).abs() / top;
                assert!(error < 1e-12 * n as f64, "{what}: vector {i} of {count}: {error}");
            }
        }
    }

    #[test]
    fn vectors_are_those_of_the_largest_eigenvalues() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for n in [1, 2, 3, 7, 24, 61] {
            let x: Vec<f64> = (0..n * n).map(|_| rng.random_range(-1.0..1.0)).collect();
            let symmetric = (0..n * n).map(|i| x[i] + x[i % n * n + i / n]).collect::<Vec<f64>>();
            check(&symmetric, n, n, "symmetric");
            let gram = |rank: usize| -> Vec<f64> {
                (0..n * n).map(|i| dot(&x[i / n * n..][..rank], &x[i % n * n..][..rank])).collect()
            };
            check(&gram(n), n, n.div_ceil(2), "Gram");
            // Most eigenvalues are zero, and some of the vectors asked for are theirs.
            check(&gram(n.div_ceil(3)), n, n.div_ceil(2), "rank-deficient");
            check(&vec![0.0; n * n], n, n, "zero");
            let unit = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n)) * 1e-200).collect::<Vec<f64>>();
            check(&unit, n, n, "unit");
            // Eigenvalues over twelve orders of magnitude, and pairs of equal ones.
            let scale = |i: usize| 10f64.powi(-12 * (i / 2) as i32 / n as i32);
            let diagonal = (0..n * n).map(|i| if i / n == i % n { scale(i / n) } else { 0.0 });
            check(&diagonal.collect::<Vec<f64>>(), n, n, "pairs");
        }
    }
}
