//! First and second moments of keys, values and queries over calibration text, streamed: memory does not depend on
//! the number of tokens.

use std::sync::{Arc, Mutex, PoisonError};

use crate::CacheSpec;
use crate::settings::{ModelShape, StoreType};
use rayon::prelude::*;

use super::basis::{Grouping, Span};
use crate::cache::KvCache;
use crate::dense::{View, mul_transposed};
use crate::observed::{LayerStates, observed_steps};
use crate::{Resources, Result, Rotary};

/// Sums over the values of one span, n = layers * heads * head_dim.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueMoments {
    /// What shares a latent.
    pub span: Span,
    /// Sum of states `(n)`.
    pub sum: Vec<f64>,
    /// Sum of outer products `(n, n)`.
    pub products: Vec<f64>,
}

/// Sums over the un-rotated keys of one span, m = layers * heads vectors of head_dim / 2 complex numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyMoments {
    /// What shares a latent.
    pub span: Span,
    /// Sum of un-rotated keys `(m, head_dim)`.
    pub sum: Vec<f64>,
    /// Sum of k_a conj(k_b) per frequency `(head_dim / 2, m, m, 2)`.
    pub products: Vec<f64>,
}

/// All sums, for every grouping asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// The model's shape.
    pub shape: ModelShape,
    /// By grouping, then span.
    pub keys: Vec<(Grouping, Vec<KeyMoments>)>,
    /// By grouping, then span.
    pub values: Vec<(Grouping, Vec<ValueMoments>)>,
    /// Values of every (layer, KV head) alone, whatever the groupings: what is weighed by them does not depend on which
    /// groupings are asked for together.
    pub heads: Vec<ValueMoments>,
    /// Sum of |q_j|^2 over tokens and the query heads of a KV head, `(layers, kv_heads, head_dim / 2)`.
    pub queries: Vec<f64>,
    /// Sum of the squared norm of the residual stream that enters each layer `(layers)`; left to whoever runs the model.
    pub stream: Vec<f64>,
    /// Tokens counted.
    pub tokens: usize,
    /// Positions below this one are not counted: attention sinks are stored exactly, and unlike any other token.
    pub sinks: usize,
}

impl Moments {
    /// Empty sums for the groupings of keys and of values.
    pub fn new(shape: &ModelShape, keys: &[Grouping], values: &[Grouping], sinks: usize) -> Self {
        let (kv_heads, dim) = (shape.kv_heads, shape.head_dim);
        let key = |span: Span| {
            let m = span.members();
            KeyMoments { span, sum: vec![0.0; m * dim], products: vec![0.0; dim / 2 * m * m * 2] }
        };
        let value = |span: Span| {
            let n = span.members() * dim;
            ValueMoments { span, sum: vec![0.0; n], products: vec![0.0; n * n] }
        };
        let spans = |grouping: Grouping| grouping.spans(shape.layers, kv_heads);
        Self {
            shape: *shape,
            keys: keys.iter().map(|&g| (g, spans(g).map(key).collect())).collect(),
            values: values.iter().map(|&g| (g, spans(g).map(value).collect())).collect(),
            heads: spans(Grouping { layers: 1, heads: 1 }).map(value).collect(),
            queries: vec![0.0; shape.layers * kv_heads * dim / 2],
            stream: vec![0.0; shape.layers],
            tokens: 0,
            sinks,
        }
    }

    /// A full f32 cache that adds the states of every step to `moments`.
    ///
    /// # Errors
    /// As [`crate::build`].
    pub fn collector(moments: &Arc<Mutex<Self>>, rotary: Arc<dyn Rotary>) -> Result<Box<dyn KvCache>> {
        let shape = moments.lock().unwrap_or_else(PoisonError::into_inner).shape;
        let spec = CacheSpec::default().with_dtype(StoreType::F32);
        let inner = crate::build(&spec, &shape, &Resources::default())?;
        let moments = moments.clone();
        Ok(observed_steps(inner, move |first, states| {
            let mut moments = moments.lock().unwrap_or_else(PoisonError::into_inner);
            moments.add(first, &states, &*rotary);
        }))
    }

    fn add(&mut self, first: usize, states: &[LayerStates], rotary: &dyn Rotary) {
        let (kv_dim, dim) = (self.shape.kv_dim(), self.shape.head_dim);
        let all = states[0].k.len() / kv_dim;
        let skip = self.sinks.saturating_sub(first).min(all);
        let tokens = all - skip;
        if tokens == 0 {
            return;
        }
        self.tokens += tokens;
        let unrotated: Vec<Vec<f32>> = states
            .iter()
            .map(|s| {
                let mut k = s.k[skip * kv_dim..].to_vec();
                for (i, head) in k.chunks_exact_mut(dim).enumerate() {
                    rotary.unrotate(first + skip + i / self.shape.kv_heads, head);
                }
                k
            })
            .collect();
        let shape = self.shape;
        self.keys.par_iter_mut().flat_map(|(_, spans)| spans).for_each(|moments| {
            let layers = &unrotated[moments.span.first..moments.span.first + moments.span.layers];
            moments.add(layers, &shape);
        });
        let values = self.values.par_iter_mut().flat_map(|(_, spans)| spans);
        values.chain(&mut self.heads).for_each(|moments| {
            let layers = &states[moments.span.first..moments.span.first + moments.span.layers];
            let layers: Vec<&[f32]> = layers.iter().map(|s| &s.v[skip * kv_dim..]).collect();
            moments.add(&layers, &shape);
        });
        let (half, per_group) = (dim / 2, self.shape.group() * dim);
        for (s, sums) in states.iter().zip(self.queries.chunks_exact_mut(self.shape.kv_heads * half)) {
            let heads = s.q.chunks_exact(per_group).skip(skip * self.shape.kv_heads);
            for (i, q) in heads.enumerate() {
                let sums = &mut sums[i % self.shape.kv_heads * half..][..half];
                for q in q.chunks_exact(dim) {
                    for j in 0..half {
                        sums[j] += f64::from(q[j] * q[j] + q[j + half] * q[j + half]);
                    }
                }
            }
        }
    }
}

impl KeyMoments {
    fn add(&mut self, layers: &[Vec<f32>], shape: &ModelShape) {
        let (dim, half, heads) = (shape.head_dim, shape.head_dim / 2, shape.kv_heads);
        let places: Vec<(usize, usize)> = self.span.places().collect();
        let m = places.len();
        let (mut re, mut im) = (vec![0.0f64; m], vec![0.0f64; m]);
        for token in 0..layers[0].len() / (heads * dim) {
            let key = |member: usize| {
                let (layer, head) = places[member];
                &layers[layer][(token * heads + head) * dim..][..dim]
            };
            for member in 0..m {
                let sums = &mut self.sum[member * dim..(member + 1) * dim];
                sums.iter_mut().zip(key(member)).for_each(|(s, &k)| *s += f64::from(k));
            }
            for j in 0..half {
                for member in 0..m {
                    (re[member], im[member]) = (f64::from(key(member)[j]), f64::from(key(member)[j + half]));
                }
                let products = &mut self.products[j * m * m * 2..(j + 1) * m * m * 2];
                for (a, row) in products.chunks_exact_mut(2 * m).enumerate() {
                    for (b, c) in row.chunks_exact_mut(2).enumerate() {
                        c[0] += re[a] * re[b] + im[a] * im[b];
                        c[1] += im[a] * re[b] - re[a] * im[b];
                    }
                }
            }
        }
    }
}

impl ValueMoments {
    fn add(&mut self, layers: &[&[f32]], shape: &ModelShape) {
        let (n, dim) = (self.sum.len(), shape.head_dim);
        let tokens = layers[0].len() / shape.kv_dim();
        // (n, tokens), so that the product of rows is the second moment.
        let mut x = vec![0.0; n * tokens];
        for ((layer, head), x) in self.span.places().zip(x.chunks_exact_mut(dim * tokens)) {
            for (token, state) in layers[layer].chunks_exact(shape.kv_dim()).enumerate() {
                for (c, &v) in state[head * dim..(head + 1) * dim].iter().enumerate() {
                    x[c * tokens + token] = v;
                }
            }
        }
        for (sum, row) in self.sum.iter_mut().zip(x.chunks_exact(tokens)) {
            *sum += row.iter().map(|&v| f64::from(v)).sum::<f64>();
        }
        let mut products = vec![0.0; n * n];
        let view = View::new(&x, n, tokens, tokens);
        mul_transposed(view, view, &mut products);
        self.products.iter_mut().zip(&products).for_each(|(s, &p)| *s += f64::from(p));
    }
}
