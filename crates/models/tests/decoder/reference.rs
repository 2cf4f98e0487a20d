//! Plain f32 attention over everything kept: what the decoder is tested with, independent of the real caches.

use minicache_core::{Footprint, KvCache, ModelShape, Restored, Result};

/// Keeps every state in f32.
#[derive(Clone)]
pub(crate) struct ReferenceCache {
    shape: ModelShape,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    length: usize,
    pending: usize,
}

impl ReferenceCache {
    pub(crate) fn new(shape: ModelShape) -> Self {
        let empty = vec![Vec::new(); shape.layers];
        Self { shape, keys: empty.clone(), values: empty, length: 0, pending: 0 }
    }
}

impl KvCache for ReferenceCache {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_into(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        let s = self.shape;
        let tokens = k.len() / s.kv_dim();
        assert_eq!(q.len(), tokens * s.heads * s.head_dim);
        assert_eq!(out.len(), q.len());
        assert_eq!(self.keys[layer].len(), self.length * s.kv_dim(), "a layer was attended twice in a step");
        self.keys[layer].extend_from_slice(k);
        self.values[layer].extend_from_slice(v);
        self.pending = tokens;
        for t in 0..tokens {
            let position = self.length + t;
            let first = s.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for h in 0..s.heads {
                let q = &q[(t * s.heads + h) * s.head_dim..][..s.head_dim];
                let at = |p: usize| (p * s.kv_heads + h / s.group()) * s.head_dim;
                let scores: Vec<f32> = (first..=position)
                    .map(|p| {
                        let k = &self.keys[layer][at(p)..][..s.head_dim];
                        s.scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|x| (x - largest).exp()).collect();
                let total: f32 = weights.iter().sum();
                let out = &mut out[(t * s.heads + h) * s.head_dim..][..s.head_dim];
                out.fill(0.0);
                for (p, w) in (first..=position).zip(&weights) {
                    let v = &self.values[layer][at(p)..][..s.head_dim];
                    for (o, v) in out.iter_mut().zip(v) {
                        *o += w / total * v;
                    }
                }
            }
        }
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.length += self.pending;
        self.pending = 0;
        Ok(())
    }

    fn len(&self) -> usize {
        self.length
    }

    fn footprint(&self) -> Footprint {
        let held = self.keys.iter().chain(&self.values).map(|v| v.capacity() * 4).sum();
        Footprint { states: held, ..Footprint::default() }
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        Ok(Restored {
            positions: (0..self.length).collect(),
            keys: self.keys[layer].clone(),
            values: self.values[layer].clone(),
        })
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}
