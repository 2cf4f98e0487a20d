//! The caches alone, on synthetic states of a model's shape: no weights needed.

use std::time::Instant;

use anyhow::Result;
use minicache_core::{
    Batch, CacheSpec, LayerSimilarity, LayerStates, ModelShape, Resources, Sequence, Synthetic, build,
};
use rayon::prelude::*;

use super::{Subject, bytes_wanted};

/// Tokens that prefill attention is timed on, at most: its cost grows with the square.
const PREFILL: usize = 1024;
/// Numbers of a side's states made at a time.
const STEP: usize = 1 << 22;

/// Attention of a batch of sequences with synthetic states.
pub(crate) struct Attention {
    /// The model's layers, all or some of them.
    shape: ModelShape,
    /// Layers of the model.
    layers: usize,
    context: usize,
    batch: usize,
    similarity: LayerSimilarity,
    /// States of the new tokens of all sequences: by step, then layer.
    fresh: Vec<Vec<LayerStates>>,
    at: usize,
    /// Attention output of a layer, reused.
    out: Vec<f32>,
}

/// Steps of new tokens that are kept; they repeat after that.
const FRESH: usize = 4;

impl Attention {
    /// As many of the model's layers as fit into `memory` bytes with all `specs` at once.
    pub(crate) fn new(
        shape: &ModelShape,
        specs: &[CacheSpec],
        context: usize,
        batch: usize,
        similarity: LayerSimilarity,
        memory: usize,
    ) -> Result<Self> {
        let wanted = bytes_wanted(shape, specs, context, batch);
        let most = ((memory as f64 / wanted * shape.layers as f64) as usize).min(shape.layers);
        let part = ModelShape { layers: fewer(specs, shape.layers, most), ..*shape };
        let mut made = Self {
            shape: part,
            layers: shape.layers,
            context,
            batch,
            similarity,
            fresh: Vec::new(),
            at: 0,
            out: vec![0.0; batch * shape.heads * shape.head_dim],
        };
        made.fresh = made.fresh_tokens()?;
        Ok(made)
    }

    /// Layers that are really there, and those of the model.
    pub(crate) fn layers(&self) -> (usize, usize) {
        (self.shape.layers, self.layers)
    }

    fn fresh_tokens(&self) -> Result<Vec<Vec<LayerStates>>> {
        let mut steps = vec![vec![LayerStates::default(); self.shape.layers]; FRESH];
        for sequence in 0..self.batch as u64 {
            let states = Synthetic::new(&self.shape, FRESH, self.similarity, 1000 + sequence);
            for (step, layers) in steps.iter_mut().enumerate() {
                states.states(step..step + 1, |layer, k, v| {
                    layers[layer].q.extend(states.queries(layer, step, 1));
                    layers[layer].k.extend(k);
                    layers[layer].v.extend(v);
                    Ok(())
                })?;
            }
        }
        Ok(steps)
    }

    /// Time of prefilling one sequence through attention, for as many layers as keep the model's share of pairs.
    fn prefill_rate(&self, spec: &CacheSpec) -> Result<f64> {
        let tokens = self.context.min(PREFILL);
        let layers = fewer(std::slice::from_ref(spec), self.shape.layers, 4);
        let shape = ModelShape { layers, ..self.shape };
        let states = Synthetic::new(&shape, tokens, self.similarity, 0);
        let mut cache = build(&reduced(spec, self.layers, layers), &shape, &Resources::default())?;
        let mut out = vec![0.0; tokens * shape.heads * shape.head_dim];
        let mut time = 0.0;
        states.states(0..tokens, |layer, k, v| {
            let q = states.queries(layer, 0, tokens);
            let start = Instant::now();
            cache.attend_into(layer, &q, k, v, &mut out)?;
            time += start.elapsed().as_secs_f64();
            Ok(())
        })?;
        let start = Instant::now();
        cache.finish_step()?;
        time += start.elapsed().as_secs_f64();
        Ok(tokens as f64 / (time * self.layers as f64 / layers as f64))
    }
}

impl Subject for Attention {
    fn fill(&mut self, spec: &CacheSpec) -> Result<(Vec<Sequence>, f64)> {
        let rate = self.prefill_rate(spec)?;
        let spec = reduced(spec, self.layers, self.shape.layers);
        let step = (STEP / self.shape.kv_dim()).max(1);
        let caches = (0..self.batch).into_par_iter().map(|i| {
            let mut cache = build(&spec, &self.shape, &Resources::default())?;
            let states = Synthetic::new(&self.shape, self.context, self.similarity, i as u64);
            states.fill(&mut *cache, 0..self.context, step)?;
            Ok(Sequence::new(cache))
        });
        Ok((caches.collect::<minicache_core::Result<_>>()?, rate))
    }

    fn step(&mut self, sequences: &mut [Sequence]) -> Result<()> {
        let step = self.at % FRESH;
        self.at += 1;
        let (fresh, out) = (&self.fresh[step], &mut self.out);
        // Inside the pool, as a decoder does it.
        rayon::scope(|_| {
            let mut batch = Batch::begin(sequences.iter_mut().map(|s| (s, 1)))?;
            for (layer, states) in fresh.iter().enumerate() {
                batch.attend(layer, states.states(), out)?;
            }
            batch.finish()
        })?;
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn scale(&self) -> f64 {
        self.layers as f64 / self.shape.layers as f64
    }
}

/// The number of layers, at most `most` and at least 1, that has the same share of pairs as `layers` for every spec;
/// where there is none, the nearest below `most`.
fn fewer(specs: &[CacheSpec], layers: usize, most: usize) -> usize {
    if most >= layers {
        return layers;
    }
    let exact = |n: &usize| specs.iter().all(|s| (s.most_pairs(layers) * n).is_multiple_of(layers));
    (1..=most).rev().find(exact).unwrap_or(most.max(2))
}

/// `spec` for `n` of `layers` layers: as many pairs in proportion, the deepest.
fn reduced(spec: &CacheSpec, layers: usize, n: usize) -> CacheSpec {
    if n == layers {
        return spec.clone();
    }
    let pairs = (spec.most_pairs(layers) * n).div_ceil(layers);
    let start_layer = minicache_core::settings::StartLayer::Layer((n - 2 * pairs.min(n / 2)).min(n - 1));
    spec.clone().with_start_layer(start_layer).with_pairs(minicache_core::settings::Pairs::Deep)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fewer_layers_keep_the_share_of_pairs() {
        let spec = CacheSpec::parse("minicache").unwrap();
        let specs = [spec.clone(), CacheSpec::default()];
        for (layers, most, want) in
            [(32, 40, 32), (32, 31, 28), (32, 7, 4), (80, 79, 76), (80, 5, 4), (30, 12, 12)]
        {
            let n = fewer(&specs, layers, most);
            assert_eq!(n, want, "{most} of {layers}");
            let pairs = |spec: &CacheSpec, n| spec.most_pairs(n) as f64 / n as f64;
            let (got, of) = (pairs(&reduced(&spec, layers, n), n), pairs(&spec, layers));
            assert!((got - of).abs() < 0.03, "{got} for {of}: {n} of {layers}");
        }
    }

    #[test]
    fn caches_alone_decode() {
        let shape =
            ModelShape { layers: 8, heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, ..ModelShape::PLAIN };
        let specs = [CacheSpec::default(), CacheSpec::parse("minicache-4").unwrap()];
        let full = shape.full_bytes(100);
        let mut subject =
            Attention::new(&shape, &specs, 100, 2, LayerSimilarity::default(), 3 * full).unwrap();
        assert_eq!(subject.layers(), (4, 8));
        let measured = super::super::measure(&mut subject, &specs, 1e10, &|_| {}).unwrap();
        let ratio = |i: usize| (2 * full) as f64 / measured[i].cache_bytes;
        assert!(ratio(0) > 0.7 && ratio(0) <= 1.0, "{measured:?}");
        assert!(measured.iter().all(|m| m.decode_tokens_per_s > 0.0 && m.prefill_tokens_per_s > 0.0));
    }
}
