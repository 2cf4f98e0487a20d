//! Maps folded into weights as they are read.

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Alignment, LayerMaps};
use crate::families::Role;
use crate::{ModelConfig, Result, WeightSource};

/// The weights of a model with an alignment folded in: attention projections and norms of heads in f32, everything else
/// as it is.
pub struct Aligned<'a> {
    inner: &'a dyn WeightSource,
    config: &'a ModelConfig,
    alignment: &'a Alignment,
}

impl<'a> Aligned<'a> {
    /// `source` holds the weights of the model of `config` that `alignment` was chosen for.
    pub fn new(source: &'a dyn WeightSource, config: &'a ModelConfig, alignment: &'a Alignment) -> Self {
        Self { inner: source, config, alignment }
    }

    /// Whether the tensor differs from the model's own.
    pub fn changes(&self, name: &str) -> bool {
        self.part(name).is_some()
    }

    /// The maps that change a tensor, and what it is.
    fn part(&self, name: &str) -> Option<(&'a LayerMaps, Role)> {
        let (layer, role, bias) = self.config.family.meaning(name)?;
        let folded = match role {
            Role::Queries | Role::Keys | Role::Values | Role::Qkv | Role::QueryNorm | Role::KeyNorm => true,
            // The output's bias is added after the maps have been undone.
            Role::Output => !bias,
            _ => false,
        };
        Some((self.alignment.layers.get(layer).filter(|_| folded)?, role))
    }

    fn folded(&self, maps: &LayerMaps, role: Role, name: &str, shape: &[usize]) -> Result<Tensor> {
        let c = self.config;
        let data: Vec<f32> = self.inner.dense(name, shape)?.flatten_all()?.to_vec1()?;
        let width: usize = shape[1..].iter().product();
        let head = c.head_dim * width;
        let undo = |[re, im]: [f64; 2]| {
            let norm = re * re + im * im;
            [re / norm, im / norm]
        };
        // Behind a projection that a norm follows, the factors are in the norm's weights.
        let through = |factor: [f64; 2]| if c.qk_norm { [1.0, 0.0] } else { factor };
        let queries = |w: &[f32]| {
            let group = c.heads / c.kv_heads;
            let mut out = vec![0.0; w.len()];
            for (to, out) in out.chunks_exact_mut(head).enumerate() {
                let (kv, member) = (to / group, to % group);
                let from = maps.order[kv] * group + member;
                let undone = |factor| through(undo(factor));
                turn(&w[from * head..(from + 1) * head], maps.head_keys(kv), undone, width, out);
            }
            out
        };
        let keys = |w: &[f32]| {
            let mut out = vec![0.0; w.len()];
            for (to, out) in out.chunks_exact_mut(head).enumerate() {
                let from = maps.order[to];
                turn(&w[from * head..(from + 1) * head], maps.head_keys(to), through, width, out);
            }
            out
        };
        let values = |w: &[f32]| {
            let mut out = vec![0.0; w.len()];
            out.par_chunks_exact_mut(head).enumerate().for_each(|(to, out)| {
                let from = &w[maps.order[to] * head..(maps.order[to] + 1) * head];
                let map = maps.head_matrix(&maps.values, to);
                for (row, out) in map.chunks_exact(c.head_dim).zip(out.chunks_exact_mut(width)) {
                    let mut sums = vec![0.0f64; width];
                    for (b, from) in row.iter().zip(from.chunks_exact(width)) {
                        sums.iter_mut().zip(from).for_each(|(s, x)| *s += b * f64::from(*x));
                    }
                    out.iter_mut().zip(&sums).for_each(|(o, s)| *o = *s as f32);
                }
            });
            out
        };
        let norm = |factor: &dyn Fn([f64; 2]) -> [f64; 2]| {
            let mut out = vec![0.0; data.len()];
            turn(&data, maps.head_keys(0), factor, 1, &mut out);
            out
        };
        let out = match role {
            Role::Queries => queries(&data),
            Role::Keys => keys(&data),
            Role::Values => values(&data),
            // Factors are real here and the same for all heads.
            Role::QueryNorm => norm(&undo),
            Role::KeyNorm => norm(&|factor| factor),
            Role::Qkv => {
                let (q, rest) = data.split_at(c.q_dim() * width);
                let (k, v) = rest.split_at(c.kv_dim() * width);
                [queries(q), keys(k), values(v)].concat()
            }
            Role::Output => self.output(maps, &data),
            _ => data,
        };
        Ok(Tensor::from_vec(out, shape, &Device::Cpu)?)
    }

    /// W_o with columns of every query head multiplied by the inverse of its KV head's map.
    fn output(&self, maps: &LayerMaps, w: &[f32]) -> Vec<f32> {
        let c = self.config;
        let (dim, group, width) = (c.head_dim, c.heads / c.kv_heads, c.q_dim());
        let mut out = vec![0.0; w.len()];
        out.par_chunks_exact_mut(width).zip(w.par_chunks_exact(width)).for_each(|(out, w)| {
            let mut sums = vec![0.0f64; dim];
            for (to, out) in out.chunks_exact_mut(dim).enumerate() {
                let (kv, member) = (to / group, to % group);
                let from = &w[(maps.order[kv] * group + member) * dim..][..dim];
                sums.fill(0.0);
                for (x, row) in from.iter().zip(maps.head_matrix(&maps.inverse, kv).chunks_exact(dim)) {
                    sums.iter_mut().zip(row).for_each(|(s, b)| *s += f64::from(*x) * b);
                }
                out.iter_mut().zip(&sums).for_each(|(o, s)| *o = *s as f32);
            }
        });
        out
    }
}

impl LayerMaps {
    fn head_keys(&self, head: usize) -> &[[f64; 2]] {
        let half = self.keys.len() / self.order.len();
        &self.keys[head * half..(head + 1) * half]
    }

    fn head_matrix<'m>(&self, of: &'m [f64], head: usize) -> &'m [f64] {
        let size = of.len() / self.order.len();
        &of[head * size..(head + 1) * size]
    }
}

/// Multiplies frequency pair j (rows j and j + half) of one head's rows by `factor(c_j)`; rows beyond them pass through.
fn turn(
    from: &[f32],
    factors: &[[f64; 2]],
    factor: impl Fn([f64; 2]) -> [f64; 2],
    width: usize,
    out: &mut [f32],
) {
    let half = factors.len();
    out.copy_from_slice(from);
    for (j, c) in factors.iter().enumerate() {
        let [re, im] = factor(*c);
        for i in 0..width {
            let (x, y) = (f64::from(from[j * width + i]), f64::from(from[(j + half) * width + i]));
            out[j * width + i] = (re * x - im * y) as f32;
            out[(j + half) * width + i] = (im * x + re * y) as f32;
        }
    }
}

impl WeightSource for Aligned<'_> {
    fn origin(&self) -> String {
        self.inner.origin()
    }

    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        self.inner.shape_of(name)
    }

    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.part(name) {
            Some((maps, role)) => self.folded(maps, role, name, shape),
            None => self.inner.dense(name, shape),
        }
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if self.changes(name) { self.dense(name, shape) } else { self.inner.stored(name, shape) }
    }

    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        if self.changes(name) { Ok(None) } else { self.inner.quantized(name, shape) }
    }
}
