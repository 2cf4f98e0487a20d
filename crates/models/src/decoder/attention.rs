//! From projected queries, keys and values to the attention output: the norms of heads, rotation, then the sequences'
//! caches.

use std::ops::Range;

use minicache_core::{Batch, States};
use rayon::prelude::*;

use super::{Step, host};
use crate::families::{LayerNames, Role};
use crate::linear::Loader;
use crate::rope;
use crate::{ModelConfig, Result};

/// Rows below which spreading over threads does not pay.
const SERIAL_ROWS: usize = 16;

/// Where each step's tokens lie among all new tokens, and their rotations.
pub(crate) struct Positions {
    ranges: Vec<Range<usize>>,
    /// Cosines, then sines, for every new token: `(tokens, rotary_dim)`.
    angles: Vec<f32>,
    rotary_dim: usize,
}

impl Positions {
    pub(crate) fn new(steps: &[Step<'_>], rotary_dim: usize) -> Self {
        let mut ranges = Vec::with_capacity(steps.len());
        let mut total = 0;
        for step in steps {
            ranges.push(total..total + step.tokens.len());
            total += step.tokens.len();
        }
        let mut angles = vec![0.0; total * rotary_dim];
        for (step, range) in steps.iter().zip(&ranges) {
            let rows = angles[range.start * rotary_dim..range.end * rotary_dim].chunks_exact_mut(rotary_dim);
            let Some(rotary) = step.sequence.rotary() else { continue };
            for (i, row) in rows.enumerate() {
                rotary.angles_into(step.sequence.len() + i, row);
            }
        }
        Self { ranges, angles, rotary_dim }
    }

    pub(crate) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// The rotations of all new tokens, `(tokens, rotary_dim)`.
    pub(crate) fn all(&self) -> &[f32] {
        &self.angles
    }

    fn angles(&self, row: usize) -> &[f32] {
        &self.angles[row * self.rotary_dim..(row + 1) * self.rotary_dim]
    }
}

/// Room for queries, keys and values apart.
#[derive(Default)]
pub(crate) struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Attention of one layer.
#[derive(Debug)]
pub(crate) struct Attention {
    layer: usize,
    norm: Option<HeadNorm>,
}

/// Weights of the norms of heads, `(head_dim)` each.
#[derive(Debug)]
struct HeadNorm {
    queries: Vec<f32>,
    keys: Vec<f32>,
}

impl Attention {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig, layer: usize) -> Result<Self> {
        let names = LayerNames::new(config, layer);
        let weights = |role| loader.vector(&names.weight(role)?, config.head_dim);
        let norm = match config.qk_norm {
            true => Some(HeadNorm { queries: weights(Role::QueryNorm)?, keys: weights(Role::KeyNorm)? }),
            false => None,
        };
        Ok(Self { layer, norm })
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        self.norm.as_ref().map_or(0, |norm| (norm.queries.len() + norm.keys.len()) * 4)
    }

    /// `qkv` holds rows of queries, keys and values side by side, `(tokens, q_dim + 2 kv_dim)`, and
    /// is overwritten; `out` is `(tokens, q_dim)`.
    pub(crate) fn attend(
        &self,
        config: &ModelConfig,
        qkv: &mut [f32],
        batch: &mut Batch<'_>,
        positions: &Positions,
        buffers: &mut Buffers,
        out: &mut [f32],
    ) -> Result<()> {
        let (q_dim, kv_dim, head_dim) = (config.q_dim(), config.kv_dim(), config.head_dim);
        let width = q_dim + 2 * kv_dim;
        // One new token: its row is already q, k and v, each contiguous, and heads can be turned where they lie.
        if qkv.len() == width && self.norm.is_none() {
            let (qk, v) = qkv.split_at_mut(q_dim + kv_dim);
            qk.chunks_exact_mut(head_dim).for_each(|head| rope::rotate(positions.angles(0), head));
            let (q, k) = qk.split_at(q_dim);
            return Ok(batch.attend(self.layer, States::new(q, k, v), out)?);
        }

        let rows = qkv.len() / width;
        let Buffers { q, k, v } = buffers;
        q.resize(rows * q_dim, 0.0);
        k.resize(rows * kv_dim, 0.0);
        v.resize(rows * kv_dim, 0.0);
        let row = |row: usize, qkv: &[f32], q: &mut [f32], k: &mut [f32], v: &mut [f32]| {
            let angles = positions.angles(row);
            let (from_q, rest) = qkv.split_at(q_dim);
            let (from_k, from_v) = rest.split_at(kv_dim);
            let weights = self.norm.as_ref().map(|norm| [&norm.queries, &norm.keys]);
            for (side, (from, to)) in [(from_q, q), (from_k, k)].into_iter().enumerate() {
                for (from, to) in from.chunks_exact(head_dim).zip(to.chunks_exact_mut(head_dim)) {
                    match weights {
                        None => rope::rotate_into(angles, from, to),
                        Some(weights) => {
                            host::rms_norm_row(from, weights[side], config.rms_eps, to);
                            rope::rotate(angles, to);
                        }
                    }
                }
            }
            v.copy_from_slice(from_v);
        };
        if rows < SERIAL_ROWS {
            qkv.chunks_exact(width)
                .zip(q.chunks_exact_mut(q_dim))
                .zip(k.chunks_exact_mut(kv_dim))
                .zip(v.chunks_exact_mut(kv_dim))
                .enumerate()
                .for_each(|(i, (((qkv, q), k), v))| row(i, qkv, q, k, v));
        } else {
            qkv.par_chunks_exact(width)
                .zip(q.par_chunks_exact_mut(q_dim))
                .zip(k.par_chunks_exact_mut(kv_dim))
                .zip(v.par_chunks_exact_mut(kv_dim))
                .enumerate()
                .for_each(|(i, (((qkv, q), k), v))| row(i, qkv, q, k, v));
        }

        Ok(batch.attend(self.layer, States::new(q, k, v), out)?)
    }
}
