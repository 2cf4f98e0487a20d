//! A whole model with its caches.

use std::time::{Duration, Instant};

use anyhow::Result;
use half::f16;
use half::slice::HalfFloatSliceExt;
use minicache_core::{CacheSpec, Footprint, KvCache, ModelShape, Restored};
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;

use super::{MOST_STEPS, Subject};
use crate::source::new_cache;

/// A model that decodes a batch of sequences after a context of made-up tokens.
pub(crate) struct Whole<'a> {
    model: &'a Model,
    batch: usize,
    tokens: Vec<u32>,
    planned_len: usize,
    /// The context's states by layer, computed with the first cache, from which other sequences are filled.
    recorded: Vec<[Vec<f16>; 2]>,
    steps: u32,
}

impl<'a> Whole<'a> {
    pub(crate) fn new(model: &'a Model, context: usize, batch: usize) -> Self {
        let vocab = model.config.vocab as u64;
        // Spread over the vocabulary; which tokens they are makes no difference to time.
        let tokens =
            (0..context as u64).map(|i| ((i * 2_654_435_761 % (1 << 32) * vocab) >> 32) as u32).collect();
        let planned_len = context + MOST_STEPS;
        Self { model, batch, tokens, planned_len, recorded: Vec::new(), steps: 0 }
    }
}

impl Subject for Whole<'_> {
    fn fill(&mut self, spec: &CacheSpec) -> Result<(Vec<Box<dyn KvCache>>, f64)> {
        let mut caches: Vec<Box<dyn KvCache>> =
            (0..self.batch).map(|_| new_cache(self.model, spec, self.planned_len)).collect::<Result<_>>()?;
        let (first, others) = caches.split_at_mut(1);
        let record = !others.is_empty() && self.recorded.is_empty();
        let layers = self.model.decoder.shape().layers;
        let mut tap = Tap {
            cache: &mut *first[0],
            states: record.then(|| vec![Default::default(); layers]),
            spent: Duration::ZERO,
        };
        let start = Instant::now();
        let step = Step {
            tokens: &self.tokens,
            cache: &mut tap,
            planned_len: self.planned_len,
            logits: LogitsFor::Last,
        };
        self.model.decoder.forward(&mut [step])?;
        let time = start.elapsed() - tap.spent;
        if let Some(states) = tap.states {
            self.recorded = states;
        }
        // Prefill attends to exact states, so those of another sequence with these tokens are the same.
        others.par_iter_mut().try_for_each(|cache| -> minicache_core::Result<()> {
            let widened = |x: &[f16]| {
                let mut out = vec![0.0; x.len()];
                x.convert_to_f32_slice(&mut out);
                out
            };
            for (layer, [k, v]) in self.recorded.iter().enumerate() {
                cache.append(layer, &widened(k), &widened(v))?;
            }
            cache.finish_step()
        })?;
        Ok((caches, self.tokens.len() as f64 / time.as_secs_f64()))
    }

    fn step(&mut self, caches: &mut [Box<dyn KvCache>]) -> Result<()> {
        self.steps = self.steps.wrapping_add(1);
        let vocab = self.model.config.vocab;
        let tokens: Vec<u32> =
            (0..caches.len()).map(|i| ((self.steps as usize * 31 + i * 7) % vocab) as u32).collect();
        let planned_len = self.planned_len;
        let mut steps: Vec<Step<'_>> = caches
            .iter_mut()
            .zip(tokens.chunks(1))
            .map(|(cache, tokens)| Step { tokens, cache: &mut **cache, planned_len, logits: LogitsFor::Last })
            .collect();
        self.model.decoder.forward(&mut steps)?;
        Ok(())
    }

    /// All weights but those that a step does not touch: the rows of an embedding of its own, and the experts that no
    /// sequence is sent to.
    fn weight_bytes(&self) -> usize {
        let config = &self.model.config;
        let all = config.parameters() as f64;
        let mut idle = if config.tied { 0.0 } else { (config.vocab * config.hidden) as f64 };
        if let Some(experts) = config.experts {
            let one = (3 * config.layers * config.hidden * config.intermediate) as f64;
            idle += one * experts.count.saturating_sub(experts.used * self.batch) as f64;
        }
        (self.model.decoder.weight_bytes() as f64 * (1.0 - idle / all)) as usize
    }

    fn scale(&self) -> f64 {
        1.0
    }
}

/// A cache that notes the states it is given, and the time that noting takes.
struct Tap<'a> {
    cache: &'a mut dyn KvCache,
    states: Option<Vec<[Vec<f16>; 2]>>,
    spent: Duration,
}

impl KvCache for Tap<'_> {
    fn shape(&self) -> &ModelShape {
        self.cache.shape()
    }

    fn attend_into(
        &mut self,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
    ) -> minicache_core::Result<()> {
        self.cache.attend_into(layer, q, k, v, out)?;
        if let Some(states) = &mut self.states {
            let start = Instant::now();
            for (to, from) in states[layer].iter_mut().zip([k, v]) {
                to.resize(from.len(), f16::ZERO);
                to.convert_from_f32_slice(from);
            }
            self.spent += start.elapsed();
        }
        Ok(())
    }

    fn finish_step(&mut self) -> minicache_core::Result<()> {
        self.cache.finish_step()
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }

    fn restored(&self, layer: usize) -> minicache_core::Result<Restored> {
        self.cache.restored(layer)
    }

    fn fork(&self) -> Box<dyn KvCache> {
        self.cache.fork()
    }
}
