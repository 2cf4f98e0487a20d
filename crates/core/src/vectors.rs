//! Vectors by position and KV head as attention reads them, perhaps in factors.

use std::ops::Range;

use crate::kept::Kept;
use crate::kernels::{Sums, Weights};
use crate::magnitudes::Magnitudes;
use crate::resources::Rotary;
use crate::scratch::with_buffer;
use crate::store::Store;

/// A vector for each position and KV head, perhaps in factors.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) store: &'a Store,
    pub(crate) magnitudes: Option<&'a Magnitudes>,
    pub(crate) channels: Option<&'a [f32]>,
    pub(crate) kept: Option<Kept<'a>>,
    pub(crate) rotary: Option<&'a dyn Rotary>,
}

impl Vectors<'_> {
    pub(crate) fn read(&self, head: usize, position: usize, index: usize, out: &mut [f32]) {
        if !self.kept.is_some_and(|kept| kept.read(head, position, out)) {
            self.store.read(head, index, out);
            if let Some(magnitudes) = self.magnitudes {
                let m = magnitudes.of_head(head, index);
                out.iter_mut().for_each(|x| *x *= m);
            }
            if let Some(factors) = self.channels {
                let factors = &factors[head * out.len()..];
                out.iter_mut().zip(factors).for_each(|(x, s)| *x *= s);
            }
        }
        if let Some(rotary) = self.rotary {
            rotary.rotate(position, out);
        }
    }

    /// <q, m e> = m <q, e>; scores of kept vectors come in the place of the store's.
    pub(crate) fn scores(
        &self,
        head: usize,
        dim: usize,
        positions: &Range<usize>,
        indices: Range<usize>,
        q: Weights,
        out: Sums,
    ) {
        if self.rotary.is_some() {
            return self.rotated_scores(head, dim, positions, indices, q, out);
        }
        let Sums { y, stride } = out;
        let Weights { w, stride: apart, rows } = q;
        match self.channels {
            None => self.store.add_scores(head, indices.clone(), q, Sums { y: &mut *y, stride }),
            Some(factors) => with_buffer(rows * dim, |scaled| {
                for (row, to) in scaled.chunks_exact_mut(dim).enumerate() {
                    let from = w[row * apart..].iter().zip(&factors[head * dim..]);
                    to.iter_mut().zip(from).for_each(|(t, (x, s))| *t = x * s);
                }
                let q = Weights { w: scaled, stride: dim, rows };
                self.store.add_scores(head, indices.clone(), q, Sums { y: &mut *y, stride });
            }),
        }
        if let Some(magnitudes) = self.magnitudes {
            magnitudes.scale(head, indices, y, stride, rows);
        }
        if let Some(kept) = self.kept {
            kept.replace_scores(head, positions, q, Sums { y, stride });
        }
    }

    /// Scores of keys that have to be rotated first: restored one at a time in a buffer of one vector.
    fn rotated_scores(
        &self,
        head: usize,
        dim: usize,
        positions: &Range<usize>,
        indices: Range<usize>,
        q: Weights,
        out: Sums,
    ) {
        with_buffer(dim, |key| {
            for (column, (position, index)) in positions.clone().zip(indices).enumerate() {
                self.read(head, position, index, key);
                for row in 0..q.rows {
                    let query = &q.w[row * q.stride..][..dim];
                    out.y[row * out.stride + column] = query.iter().zip(&*key).map(|(a, b)| a * b).sum();
                }
            }
        });
    }

    /// sum_i p_i m_i e_i = sum_i (p_i m_i) e_i, and kept vectors beside (those of the store are zero in their places).
    pub(crate) fn accumulate(
        &self,
        head: usize,
        dim: usize,
        positions: &Range<usize>,
        indices: Range<usize>,
        p: Weights,
        out: Sums,
    ) {
        let Sums { y, stride } = out;
        let Weights { w, stride: apart, rows } = p;
        let width = indices.len();
        match (self.magnitudes, self.channels) {
            (None, None) => self.store.add_sums(head, indices, p, Sums { y: &mut *y, stride }),
            (Some(magnitudes), _) => with_buffer(rows * width, |scaled| {
                for (row, to) in scaled.chunks_exact_mut(width).enumerate() {
                    to.copy_from_slice(&w[row * apart..][..width]);
                }
                magnitudes.scale(head, indices.clone(), scaled, width, rows);
                let p = Weights { w: scaled, stride: width, rows };
                self.store.add_sums(head, indices, p, Sums { y: &mut *y, stride });
            }),
            (None, Some(factors)) => with_buffer(rows * dim, |sums| {
                sums.fill(0.0);
                self.store.add_sums(head, indices, p, Sums { y: sums, stride: dim });
                for (row, from) in sums.chunks_exact(dim).enumerate() {
                    let to = y[row * stride..].iter_mut().zip(from).zip(&factors[head * dim..]);
                    to.for_each(|((t, x), s)| *t += x * s);
                }
            }),
        }
        if let Some(kept) = self.kept {
            kept.accumulate(head, positions, p, Sums { y, stride });
        }
    }
}
