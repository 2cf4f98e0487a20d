//! One exact prefill for any number of caches.
//!
//! Within a forward step attention reads the exact states of the step's own tokens (see [`KvCache`]), so the prefill
//! of a prompt in one step gives the same states whatever cache it is for. They are computed once, recorded, and
//! handed to every cache as its one prefill step. A prompt that begins with another one goes on from that one's
//! record, and its caches still see the whole prompt as one exact step: sharing changes no result.

use std::ops::Range;
use std::rc::Rc;

use minicache_core::CacheSpec;
use minicache_core::{Footprint, KvCache, ModelShape, Restored, Result};
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;

/// Queries, keys and values of one layer, token-major.
#[derive(Debug, Clone, Default)]
struct States {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// A prompt's tokens with their exact states in every layer, and the logits after the last token.
#[derive(Clone)]
pub(crate) struct Prefill {
    tokens: Vec<u32>,
    planned_len: usize,
    logits: Rc<Vec<f32>>,
    recorder: Rc<Recorder>,
}

impl Prefill {
    /// Runs `tokens` (at least one), going on from `prefix` where they begin with all of its tokens. `planned_len` is
    /// the length that the sequences are going to have (see [`Step::planned_len`]).
    pub(crate) fn new(
        model: &Model,
        tokens: &[u32],
        planned_len: usize,
        prefix: Option<&Prefill>,
    ) -> crate::run::Result<Self> {
        let shared = prefix.filter(|p| p.serves(model, tokens, planned_len));
        let mut recorder = match shared {
            Some(prefix) => prefix.recorder.copy(),
            None => Recorder::new(model)?,
        };
        let fresh = &tokens[shared.map_or(0, |p| p.tokens.len())..];
        let step = Step { tokens: fresh, cache: &mut recorder, planned_len, logits: LogitsFor::Last };
        let logits = model.decoder.forward(&mut [step])?;
        let logits = logits[0].flatten_all()?.to_vec1()?;
        let (tokens, logits, recorder) = (tokens.to_vec(), Rc::new(logits), Rc::new(recorder));
        Ok(Self { tokens, planned_len, logits, recorder })
    }

    /// Its tokens.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether a prompt of `tokens` for sequences of `planned_len` can go on from here: it begins with all of these
    /// tokens and has more, and its rotary embedding is the same.
    pub(crate) fn serves(&self, model: &Model, tokens: &[u32], planned_len: usize) -> bool {
        let begins = self.tokens.len() < tokens.len() && tokens.starts_with(&self.tokens);
        begins && (planned_len == self.planned_len || same_rotation(model, planned_len, self.planned_len))
    }

    /// Logits after the last token, one per word of the vocabulary.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Appends the states of the tokens `range` to `cache` as one step, without attention.
    pub(crate) fn append(&self, cache: &mut dyn KvCache, range: Range<usize>) -> Result<()> {
        append(&self.recorder.layers, cache, range)
    }

    /// Gives every one of the empty `caches`, each of the spec beside it, the whole prompt as its first step. What they
    /// would attend is known already, so only those attend that rank tokens by it.
    pub(crate) fn fill(&self, caches: &mut [Box<dyn KvCache>], specs: &[&CacheSpec]) -> Result<()> {
        let (layers, tokens) = (&self.recorder.layers, self.tokens.len());
        caches.par_iter_mut().zip(specs).try_for_each(|(cache, spec)| {
            if !spec.needs_attention() {
                return append(layers, cache.as_mut(), 0..tokens);
            }
            let mut out = Vec::new();
            for (layer, s) in layers.iter().enumerate() {
                out.resize(s.q.len(), 0.0);
                cache.attend_into(layer, &s.q, &s.k, &s.v, &mut out)?;
            }
            cache.finish_step()
        })
    }
}

/// Appends the states of the tokens `range` in all `layers` to `cache` as one step.
fn append(layers: &[States], cache: &mut dyn KvCache, range: Range<usize>) -> Result<()> {
    let width = cache.shape().kv_dim();
    let numbers = range.start * width..range.end * width;
    for (layer, s) in layers.iter().enumerate() {
        cache.append(layer, &s.k[numbers.clone()], &s.v[numbers.clone()])?;
    }
    cache.finish_step()
}

/// Whether sequences of these two lengths rotate keys alike (LongRoPE and dynamic RoPE choose by length).
fn same_rotation(model: &Model, a: usize, b: usize) -> bool {
    let rotated = |length: usize| {
        let rotary = model.decoder.rotary(length);
        let mut x = vec![1.0; model.decoder.shape().head_dim];
        rotary.rotate(997, &mut x);
        x
    };
    rotated(a) == rotated(b)
}

/// An exact cache that keeps what it is given.
struct Recorder {
    exact: Box<dyn KvCache>,
    layers: Vec<States>,
}

impl Recorder {
    fn new(model: &Model) -> crate::run::Result<Self> {
        let exact = model.new_cache(&CacheSpec::default().with_f32())?;
        let layers = vec![States::default(); exact.shape().layers];
        Ok(Self { exact, layers })
    }

    fn copy(&self) -> Self {
        Self { exact: self.exact.fork(), layers: self.layers.clone() }
    }
}

impl KvCache for Recorder {
    fn shape(&self) -> &ModelShape {
        self.exact.shape()
    }

    fn attend_into(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        self.exact.attend_into(layer, q, k, v, out)?;
        let states = &mut self.layers[layer];
        states.q.extend_from_slice(q);
        states.k.extend_from_slice(k);
        states.v.extend_from_slice(v);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.exact.finish_step()
    }

    fn len(&self) -> usize {
        self.exact.len()
    }

    fn footprint(&self) -> Footprint {
        self.exact.footprint()
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        self.exact.restored(layer)
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.copy())
    }
}
