//! One exact prefill for any number of caches.
//!
//! Within a forward step attention reads the exact states of the step's own tokens (see [`KvCache`]), so the prefill
//! of a prompt in one step gives the same states whatever cache it is for. They are computed once, recorded, and
//! handed to every cache as its one prefill step. A prompt that begins with another one goes on from that one's
//! record, and its caches still see the whole prompt as one exact step: sharing changes no result.

use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use minicache_core::{CacheSpec, KvCache, LayerStates, Result, Sequence, observed_steps};
use minicache_models::{LogitsFor, Model, Step};
use rayon::prelude::*;

/// A prompt's tokens with their exact states in every layer, and the logits after the last token.
#[derive(Clone)]
pub(crate) struct Prefill {
    tokens: Vec<u32>,
    logits: Rc<Vec<f32>>,
    /// An exact cache of them, for prompts that go on from here.
    exact: Rc<Sequence>,
    layers: Rc<Vec<LayerStates>>,
}

impl Prefill {
    /// Runs `tokens` (at least one), going on from `prefix` where they begin with all of its tokens. `planned_len` is
    /// the length that the sequences are going to have.
    pub(crate) fn new(
        model: &Model,
        tokens: &[u32],
        planned_len: usize,
        prefix: Option<&Prefill>,
    ) -> crate::run::Result<Self> {
        let shared = prefix.filter(|p| p.serves(model, tokens, planned_len));
        let spec = CacheSpec::default().with_f32();
        let exact = match shared {
            Some(prefix) => prefix.exact.fork(),
            None => model.sequence(&spec, planned_len)?,
        };
        let fresh = &tokens[shared.map_or(0, |p| p.tokens.len())..];
        let mut layers = shared.map_or_else(Vec::new, |p| p.layers.to_vec());
        let (exact, logits, new) = record(model, exact, fresh)?;
        if layers.is_empty() {
            layers = new;
        } else {
            for (all, new) in layers.iter_mut().zip(new) {
                all.q.extend(new.q);
                all.k.extend(new.k);
                all.v.extend(new.v);
            }
        }
        let (logits, exact, layers) = (Rc::new(logits), Rc::new(exact), Rc::new(layers));
        Ok(Self { tokens: tokens.to_vec(), logits, exact, layers })
    }

    /// Its tokens.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether a prompt of `tokens` for sequences of `planned_len` can go on from here: it begins with all of these
    /// tokens and has more, and its rotary embedding is the same.
    pub(crate) fn serves(&self, model: &Model, tokens: &[u32], planned_len: usize) -> bool {
        let begins = self.tokens.len() < tokens.len() && tokens.starts_with(&self.tokens);
        begins && *model.decoder.rotary(planned_len) == *model.decoder.rotary(self.exact.planned_len())
    }

    /// Logits after the last token, one per word of the vocabulary.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Appends the states of the tokens `range` to `cache` as one step, without attention.
    pub(crate) fn append(&self, cache: &mut dyn KvCache, range: Range<usize>) -> Result<()> {
        append(&self.layers, cache, range)
    }

    /// Gives every one of the empty `sequences`, each with a cache of the spec beside it, the whole prompt as its first
    /// step. What they would attend is known already, so only those attend that rank tokens by it.
    pub(crate) fn fill(&self, sequences: &mut [Sequence], specs: &[&CacheSpec]) -> Result<()> {
        let (layers, tokens) = (&*self.layers, self.tokens.len());
        sequences.par_iter_mut().zip(specs).try_for_each(|(sequence, spec)| {
            let cache = sequence.cache_mut();
            if !spec.needs_attention() {
                return append(layers, cache, 0..tokens);
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

/// Gives every one of the empty `sequences`, each with a cache of the spec beside it, `tokens` as its first step.
/// `planned_len` is the length that they are going to have.
pub(crate) fn fill_all(
    model: &Model,
    tokens: &[u32],
    planned_len: usize,
    sequences: &mut [Sequence],
    specs: &[&CacheSpec],
) -> crate::run::Result<()> {
    if model.decoder.fill_on_gpu(tokens, specs, sequences)?.is_none() {
        Prefill::new(model, tokens, planned_len, None)?.fill(sequences, specs)?;
    }
    Ok(())
}

/// Appends the states of the tokens `range` in all `layers` to `cache` as one step.
fn append(layers: &[LayerStates], cache: &mut dyn KvCache, range: Range<usize>) -> Result<()> {
    let width = cache.shape().kv_dim();
    let numbers = range.start * width..range.end * width;
    for (layer, s) in layers.iter().enumerate() {
        cache.append(layer, &s.k[numbers.clone()], &s.v[numbers.clone()])?;
    }
    cache.finish_step()
}

/// Runs `tokens` in an exact sequence: the sequence, the logits after the last token, and the states by layer.
fn record(
    model: &Model,
    exact: Sequence,
    tokens: &[u32],
) -> crate::run::Result<(Sequence, Vec<f32>, Vec<LayerStates>)> {
    let kept: Arc<Mutex<Vec<LayerStates>>> = Arc::default();
    let keep = kept.clone();
    let mut exact = exact.wrapped(|cache| {
        observed_steps(cache, move |_, layers| {
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = layers;
        })
    });
    let step = Step { tokens, sequence: &mut exact, logits: LogitsFor::Last };
    let logits = model.decoder.forward(&mut [step])?.into_data();
    let layers = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((exact, logits, layers))
}
