//! A whole model with its caches.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use half::f16;
use half::slice::HalfFloatSliceExt;
use minicache_core::{CacheSpec, Sequence, States, observed};
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;

use super::{MOST_STEPS, Subject};

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
    fn fill(&mut self, spec: &CacheSpec) -> Result<(Vec<Sequence>, f64)> {
        let record = self.batch > 1 && self.recorded.is_empty();
        let noted = Arc::new(Mutex::new(Noted::default()));
        let mut first = self.model.sequence(spec, self.planned_len)?;
        if record {
            let noted = noted.clone();
            first = first.wrapped(|cache| {
                observed(cache, move |_, _, states| {
                    noted.lock().unwrap_or_else(PoisonError::into_inner).note(states);
                })
            });
        }
        let start = Instant::now();
        let step = Step { tokens: &self.tokens, sequence: &mut first, logits: LogitsFor::Last };
        self.model.decoder.forward(&mut [step])?;
        let mut time = start.elapsed();
        if record {
            let noted = std::mem::take(&mut *noted.lock().unwrap_or_else(PoisonError::into_inner));
            time -= noted.spent;
            self.recorded = noted.states;
            // What notes is not to be there when steps are timed.
            first = first.fork();
        }
        // Prefill attends to exact states, so those of another sequence with these tokens are the same.
        let others = (1..self.batch).into_par_iter().map(|_| -> Result<Sequence> {
            let mut other = self.model.sequence(spec, self.planned_len)?;
            let widened = |x: &[f16]| {
                let mut out = vec![0.0; x.len()];
                x.convert_to_f32_slice(&mut out);
                out
            };
            for (layer, [k, v]) in self.recorded.iter().enumerate() {
                other.cache_mut().append(layer, &widened(k), &widened(v))?;
            }
            other.cache_mut().finish_step()?;
            Ok(other)
        });
        let mut sequences = others.collect::<Result<Vec<_>>>()?;
        sequences.insert(0, first);
        Ok((sequences, self.tokens.len() as f64 / time.as_secs_f64()))
    }

    fn step(&mut self, sequences: &mut [Sequence]) -> Result<()> {
        self.steps = self.steps.wrapping_add(1);
        let vocab = self.model.config.vocab;
        let tokens: Vec<u32> =
            (0..sequences.len()).map(|i| ((self.steps as usize * 31 + i * 7) % vocab) as u32).collect();
        let step = |(sequence, tokens)| Step { tokens, sequence, logits: LogitsFor::Last };
        let mut steps: Vec<Step<'_>> = sequences.iter_mut().zip(tokens.chunks(1)).map(step).collect();
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

/// A prompt's states by layer, and the time that noting them took.
#[derive(Default)]
struct Noted {
    states: Vec<[Vec<f16>; 2]>,
    spent: Duration,
}

impl Noted {
    fn note(&mut self, states: States<'_>) {
        let start = Instant::now();
        self.states.push([states.k, states.v].map(|x| {
            let mut to = vec![f16::ZERO; x.len()];
            to.convert_from_f32_slice(x);
            to
        }));
        self.spent += start.elapsed();
    }
}
