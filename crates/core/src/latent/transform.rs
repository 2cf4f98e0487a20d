//! The linear maps between a span's states and its latents, and what they do to queries and weighted sums.

use std::ops::Range;
use std::sync::Arc;

use super::basis::{KeyBasis, Phases, Span, ValueBasis};
use super::coder::{Coding, turn};
use crate::kernels::{Sums, Weights};
use crate::scratch::with_buffer;
use crate::store::{Scheme, Side, Store};

/// The kept components of a span's values, in the units and turned as they are stored.
pub(super) struct ValueTransform {
    span: Span,
    head_dim: usize,
    mean: Vec<f32>,
    /// Restores: a vector `(members, head_dim)` for each component.
    restore: Store,
    /// Encodes: a vector of all components for each number of a state.
    encode: Store,
}

/// A matrix whose rows are summed with weights: the layout that values have, all rows in one block.
fn matrix(heads: usize, dim: usize, rows: usize) -> Store {
    Store::new(heads, dim, Scheme::F32, Side::Values).with_blocks(rows.max(1))
}

impl ValueTransform {
    pub(super) fn new(basis: &ValueBasis, coding: &Coding, head_dim: usize) -> Self {
        let (n, rank, members) = (basis.mean.len(), coding.rank(), basis.span.members());
        let mut restore = matrix(members, head_dim, rank);
        let mut encode = matrix(1, rank, n);
        // With D the deviations and H the turn, B = W^-1 U D H^T restores and H D^-1 U^T W encodes. W is
        // block-diagonal: head by head.
        let mut maps = [&basis.inverse, &basis.weights].map(|weights| {
            let mut out = vec![0.0; n * rank];
            for (row, out) in out.chunks_exact_mut(rank.max(1)).enumerate() {
                let (member, channel) = (row / head_dim, row % head_dim);
                let weights = &weights[(member * head_dim + channel) * head_dim..][..head_dim];
                for (i, w) in weights.iter().enumerate() {
                    let u = &basis.vectors[(member * head_dim + i) * n..][..rank];
                    out.iter_mut().zip(u).for_each(|(o, u)| *o += w * u);
                }
            }
            out
        });
        for (scale, map) in [false, true].into_iter().zip(&mut maps) {
            map.chunks_exact_mut(rank.max(1)).for_each(|row| coding.turn_map(row, scale));
        }
        let [back, forth] = &maps;
        let mut column = vec![0.0; n];
        for component in 0..rank {
            column.iter_mut().enumerate().for_each(|(i, c)| *c = back[i * rank + component]);
            restore.push(&column);
        }
        encode.push(forth);
        Self { span: basis.span, head_dim, mean: basis.mean.clone(), restore, encode }
    }

    pub(super) fn rank(&self) -> usize {
        self.encode.dim()
    }

    /// Latents `(tokens, rank)` of the span's states, one slice `(tokens, kv_heads, head_dim)` per layer, added to `z`.
    pub(super) fn encode(&self, layers: &[&[f32]], kv_dim: usize, z: &mut [f32]) {
        let (n, tokens) = (self.mean.len(), layers[0].len() / kv_dim);
        with_buffer(tokens * n, |x| {
            for (token, x) in x.chunks_exact_mut(n).enumerate() {
                let places = self.span.places().zip(x.chunks_exact_mut(self.head_dim));
                for (((layer, head), x), mean) in places.zip(self.mean.chunks_exact(self.head_dim)) {
                    let state = &layers[layer][token * kv_dim + head * self.head_dim..];
                    x.iter_mut().zip(state).zip(mean).for_each(|((x, s), m)| *x = s - m);
                }
            }
            let w = Weights { w: x, stride: n, rows: tokens };
            self.encode.add_sums(0, 0..n, w, Sums { y: z, stride: self.rank() });
        });
    }

    /// `out (rows, head_dim) += weight * mean + B z` for one head of one layer of the span; a row of `sums`, `stride`
    /// apart, is the weight and z.
    pub(super) fn decode(
        &self,
        layer: usize,
        head: usize,
        sums: &[f32],
        stride: usize,
        rows: usize,
        out: &mut [f32],
    ) {
        let member = self.span.member(layer, head);
        let mean = &self.mean[member * self.head_dim..][..self.head_dim];
        for (sum, out) in sums.chunks(stride).zip(out.chunks_exact_mut(self.head_dim)) {
            out.iter_mut().zip(mean).for_each(|(o, m)| *o += sum[0] * m);
        }
        let w = Weights { w: &sums[1..], stride, rows };
        self.restore.add_sums(member, 0..self.rank(), w, Sums { y: out, stride: self.head_dim });
    }

    /// The mean, what encodes and what restores, see [`super::LatentSet`].
    pub(super) fn matrices(&self) -> [Vec<f32>; 3] {
        let (n, rank, dim) = (self.mean.len(), self.rank(), self.head_dim);
        let (mut encode, mut restore) = (vec![0.0; n * rank], vec![0.0; n * rank]);
        for (i, row) in encode.chunks_exact_mut(rank.max(1)).enumerate() {
            self.encode.read(0, i, row);
        }
        for (i, row) in restore.chunks_exact_mut(dim).enumerate() {
            self.restore.read(i / rank, i % rank, row);
        }
        [self.mean.clone(), encode, restore]
    }

    /// What it is made of, for a check sum.
    pub(super) fn numbers(&self) -> impl Iterator<Item = Vec<f32>> {
        let row = |i: usize| {
            let mut row = vec![0.0; self.rank()];
            self.encode.read(0, i, &mut row);
            row
        };
        std::iter::once(self.mean.clone()).chain((0..self.mean.len()).map(row))
    }

    pub(super) fn bytes(&self) -> usize {
        value_bytes(&self.mean, [&self.restore, &self.encode])
    }

    /// Bytes of the transform of `n` numbers to `rank`.
    pub(super) fn bytes_of(members: usize, head_dim: usize, rank: usize) -> usize {
        let n = members * head_dim;
        let one = |heads, dim, rows| {
            let mut store = matrix(heads, dim, rows);
            store.push(&vec![0.0; heads * dim]);
            store
        };
        value_bytes(&vec![0.0; n], [&one(members, head_dim, rank), &one(1, rank, n)])
    }
}

fn value_bytes(mean: &[f32], maps: [&Store; 2]) -> usize {
    size_of_val(mean) + maps.iter().map(|m| m.bytes().total()).sum::<usize>()
}

/// The kept components of a span's keys. A complex component is two numbers of the latent, re and im.
pub(super) struct KeyTransform {
    span: Span,
    head_dim: usize,
    /// Frequency of each kept component.
    frequencies: Vec<usize>,
    /// `(m, head_dim)`, un-rotated.
    mean: Vec<f32>,
    /// `(m, components, 2)`, weights folded in: z += conj(encode) k.
    encode: Vec<f32>,
    /// `(m, components, 2)`, weights divided out: k += decode z.
    decode: Vec<f32>,
    /// The same for queries, turned: for each number of a query, a vector `(members, rank)`.
    queries: Store,
    /// Numbers of the latent that are turned together.
    turned: Vec<Range<usize>>,
    pub(super) phases: Arc<Phases>,
}

impl KeyTransform {
    /// `kept` lists (frequency, component) in storage order.
    pub(super) fn new(
        basis: &KeyBasis,
        kept: &[(usize, usize)],
        coding: &Coding,
        head_dim: usize,
        phases: Arc<Phases>,
    ) -> Self {
        let m = basis.span.members();
        let half = head_dim / 2;
        let (mut encode, mut decode) = (Vec::new(), Vec::new());
        for member in 0..m {
            for (i, &(j, c)) in kept.iter().enumerate() {
                let weight = basis.weights[member * half + j];
                for (part, u) in basis.vectors[((j * m + member) * m + c) * 2..][..2].iter().enumerate() {
                    let deviation = coding.deviation(2 * i + part);
                    encode.push(u * weight / deviation);
                    decode.push(u / weight * deviation);
                }
            }
        }
        let frequencies: Vec<usize> = kept.iter().map(|k| k.0).collect();
        let turned = coding.turned();
        let rank = 2 * kept.len();
        // q~_j = conj(U_j) q_j, so a number of the query meets the components of its frequency alone, before the turn.
        let mut queries = matrix(m, rank, head_dim);
        for number in 0..head_dim {
            let mut row = vec![0.0; m * rank];
            for (row, maps) in row.chunks_exact_mut(rank.max(1)).zip(decode.chunks_exact(rank.max(1))) {
                let parts = row.chunks_exact_mut(2).zip(maps.chunks_exact(2)).zip(&frequencies);
                for ((z, u), _) in parts.filter(|(_, j)| **j == number % half) {
                    (z[0], z[1]) = if number < half { (u[0], -u[1]) } else { (u[1], u[0]) };
                }
                turned.iter().for_each(|section| turn(&mut row[section.clone()], false));
            }
            queries.push(&row);
        }
        let mean = basis.mean.clone();
        Self { span: basis.span, head_dim, frequencies, mean, encode, decode, queries, turned, phases }
    }

    /// Numbers of a latent.
    pub(super) fn rank(&self) -> usize {
        2 * self.frequencies.len()
    }

    fn member<'a>(&self, of: &'a [f32], member: usize) -> &'a [f32] {
        let width = of.len() / self.span.members();
        &of[member * width..(member + 1) * width]
    }

    fn turn(&self, z: &mut [f32], back: bool) {
        self.turned.iter().for_each(|section| turn(&mut z[section.clone()], back));
    }

    /// Latents `(tokens, rank)` of the span's rotated keys at positions from `first` on, added to `z`.
    pub(super) fn encode(&self, layers: &[&[f32]], kv_dim: usize, first: usize, z: &mut [f32]) {
        let (dim, half, rank) = (self.head_dim, self.head_dim / 2, self.rank());
        self.phases.extend(first + layers[0].len() / kv_dim);
        with_buffer(2 * dim, |buffer| {
            let (phase, centred) = buffer.split_at_mut(dim);
            for (token, z) in z.chunks_exact_mut(rank.max(1)).enumerate() {
                self.phases.row(first + token, phase);
                for (member, (layer, head)) in self.span.places().enumerate() {
                    let key = &layers[layer][token * kv_dim + head * dim..][..dim];
                    rotated(self.member(&self.mean, member), phase, centred);
                    centred.iter_mut().zip(key).for_each(|(c, k)| *c = k - *c);
                    let maps = self.member(&self.encode, member).chunks_exact(2);
                    for ((z, u), &j) in z.chunks_exact_mut(2).zip(maps).zip(&self.frequencies) {
                        let (re, im) = (centred[j], centred[j + half]);
                        z[0] += u[0] * re + u[1] * im;
                        z[1] += u[0] * im - u[1] * re;
                    }
                }
                self.turn(z, false);
            }
        });
    }

    /// Queries `(rows, head_dim)` as latents meet them: q~_j = conj(U_j) q_j, with the weights divided out, scaled and
    /// turned as they are; added to rows of `out` that are `stride` apart.
    pub(super) fn map_queries(&self, layer: usize, head: usize, q: &[f32], out: &mut [f32], stride: usize) {
        let w = Weights { w: q, stride: self.head_dim, rows: q.len() / self.head_dim };
        let member = self.span.member(layer, head);
        self.queries.add_sums(member, 0..self.head_dim, w, Sums { y: out, stride });
    }

    /// The query as the table of phases meets it: Re(conj(q_j) mean_j e^{i phase}) = a cos - b sin.
    pub(super) fn map_mean(&self, layer: usize, head: usize, q: &[f32], out: &mut [f32]) {
        let half = self.head_dim / 2;
        let mean = self.member(&self.mean, self.span.member(layer, head));
        for j in 0..half {
            out[j] = q[j] * mean[j] + q[j + half] * mean[j + half];
            out[j + half] = q[j + half] * mean[j] - q[j] * mean[j + half];
        }
    }

    /// The rotated key at `position` from its latent, which is turned back.
    pub(super) fn decode(&self, layer: usize, head: usize, position: usize, z: &mut [f32], out: &mut [f32]) {
        let half = self.head_dim / 2;
        let member = self.span.member(layer, head);
        with_buffer(self.head_dim, |phase| {
            self.phases.row(position, phase);
            rotated(self.member(&self.mean, member), phase, out);
        });
        self.turn(z, true);
        let maps = self.member(&self.decode, member).chunks_exact(2);
        for ((z, u), &j) in z.chunks_exact(2).zip(maps).zip(&self.frequencies) {
            out[j] += u[0] * z[0] - u[1] * z[1];
            out[j + half] += u[0] * z[1] + u[1] * z[0];
        }
    }

    /// The mean, what encodes and what maps queries, see [`super::LatentSet`].
    pub(super) fn matrices(&self) -> [Vec<f32>; 3] {
        let (members, rank, dim) = (self.span.members(), self.rank(), self.head_dim);
        let (half, n) = (dim / 2, members * dim);
        let (mut encode, mut queries) = (vec![0.0; n * rank], vec![0.0; n * rank]);
        for (i, row) in encode.chunks_exact_mut(rank.max(1)).enumerate() {
            let (member, number) = (i / dim, i % dim);
            let maps = self.member(&self.encode, member).chunks_exact(2);
            for ((z, u), _) in
                row.chunks_exact_mut(2).zip(maps).zip(&self.frequencies).filter(|(_, j)| **j == number % half)
            {
                (z[0], z[1]) = if number < half { (u[0], -u[1]) } else { (u[1], u[0]) };
            }
            self.turn(row, false);
        }
        for (i, row) in queries.chunks_exact_mut(rank.max(1)).enumerate() {
            self.queries.read(i / dim, i % dim, row);
        }
        [self.mean.clone(), encode, queries]
    }

    /// What it is made of, for a check sum.
    pub(super) fn numbers(&self) -> impl Iterator<Item = Vec<f32>> {
        [self.mean.clone(), self.encode.clone(), self.decode.clone()].into_iter()
    }

    pub(super) fn bytes(&self) -> usize {
        key_bytes(self.span.members(), self.head_dim, &self.queries)
    }

    /// Bytes of the transform of `members` keys to `rank` numbers.
    pub(super) fn bytes_of(members: usize, head_dim: usize, rank: usize) -> usize {
        let mut queries = matrix(members, rank, head_dim);
        queries.push(&vec![0.0; members * rank]);
        key_bytes(members, head_dim, &queries)
    }
}

fn key_bytes(members: usize, head_dim: usize, queries: &Store) -> usize {
    let rank = queries.dim();
    let maps = members * (head_dim + 2 * rank) * size_of::<f32>();
    maps + rank / 2 * size_of::<usize>() + queries.bytes().total()
}

/// The un-rotated vector `x` times the phases, as rotary embeddings rotate.
fn rotated(x: &[f32], phase: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let ((re, im), (cos, sin)) = (x.split_at(half), phase.split_at(half));
    let (to_re, to_im) = out.split_at_mut(half);
    for j in 0..half {
        to_re[j] = re[j] * cos[j] - im[j] * sin[j];
        to_im[j] = re[j] * sin[j] + im[j] * cos[j];
    }
}
