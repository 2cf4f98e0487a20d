//! Plain f32 attention over everything kept: what the decoder is tested with, independent of the real caches.

use minicache_core::{Footprint, KvCache, ModelShape, Restored, Result, States};

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

    fn attend_held(&self, layer: usize, states: States<'_>, out: &mut [f32], _: &mut Vec<f32>) -> Result<()> {
        let (s, q) = (self.shape, states.q);
        let tokens = states.k.len() / s.kv_dim();
        assert_eq!(q.len(), tokens * s.heads * s.head_dim);
        assert_eq!(out.len(), q.len());
        assert_eq!(self.keys[layer].len(), self.length * s.kv_dim(), "a layer was attended twice in a step");
        let keys = [&self.keys[layer][..], states.k].concat();
        let values = [&self.values[layer][..], states.v].concat();
        for t in 0..tokens {
            let position = self.length + t;
            let first = s.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for h in 0..s.heads {
                let q = &q[(t * s.heads + h) * s.head_dim..][..s.head_dim];
                let at = |p: usize| (p * s.kv_heads + h / s.group()) * s.head_dim;
                let scores: Vec<f32> = (first..=position)
                    .map(|p| {
                        let k = &keys[at(p)..][..s.head_dim];
                        s.scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|x| (x - largest).exp()).collect();
                let total: f32 = weights.iter().sum();
                let out = &mut out[(t * s.heads + h) * s.head_dim..][..s.head_dim];
                out.fill(0.0);
                for (p, w) in (first..=position).zip(&weights) {
                    let v = &values[at(p)..][..s.head_dim];
                    for (o, v) in out.iter_mut().zip(v) {
                        *o += w / total * v;
                    }
                }
            }
        }
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> Result<()> {
        self.keys[layer].extend_from_slice(states.k);
        self.values[layer].extend_from_slice(states.v);
        self.pending = states.k.len() / self.shape.kv_dim();
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
