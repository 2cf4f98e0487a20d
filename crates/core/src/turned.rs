//! Lanes whose head vectors are stored after a linear map: a rotation that makes all numbers alike before they are
//! rounded, or a longer vector.
//!
//! A vector x is stored as z, near M x, and stands for `x^ = M^T z`. Attention never maps back what is stored:
//! `<q, M^T z> = <M q, z>`, and `sum_i p_i M^T z_i = M^T (sum_i p_i z_i)`. So queries are mapped once per step, and
//! sums once.

use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::archive::Archive;
use crate::kernels::{Sums, Weights};
use crate::lane::Lane;
use crate::scratch::with_buffer;
use crate::store::trellis::Levels;
use crate::store::{Scheme, Side, Store, StoreBytes, lloyd};
use crate::view::Segment;
use crate::{Footprint, Result};

/// Which map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turning {
    /// The Hadamard matrix over its norm; where the dimension is 2^k m with an odd m, the Kronecker product of that of
    /// 2^k and the cosine transform of m, whose first row is even as well.
    Hadamard,
    /// A random rotation: rows of normal numbers, made orthonormal.
    Random { seed: u64 },
    /// That rotation R, and below it S R, with S of `dim` rows of normal numbers.
    Sketched { seed: u64 },
}

/// A map of head vectors and its transpose, made once per process while a cache has it.
pub(crate) struct Turn {
    turning: Turning,
    /// What comes of each number of a vector, `(dim, width)`.
    into: Store,
    /// What comes of each number that is stored, `(width, dim)`.
    back: Store,
}

/// The map for vectors of `dim` numbers.
pub(crate) fn turn(turning: Turning, dim: usize) -> Arc<Turn> {
    static MADE: Mutex<Vec<Weak<Turn>>> = Mutex::new(Vec::new());
    // A thread that failed left nothing half made.
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    made.retain(|turn| turn.strong_count() > 0);
    let wanted = |turn: &Arc<Turn>| turn.turning == turning && turn.dim() == dim;
    if let Some(turn) = made.iter().filter_map(Weak::upgrade).find(wanted) {
        return turn;
    }
    let turn = Arc::new(Turn::new(turning, dim));
    made.push(Arc::downgrade(&turn));
    turn
}

impl Turn {
    fn new(turning: Turning, dim: usize) -> Self {
        let rows = match turning {
            Turning::Hadamard => hadamard(dim),
            Turning::Random { seed } => rotation(dim, &mut ChaCha8Rng::seed_from_u64(seed)),
            Turning::Sketched { seed } => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut rows = rotation(dim, &mut rng);
                for _ in 0..dim {
                    let weights: Vec<f64> = (0..dim).map(|_| StandardNormal.sample(&mut rng)).collect();
                    let mut row = vec![0.0; dim];
                    weights.iter().zip(&rows).for_each(|(w, of)| add(&mut row, *w, of));
                    rows.push(row);
                }
                rows
            }
        };
        let matrix = |rows: usize, width: usize, of: &dyn Fn(usize, usize) -> f64| {
            let numbers: Vec<f32> = (0..rows * width).map(|i| of(i / width, i % width) as f32).collect();
            let mut store = Store::new(1, width, Scheme::F32, Side::Values);
            store.push(&numbers);
            store
        };
        let into = matrix(dim, rows.len(), &|i, j| rows[j][i]);
        let back = matrix(rows.len(), dim, &|i, j| rows[i][j]);
        Self { turning, into, back }
    }

    /// Numbers of a vector.
    pub(crate) fn dim(&self) -> usize {
        self.back.dim()
    }

    /// Numbers that are stored of it.
    pub(crate) fn width(&self) -> usize {
        self.into.dim()
    }

    /// Bytes held, once for all caches.
    pub(crate) fn bytes(&self) -> usize {
        self.into.bytes().total() + self.back.bytes().total()
    }

    /// Adds M x to each row of `out (rows, width)`, for rows `x (rows, dim)`.
    pub(crate) fn add_into(&self, x: Weights, out: Sums) {
        self.into.add_sums(0, 0..self.dim(), x, out);
    }

    /// Adds M^T z to each row of `out (rows, dim)`, for rows `z (rows, width)`.
    pub(crate) fn add_back(&self, z: Weights, out: Sums) {
        self.back.add_sums(0, 0..self.width(), z, out);
    }
}

/// A row by itself.
fn row(w: &[f32]) -> Weights<'_> {
    Weights { w, stride: w.len(), rows: 1 }
}

/// `to += weight * of`.
fn add(to: &mut [f64], weight: f64, of: &[f64]) {
    to.iter_mut().zip(of).for_each(|(to, of)| *to += weight * of);
}

/// The rows of a random rotation: each is normal, less what it has of those before it, twice because of rounding, over
/// its norm (a rotation of the Haar measure, as the QR decomposition of a normal matrix gives it).
fn rotation(dim: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<f64>> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(dim);
    for _ in 0..dim {
        let mut row: Vec<f64> = (0..dim).map(|_| StandardNormal.sample(rng)).collect();
        for of in rows.iter().chain(&rows) {
            let along: f64 = row.iter().zip(of).map(|(a, b)| a * b).sum();
            add(&mut row, -along, of);
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
        rows.push(row);
    }
    rows
}

/// The rows of [`Turning::Hadamard`].
fn hadamard(dim: usize) -> Vec<Vec<f64>> {
    let even = 1 << dim.trailing_zeros();
    let odd = dim / even;
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let cosine = |i: usize, j: usize| {
        let angle = std::f64::consts::PI * i as f64 * (2 * j + 1) as f64 / (2 * odd) as f64;
        angle.cos() * if i == 0 { 1.0 } else { std::f64::consts::SQRT_2 }
    };
    let entry = |i: usize, j: usize| sign(i % even, j % even) * cosine(i / even, j / even);
    let norm = (dim as f64).sqrt();
    (0..dim).map(|i| (0..dim).map(|j| entry(i, j) / norm).collect()).collect()
}

/// The second half of what is stored of a vector: the signs of a sketch of what rounding has left of it, by
/// `M = (R, S R)`: with r the rest and `s = sign(S R r)`, `sqrt(pi / 2) / dim * ||r|| (S R)^T s` is r on average over S.
#[derive(Clone)]
pub(crate) struct Sketch {
    /// That the first half is rounded to.
    pub(crate) first: Levels,
    /// That of one bit: what it makes of a number is given by the scale.
    pub(crate) sign: Levels,
}

impl Sketch {
    /// Puts the signs in the second half of `z = M x`, in the size that they are to have.
    fn apply(&self, turn: &Turn, x: &[f32], z: &mut [f32]) {
        let (dim, width) = (turn.dim(), turn.width());
        with_buffer(2 * width, |buffer| {
            let (rounded, mapped) = buffer.split_at_mut(width);
            rounded[dim..].fill(0.0);
            lloyd::rounded(&z[..dim], &self.first, &mut rounded[..dim]);
            with_buffer(dim, |rest| {
                rest.fill(0.0);
                turn.add_back(row(rounded), Sums { y: rest, stride: dim });
                rest.iter_mut().zip(x).for_each(|(rest, x)| *rest = x - *rest);
                mapped.fill(0.0);
                turn.add_into(row(rest), Sums { y: mapped, stride: width });
                let norm = rest.iter().map(|x| x * x).sum::<f32>().sqrt();
                let level = f32::from(self.sign.levels[1]) - f32::from(self.sign.levels[0]);
                let size = std::f32::consts::FRAC_PI_2.sqrt() / dim as f32 * norm;
                let size = size / (0.5 * level * self.sign.unit);
                z[dim..].iter_mut().zip(&mapped[dim..]).for_each(|(z, s)| *z = size.copysign(*s));
            });
        });
    }
}

/// One side of one layer.
#[derive(Clone)]
pub(crate) struct Turned {
    turn: Arc<Turn>,
    sketch: Option<Arc<Sketch>>,
    store: Store,
}

impl Turned {
    /// An empty lane, stored in the empty `store`.
    pub(crate) fn boxed(turn: Arc<Turn>, sketch: Option<Sketch>, store: Store) -> Box<dyn Lane> {
        Box::new(Self { turn, sketch: sketch.map(Arc::new), store })
    }
}

impl Lane for Turned {
    fn push(&mut self, rows: &[f32]) {
        let (dim, width) = (self.turn.dim(), self.turn.width());
        let vectors = rows.len() / dim;
        with_buffer(vectors * width, |mapped| {
            mapped.fill(0.0);
            let x = Weights { w: rows, stride: dim, rows: vectors };
            self.turn.add_into(x, Sums { y: mapped, stride: width });
            if let Some(sketch) = &self.sketch {
                let vectors = rows.chunks_exact(dim).zip(mapped.chunks_exact_mut(width));
                vectors.for_each(|(x, z)| sketch.apply(&self.turn, x, z));
            }
            self.store.push(mapped);
        });
    }
    fn len(&self) -> usize {
        self.store.len()
    }
    fn segment(&self, positions: Range<usize>) -> Segment<'_> {
        let first = positions.start;
        Segment::turned(positions, TurnedRows { turn: &self.turn, store: &self.store }, first)
    }
    fn drop_before(&mut self, position: usize) {
        self.store.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        self.store.can_truncate(len)
    }
    fn truncate(&mut self, len: usize) {
        self.store.truncate(len);
    }
    fn start(&self) -> usize {
        self.store.start()
    }
    fn footprint(&self) -> Footprint {
        let StoreBytes { codes, scales, residual } = self.store.bytes();
        Footprint { states: codes, scales, residual, ..Footprint::default() }
    }
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        self.store.archive(archive)
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}

/// Mapped vectors as attention reads them.
#[derive(Clone, Copy)]
pub(crate) struct TurnedRows<'a> {
    turn: &'a Turn,
    store: &'a Store,
}

impl TurnedRows<'_> {
    /// Whether the store has these indices.
    pub(crate) fn holds(&self, indices: &Range<usize>) -> bool {
        indices.start >= self.store.start() && indices.end <= self.store.len()
    }

    /// A mapped query is the query itself, for exact tokens, and M q; a sum is that of exact values, and that of z.
    pub(crate) fn row_dim(&self, head_dim: usize) -> usize {
        head_dim + self.turn.width()
    }

    pub(crate) fn map_queries(&self, dim: usize, q: &[f32], out: &mut [f32]) {
        let stride = self.row_dim(dim);
        for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(stride)) {
            out[..dim].copy_from_slice(q);
            out[dim..].fill(0.0);
        }
        let rows = q.len() / dim;
        self.turn.add_into(Weights { w: q, stride: dim, rows }, Sums { y: &mut out[dim..], stride });
    }

    /// Adds the scores of mapped queries.
    pub(crate) fn scores(&self, head: usize, dim: usize, range: Range<usize>, q: Weights, out: Sums) {
        self.store.add_scores(head, range, Weights { w: &q.w[dim..], ..q }, out);
    }

    /// Adds what is stored, weighed by `p`, to the second part of each row.
    pub(crate) fn accumulate(&self, head: usize, dim: usize, range: Range<usize>, p: Weights, out: Sums) {
        self.store.add_sums(head, range, p, Sums { y: &mut out.y[dim..], ..out });
    }

    pub(crate) fn map_sums(&self, dim: usize, sums: &[f32], rows: usize, out: &mut [f32]) {
        let stride = self.row_dim(dim);
        for (sum, out) in sums.chunks_exact(stride).zip(out.chunks_exact_mut(dim)) {
            out.copy_from_slice(&sum[..dim]);
        }
        self.turn.add_back(Weights { w: &sums[dim..], stride, rows }, Sums { y: out, stride: dim });
    }

    pub(crate) fn read(&self, head: usize, index: usize, out: &mut [f32]) {
        let dim = self.turn.dim();
        with_buffer(self.turn.width(), |z| {
            self.store.read(head, index, z);
            out.fill(0.0);
            self.turn.add_back(row(z), Sums { y: out, stride: dim });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// M x.
    fn mapped(turn: &Turn, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; turn.width()];
        turn.add_into(row(x), Sums { y: &mut out, stride: turn.width() });
        out
    }

    #[test]
    fn rotations_keep_products_and_are_taken_back_by_their_transposes() {
        let x = |seed: usize, dim: usize| (0..dim).map(|i| ((i * 7 + seed) as f32).sin()).collect::<Vec<_>>();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        for dim in [1, 2, 7, 24, 64, 80, 96, 128] {
            for turning in [Turning::Hadamard, Turning::Random { seed: 3 }] {
                let turn = Turn::new(turning, dim);
                let (a, b) = (x(1, dim), x(2, dim));
                let (za, zb) = (mapped(&turn, &a), mapped(&turn, &b));
                assert!((dot(&za, &zb) - dot(&a, &b)).abs() < 1e-5 * dim as f64, "{turning:?} of {dim}");
                let mut back = vec![0.0; dim];
                turn.add_back(row(&za), Sums { y: &mut back, stride: dim });
                back.iter().zip(&a).for_each(|(b, a)| assert!((b - a).abs() < 1e-5, "{turning:?} of {dim}"));
            }
        }
    }

    #[test]
    fn one_number_is_spread_evenly_by_hadamard() {
        for dim in [4, 64, 128] {
            let mut x = vec![0.0; dim];
            x[dim / 3] = 8.0;
            let even = 8.0 / (dim as f32).sqrt();
            assert!(
                mapped(&Turn::new(Turning::Hadamard, dim), &x).iter().all(|z| (z.abs() - even).abs() < 1e-5)
            );
        }
    }

    #[test]
    fn maps_are_made_once_while_somebody_has_them() {
        let kind = Turning::Random { seed: 77 };
        let (a, b) = (turn(kind, 24), turn(kind, 24));
        assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &turn(kind, 32)));
        assert!(!Arc::ptr_eq(&a, &turn(Turning::Random { seed: 78 }, 24)));
    }
}
