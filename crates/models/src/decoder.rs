//! The decoder: tokens to logits, driven by a [`ModelConfig`], for every supported family.
//!
//! A forward pass takes the new tokens of several sequences side by side. Linear layers run over all of them at once;
//! attention runs per sequence, in that sequence's [`KvCache`]. Nothing is padded, so prefill of one sequence and
//! decode of others mix freely.

mod attention;
mod gpu;
mod host;
mod load;
mod logits;

use std::ops::Range;
use std::sync::Arc;

use minicache_core::{CacheSpec, KvCache, ModelShape, Resources, Rotary, Sequence};

use crate::awake::Awake;
use crate::devices::DeviceMap;
use crate::rope::{Frequencies, Rope};
use crate::{Error, ModelConfig, Result};
pub use load::{LoadOptions, Progress};
pub use logits::{Logits, LogitsFor, Score};

use attention::Positions;

/// Shown the residual stream entering each layer.
type Observer<'a> = &'a mut dyn FnMut(usize, &[f32]);

/// One sequence's part of a forward pass.
pub struct Step<'a> {
    /// New tokens, at least one.
    pub tokens: &'a [u32],
    /// The sequence, as [`Decoder::sequence`] made it; the first new token's position is its length.
    pub sequence: &'a mut Sequence,
    /// Of which tokens logits are wanted.
    pub logits: LogitsFor,
}

/// A loaded model.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    shape: ModelShape,
    rope: Rope,
    body: Body,
    map: DeviceMap,
}

/// The weights where they lie.
#[derive(Debug)]
enum Body {
    Host(host::Body),
    Gpu(gpu::Body),
}

impl Decoder {
    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a cache has to know.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Which layers lie on which device.
    pub fn device_map(&self) -> &DeviceMap {
        &self.map
    }

    /// Bytes of all weights, embedding included, in the forms in which they are kept.
    pub fn weight_bytes(&self) -> usize {
        let map = self.map.bytes.iter().sum::<u64>() as usize;
        match &self.body {
            Body::Host(body) => map + body.embedding.bytes(),
            Body::Gpu(_) => map,
        }
    }

    /// Bytes that caches may still take on the GPUs that the layers are on, less a share of them for the work of a step;
    /// `None` of a model on the host.
    ///
    /// # Errors
    /// Of the device.
    pub fn free_memory(&self) -> Result<Option<u64>> {
        match &self.body {
            Body::Host(_) => Ok(None),
            Body::Gpu(body) => body.free_memory().map(Some),
        }
    }

    /// An empty cache of `spec` where attention is computed: on the GPU that the layers are on, if the method has kernels
    /// there, else on the host.
    ///
    /// # Errors
    /// As [`minicache_core::build`]; no memory on the device.
    pub fn cache(&self, spec: &CacheSpec, resources: &Resources) -> Result<Box<dyn KvCache>> {
        if let Body::Gpu(body) = &self.body
            && let Some(cache) = body.cache(spec, &self.shape, resources)?
        {
            return Ok(Box::new(cache));
        }
        Ok(minicache_core::build(spec, &self.shape, resources)?)
    }

    /// A sequence of this model with a cache, which is going to have `planned_len` tokens in the end; 0 where that is not
    /// known. LongRoPE and dynamic RoPE choose frequencies by it.
    pub fn sequence(&self, cache: Box<dyn KvCache>, planned_len: usize) -> Sequence {
        Sequence::rotated(cache, self.rotary(planned_len), planned_len)
    }

    /// The rotary embedding of a sequence that is going to have `planned_len` tokens.
    pub fn rotary(&self, planned_len: usize) -> Arc<Frequencies> {
        self.rope.for_length(planned_len)
    }

    /// Runs the new tokens of several sequences, and gives the logits that their steps ask for.
    ///
    /// # Errors
    /// A step without tokens, a token outside of the vocabulary, a sequence beyond the model's context, a cache of
    /// another model's shape; errors of a cache. All leave every sequence as it was.
    pub fn forward(&self, steps: &mut [Step<'_>]) -> Result<Logits> {
        // Inside the pool, so that the many small products of a step do not each wait to be handed over to it.
        rayon::scope(|_| {
            let _awake = (!self.is_on_gpu()).then(Awake::new);
            self.run(steps, None)
        })
    }

    /// [`Decoder::forward`] that shows `observer` the residual stream entering each layer: its index, and
    /// `(tokens, hidden)`, the tokens of all steps one after the other.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_observed(
        &self,
        steps: &mut [Step<'_>],
        observer: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Logits> {
        self.run(steps, Some(observer))
    }

    /// [`Decoder::forward`] that gives the likeliest tokens in place of logits, `(rows asked for)`: on a GPU nothing else
    /// leaves it.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_greedy(&self, steps: &mut [Step<'_>]) -> Result<Vec<u32>> {
        if let Body::Gpu(body) = &self.body
            && !steps.is_empty()
        {
            self.check(steps)?;
            return gpu::grouped(steps, |steps, order| {
                let (positions, wanted) = self.prepare(steps, order);
                body.forward_greedy(&self.config, steps, &positions, &wanted)
            });
        }
        let logits = self.forward(steps)?;
        let vocab = self.config.vocab;
        let best = |row: &[f32]| {
            let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
            (0..vocab).reduce(better).unwrap_or(0) as u32
        };
        Ok(logits.into_data().chunks_exact(vocab).map(best).collect())
    }

    /// [`Decoder::forward`] that gives, in place of logits, what every token's prediction comes to beside that of another
    /// step: the one at `references[i]` of the step i, which has as many tokens. `targets` are the tokens that follow,
    /// step by step; all steps are taken to ask for logits of all their tokens. Nothing but the scores leaves the GPU;
    /// `None`, and nothing done, of a model on the host.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; references or targets that do not fit the steps.
    pub fn score_on_gpu(
        &self,
        steps: &mut [Step<'_>],
        references: &[usize],
        targets: &[u32],
    ) -> Result<Option<Vec<Score>>> {
        let Body::Gpu(body) = &self.body else { return Ok(None) };
        if steps.is_empty() {
            return Ok(Some(Vec::new()));
        }
        steps.iter_mut().for_each(|step| step.logits = LogitsFor::All);
        self.check(steps)?;
        let mut firsts = vec![0];
        steps.iter().for_each(|step| firsts.push(firsts[firsts.len() - 1] + step.tokens.len()));
        let alike = |(step, &of): (&Step<'_>, &usize)| {
            steps.get(of).is_some_and(|other| other.tokens.len() == step.tokens.len())
        };
        let fits = references.len() == steps.len() && targets.len() == firsts[steps.len()];
        if !fits
            || !steps.iter().zip(references).all(alike)
            || targets.iter().any(|t| *t as usize >= self.config.vocab)
        {
            let message =
                "scores need a step of as many tokens to compare each with, and a target for each token";
            return Err(Error::Input(message.into()));
        }
        let rows = references.iter().flat_map(|&of| firsts[of]..firsts[of + 1]);
        let pairs: Vec<[u32; 2]> = rows.zip(targets).map(|(row, &target)| [row as u32, target]).collect();
        let scores = gpu::grouped(steps, |steps, order| {
            let (positions, wanted) = self.prepare(steps, order);
            body.forward_scored(&self.config, steps, &positions, &wanted, &pairs)
        })?;
        Ok(Some(scores))
    }

    fn run(&self, steps: &mut [Step<'_>], observer: Option<Observer<'_>>) -> Result<Logits> {
        if steps.is_empty() {
            return Ok(Logits::default());
        }
        self.check(steps)?;
        let forward = |steps: &mut [Step<'_>], order: &[usize], observer: Option<Observer<'_>>| {
            let (positions, wanted) = self.prepare(steps, order);
            let data = match &self.body {
                Body::Host(body) => body.forward(&self.config, steps, &positions, &wanted, observer)?,
                Body::Gpu(body) => body.forward(&self.config, steps, &positions, &wanted, observer)?,
            };
            Ok((wanted, data))
        };
        let (rows, data) = match observer {
            None if self.is_on_gpu() => gpu::grouped(steps, |steps, order| forward(steps, order, None))?,
            // An observer is shown tokens in the order of the steps.
            observer => forward(steps, &(0..steps.len()).collect::<Vec<_>>(), observer)?,
        };
        Ok(Logits::new(data, self.config.vocab, rows.iter().map(Range::len)))
    }

    /// Gives `tokens`, at least one, to several empty sequences as the first step of each, and the logits of the last of
    /// them; `None`, and nothing done, of a model on the host. Within a step attention reads the exact states of the step's
    /// own tokens, so that on a GPU they are computed once, whatever the caches do with them. `specs` are what the caches
    /// were made of.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; sequences that are not empty. What an error leaves of the sequences is of no use.
    pub fn fill_on_gpu(
        &self,
        tokens: &[u32],
        specs: &[&CacheSpec],
        sequences: &mut [Sequence],
    ) -> Result<Option<Vec<f32>>> {
        let Body::Gpu(body) = &self.body else { return Ok(None) };
        if let Some(index) = sequences.iter().position(|s| !s.is_empty()) {
            return Err(Error::Input(format!("sequence {index}: a prompt is to be its first step")));
        }
        let Some(first) = sequences.first() else { return Ok(Some(Vec::new())) };
        let (planned_len, rotary) = (first.planned_len(), self.rotary(first.planned_len()));
        // What attends, and is dropped.
        let resources = Resources { rotary: Some(rotary), latent: None };
        let exact = self.cache(&CacheSpec::default(), &resources)?;
        let mut exact = self.sequence(exact, planned_len);
        let step = |sequence| Step { tokens, sequence, logits: LogitsFor::Last };
        self.check(&sequences.iter_mut().map(step).collect::<Vec<_>>())?;
        let mut steps = [Step { tokens, sequence: &mut exact, logits: LogitsFor::Last }];
        let (positions, wanted) = self.prepare(&steps, &[0]);
        body.fill(&self.config, &mut steps, &positions, &wanted, specs, sequences).map(Some)
    }

    /// Whether layers are on GPUs.
    pub fn is_on_gpu(&self) -> bool {
        matches!(self.body, Body::Gpu(_))
    }

    /// Says where the tokens of steps lie and of which of them logits are wanted: the rows of the step `order[i]` come as
    /// the i-th.
    fn prepare(&self, steps: &[Step<'_>], order: &[usize]) -> (Positions, Vec<Range<usize>>) {
        let positions = Positions::new(steps, self.config.rope.rotary_dim);
        let rows = |&at: &usize| steps[at].logits.rows(&positions.ranges()[at]);
        let wanted = order.iter().map(rows).collect();
        (positions, wanted)
    }

    /// Everything that a caller can get wrong, before any cache is touched.
    fn check(&self, steps: &[Step<'_>]) -> Result<()> {
        let vocab = self.config.vocab;
        for (index, step) in steps.iter().enumerate() {
            let bad = |message: String| Err(Error::Input(format!("sequence {index}: {message}")));
            if step.tokens.is_empty() {
                return bad("a step needs at least one token".into());
            }
            if let Some(id) = step.tokens.iter().find(|id| **id as usize >= vocab) {
                return bad(format!("token {id} is outside of the vocabulary of {vocab}"));
            }
            let shape = step.sequence.shape();
            if *shape != self.shape {
                return bad(format!(
                    "the cache is for {}, the model has {}",
                    describe(shape),
                    describe(&self.shape)
                ));
            }
            if step.sequence.rotary().map(Rotary::rotary_dim) != Some(self.config.rope.rotary_dim) {
                return bad(
                    "it has no rotary embedding of this model; `Decoder::sequence` gives it one".into()
                );
            }
            let length = (step.sequence.len() + step.tokens.len()).max(step.sequence.planned_len());
            if length > self.config.context {
                return bad(format!("{length} tokens exceed the model's context of {}", self.config.context));
            }
        }
        Ok(())
    }
}

/// A shape in words.
fn describe(shape: &ModelShape) -> String {
    let window = shape.window.map_or("no window".into(), |w| format!("a window of {w}"));
    format!(
        "{} layers, {} heads, {} KV heads of {}, {window}, scale {}",
        shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.scale
    )
}
