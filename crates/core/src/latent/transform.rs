//! The linear maps between a group's states and its latents, and what they do to queries and weighted sums.

use std::sync::Arc;

use super::basis::{KeyBasis, Phases, ValueBasis};
use crate::dense::{View, mul_transposed};

/// The kept components of a group's values.
pub(super) struct ValueTransform {
    kv_dim: usize,
    head_dim: usize,
    pub(super) rank: usize,
    mean: Vec<f32>,
    /// `(n, rank)`: restores.
    vectors: Vec<f32>,
    /// `(rank, n)`: encodes.
    transposed: Vec<f32>,
}

impl ValueTransform {
    pub(super) fn new(basis: &ValueBasis, rank: usize, kv_dim: usize, head_dim: usize) -> Self {
        let n = basis.mean.len();
        // B = W^-1 U restores and U^T W encodes, a head's rows at a time.
        let kept: Vec<f32> = basis.vectors.chunks_exact(n).flat_map(|row| row[..rank].to_vec()).collect();
        let weighted = |matrices: &[f32]| -> Vec<f32> {
            let blocks = matrices.chunks_exact(head_dim * head_dim).zip(kept.chunks_exact(head_dim * rank));
            blocks
                .flat_map(|(matrix, rows)| {
                    let columns: Vec<f32> =
                        (0..rank * head_dim).map(|i| rows[i % head_dim * rank + i / head_dim]).collect();
                    let mut out = vec![0.0; head_dim * rank];
                    mul_transposed(
                        View::new(matrix, head_dim, head_dim, head_dim),
                        View::new(&columns, rank, head_dim, head_dim),
                        &mut out,
                    );
                    out
                })
                .collect()
        };
        let (vectors, encode) = (weighted(&basis.inverse), weighted(&basis.weights));
        let transposed = (0..rank * n).map(|i| encode[i % n * rank + i / n]).collect();
        Self { kv_dim, head_dim, rank, mean: basis.mean.clone(), vectors, transposed }
    }

    /// Latents `(tokens, rank)` of the group's states, one slice `(tokens, kv_dim)` per layer.
    pub(super) fn encode(&self, layers: &[&[f32]]) -> Vec<f32> {
        let (n, tokens) = (self.mean.len(), layers[0].len() / self.kv_dim);
        let mut x = Vec::with_capacity(tokens * n);
        for token in 0..tokens {
            for (l, layer) in layers.iter().enumerate() {
                let state = &layer[token * self.kv_dim..(token + 1) * self.kv_dim];
                x.extend(state.iter().zip(&self.mean[l * self.kv_dim..]).map(|(x, m)| x - m));
            }
        }
        let mut z = vec![0.0; tokens * self.rank];
        mul_transposed(View::new(&x, tokens, n, n), View::new(&self.transposed, self.rank, n, n), &mut z);
        z
    }

    fn rows(&self, layer: usize, head: usize) -> std::ops::Range<usize> {
        let first = layer * self.kv_dim + head * self.head_dim;
        first..first + self.head_dim
    }

    /// `out += weight * mean + B z` for one head of one layer of the group.
    pub(super) fn decode(&self, layer: usize, head: usize, z: &[f32], weight: f32, out: &mut [f32]) {
        for (o, row) in out.iter_mut().zip(self.rows(layer, head)) {
            let b = &self.vectors[row * self.rank..(row + 1) * self.rank];
            *o += weight * self.mean[row] + dot(b, z);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        (self.mean.len() + self.vectors.len() + self.transposed.len()) * size_of::<f32>()
    }
}

/// The kept components of a group's keys. A complex component is two numbers of the latent, re and im.
pub(super) struct KeyTransform {
    kv_heads: usize,
    head_dim: usize,
    /// Frequency of each kept component.
    frequencies: Vec<usize>,
    /// `(m, head_dim)`, un-rotated.
    mean: Vec<f32>,
    /// `(m, components, 2)`, weights folded in: z += conj(encode) k.
    encode: Vec<f32>,
    /// `(m, components, 2)`, weights divided out: k += decode z.
    decode: Vec<f32>,
    pub(super) phases: Arc<Phases>,
}

impl KeyTransform {
    /// `kept` lists (frequency, component) in storage order.
    pub(super) fn new(
        basis: &KeyBasis,
        kept: &[(usize, usize)],
        kv_heads: usize,
        head_dim: usize,
        phases: Arc<Phases>,
    ) -> Self {
        let m = basis.layers * kv_heads;
        let half = head_dim / 2;
        let (mut encode, mut decode) = (Vec::new(), Vec::new());
        for member in 0..m {
            for &(j, c) in kept {
                let weight = basis.weights[member * half + j];
                for part in &basis.vectors[((j * m + member) * m + c) * 2..][..2] {
                    encode.push(part * weight);
                    decode.push(part / weight);
                }
            }
        }
        let frequencies = kept.iter().map(|k| k.0).collect();
        Self { kv_heads, head_dim, frequencies, mean: basis.mean.clone(), encode, decode, phases }
    }

    /// Numbers of a latent.
    pub(super) fn rank(&self) -> usize {
        2 * self.frequencies.len()
    }

    fn member<'a>(&self, of: &'a [f32], layer: usize, head: usize) -> &'a [f32] {
        let width = of.len() / (self.mean.len() / self.head_dim);
        &of[(layer * self.kv_heads + head) * width..][..width]
    }

    /// Latents `(tokens, rank)` of the group's rotated keys at positions from `first` on.
    pub(super) fn encode(&self, layers: &[&[f32]], first: usize) -> Vec<f32> {
        let (dim, half, rank) = (self.head_dim, self.head_dim / 2, self.rank());
        let kv_dim = self.kv_heads * dim;
        let tokens = layers[0].len() / kv_dim;
        let mut z = vec![0.0; tokens * rank];
        let mut mean = vec![0.0; dim];
        for (token, z) in z.chunks_exact_mut(rank.max(1)).enumerate() {
            for (l, layer) in layers.iter().enumerate() {
                for head in 0..self.kv_heads {
                    mean.copy_from_slice(self.member(&self.mean, l, head));
                    self.phases.rotary().rotate(first + token, &mut mean);
                    let key = &layer[token * kv_dim + head * dim..][..dim];
                    let maps = self.member(&self.encode, l, head).chunks_exact(2);
                    for ((z, u), &j) in z.chunks_exact_mut(2).zip(maps).zip(&self.frequencies) {
                        let (re, im) = (key[j] - mean[j], key[j + half] - mean[j + half]);
                        z[0] += u[0] * re + u[1] * im;
                        z[1] += u[0] * im - u[1] * re;
                    }
                }
            }
        }
        z
    }

    /// The query as latents meet it: q~_j = conj(U_j) q_j, with the weights divided out.
    pub(super) fn map_query(&self, layer: usize, head: usize, q: &[f32], out: &mut [f32]) {
        let half = self.head_dim / 2;
        let maps = self.member(&self.decode, layer, head).chunks_exact(2);
        for ((o, u), &j) in out.chunks_exact_mut(2).zip(maps).zip(&self.frequencies) {
            let (re, im) = (q[j], q[j + half]);
            o[0] = u[0] * re + u[1] * im;
            o[1] = u[0] * im - u[1] * re;
        }
    }

    /// The query as the table of phases meets it: Re(conj(q_j) mean_j e^{i phase}) = a cos - b sin.
    pub(super) fn map_mean(&self, layer: usize, head: usize, q: &[f32], out: &mut [f32]) {
        let half = self.head_dim / 2;
        let mean = self.member(&self.mean, layer, head);
        for j in 0..half {
            out[j] = q[j] * mean[j] + q[j + half] * mean[j + half];
            out[j + half] = q[j + half] * mean[j] - q[j] * mean[j + half];
        }
    }

    /// The rotated key at `position`.
    pub(super) fn decode(&self, layer: usize, head: usize, position: usize, z: &[f32], out: &mut [f32]) {
        let half = self.head_dim / 2;
        out.copy_from_slice(self.member(&self.mean, layer, head));
        self.phases.rotary().rotate(position, out);
        let maps = self.member(&self.decode, layer, head).chunks_exact(2);
        for ((z, u), &j) in z.chunks_exact(2).zip(maps).zip(&self.frequencies) {
            out[j] += u[0] * z[0] - u[1] * z[1];
            out[j + half] += u[0] * z[1] + u[1] * z[0];
        }
    }

    pub(super) fn bytes(&self) -> usize {
        (self.mean.len() + self.encode.len() + self.decode.len()) * size_of::<f32>()
            + self.frequencies.len() * size_of::<usize>()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a16.zip(b16) {
        for i in 0..16 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}
