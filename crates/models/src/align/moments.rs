//! What alignment has to know of the states of adjacent layers, streamed over calibration text: memory does not depend
//! on the number of tokens.

use std::sync::{Arc, Mutex, PoisonError};

use minicache_core::settings::StoreType;
use minicache_core::{CacheSpec, KvCache, LayerStates, ModelShape, Resources, Rotary, observed_steps};
use rayon::prelude::*;

use crate::linear::product;

/// Sums over tokens. Heads are those of the model as it is; `half` is rotary_dim / 2; complex numbers are (re, im).
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub(super) shape: ModelShape,
    pub(super) half: usize,
    /// One per layer.
    pub(super) layers: Vec<Layer>,
    /// One per pair of adjacent layers: (0, 1), (1, 2), ...
    pub(super) pairs: Vec<Pair>,
    pub(super) tokens: usize,
    sinks: usize,
}

/// Of one layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// Sum of |q_j|^2 over tokens and the query heads of a KV head `(kv_heads, half)`.
    pub(super) queries: Vec<f64>,
    /// Sum of |k_j|^2 of un-rotated keys `(kv_heads, half)`.
    pub(super) keys: Vec<f64>,
    /// Sum of un-rotated keys `(kv_heads, half, 2)`.
    pub(super) key_sum: Vec<f64>,
    /// Sum of values `(kv_heads * head_dim)`.
    pub(super) value_sum: Vec<f64>,
    /// Sum of v v^T of every head `(kv_heads, head_dim, head_dim)`.
    pub(super) values: Vec<f64>,
}

/// Of a layer a and the one above it, b.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    /// Sum of k_a conj(k_b) of un-rotated keys `(kv_heads, kv_heads, half, 2)`.
    pub(super) keys: Vec<f64>,
    /// Sum of v_a v_b^T `(kv_heads * head_dim, kv_heads * head_dim)`.
    pub(super) values: Vec<f64>,
}

impl Moments {
    pub(super) fn new(shape: &ModelShape, rotary_dim: usize, sinks: usize) -> Self {
        let (heads, half, kv_dim) = (shape.kv_heads, rotary_dim / 2, shape.kv_dim());
        let layer = Layer {
            queries: vec![0.0; heads * half],
            keys: vec![0.0; heads * half],
            key_sum: vec![0.0; heads * half * 2],
            value_sum: vec![0.0; kv_dim],
            values: vec![0.0; heads * shape.head_dim * shape.head_dim],
        };
        let pair = Pair { keys: vec![0.0; heads * heads * half * 2], values: vec![0.0; kv_dim * kv_dim] };
        Self {
            shape: *shape,
            half,
            layers: vec![layer; shape.layers],
            pairs: vec![pair; shape.layers.saturating_sub(1)],
            tokens: 0,
            sinks,
        }
    }

    /// A full f32 cache that adds the states of every step to `moments`.
    ///
    /// # Errors
    /// As [`minicache_core::build`].
    pub(super) fn collector(
        moments: &Arc<Mutex<Self>>,
        rotary: Arc<dyn Rotary>,
    ) -> minicache_core::Result<Box<dyn KvCache>> {
        let shape = moments.lock().unwrap_or_else(PoisonError::into_inner).shape;
        let spec = CacheSpec::default().with_dtype(StoreType::F32);
        let inner = minicache_core::build(&spec, &shape, &Resources::default())?;
        let moments = moments.clone();
        Ok(observed_steps(inner, move |first, mut states| {
            let mut moments = moments.lock().unwrap_or_else(PoisonError::into_inner);
            moments.add(first, &mut states, &*rotary);
        }))
    }

    /// Adds the states of a step whose first token has position `first`.
    fn add(&mut self, first: usize, states: &mut [LayerStates], rotary: &dyn Rotary) {
        let (dim, kv_dim) = (self.shape.head_dim, self.shape.kv_dim());
        let all = states[0].k.len() / kv_dim;
        let skip = self.sinks.saturating_sub(first).min(all);
        if skip == all {
            return;
        }
        self.tokens += all - skip;
        let (shape, half) = (self.shape, self.half);
        states.par_iter_mut().zip(&mut self.layers).for_each(|(s, layer)| {
            s.q.drain(..skip * shape.heads * dim);
            s.k.drain(..skip * kv_dim);
            s.v.drain(..skip * kv_dim);
            for (i, head) in s.k.chunks_exact_mut(dim).enumerate() {
                rotary.unrotate(first + skip + i / shape.kv_heads, head);
            }
            layer.add(s, &shape, half);
        });
        let states = &*states;
        self.pairs
            .par_iter_mut()
            .enumerate()
            .for_each(|(a, pair)| pair.add(&states[a], &states[a + 1], &shape, half));
    }
}

impl Layer {
    fn add(&mut self, states: &LayerStates, shape: &ModelShape, half: usize) {
        let (dim, heads) = (shape.head_dim, shape.kv_heads);
        let energy = |x: &[f32], sums: &mut [f64]| {
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum += f64::from(x[j] * x[j] + x[j + half] * x[j + half]);
            }
        };
        for (i, q) in states.q.chunks_exact(dim).enumerate() {
            let head = i % shape.heads / shape.group();
            energy(q, &mut self.queries[head * half..(head + 1) * half]);
        }
        for (i, k) in states.k.chunks_exact(dim).enumerate() {
            let head = i % heads;
            energy(k, &mut self.keys[head * half..(head + 1) * half]);
            for (j, sum) in
                self.key_sum[head * half * 2..(head + 1) * half * 2].chunks_exact_mut(2).enumerate()
            {
                sum[0] += f64::from(k[j]);
                sum[1] += f64::from(k[j + half]);
            }
        }
        for v in states.v.chunks_exact(heads * dim) {
            self.value_sum.iter_mut().zip(v).for_each(|(s, x)| *s += f64::from(*x));
            for (sums, v) in self.values.chunks_exact_mut(dim * dim).zip(v.chunks_exact(dim)) {
                for (row, x) in sums.chunks_exact_mut(dim).zip(v) {
                    row.iter_mut().zip(v).for_each(|(s, y)| *s += f64::from(x * y));
                }
            }
        }
    }
}

impl Pair {
    fn add(&mut self, a: &LayerStates, b: &LayerStates, shape: &ModelShape, half: usize) {
        let (dim, heads, kv_dim) = (shape.head_dim, shape.kv_heads, shape.kv_dim());
        for (ka, kb) in a.k.chunks_exact(kv_dim).zip(b.k.chunks_exact(kv_dim)) {
            for (i, sums) in self.keys.chunks_exact_mut(half * 2).enumerate() {
                let (x, y) = (&ka[i / heads * dim..][..dim], &kb[i % heads * dim..][..dim]);
                for (j, sum) in sums.chunks_exact_mut(2).enumerate() {
                    sum[0] += f64::from(x[j] * y[j] + x[j + half] * y[j + half]);
                    sum[1] += f64::from(x[j + half] * y[j] - x[j] * y[j + half]);
                }
            }
        }
        // (kv_dim, tokens) both, so that the product of rows is the second moment.
        let transposed = |x: &[f32]| {
            let tokens = x.len() / kv_dim;
            (0..x.len()).map(|i| x[i % tokens * kv_dim + i / tokens]).collect::<Vec<f32>>()
        };
        let (a, b) = (transposed(&a.v), transposed(&b.v));
        let mut products = vec![0.0; kv_dim * kv_dim];
        product(&a, &b, kv_dim, a.len() / kv_dim, &mut products);
        self.values.iter_mut().zip(&products).for_each(|(s, p)| *s += f64::from(*p));
    }
}
