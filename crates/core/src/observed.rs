//! Caches that show what they are given, for calibration, recording and measurements.

use crate::archive::Archive;
use crate::cache::{KvCache, Restored};
use crate::settings::ModelShape;
use crate::states::States;
use crate::{Footprint, Result};

/// Told of the states of each layer of each step: the layer, the position of the step's first token, the states.
type Look = Box<dyn FnMut(usize, usize, States<'_>) + Send + Sync>;

/// `inner`, with `look` told of every layer's states as they are stored: the layer, the position of the step's first
/// token, and the states. What a fork is given is nobody told of.
pub fn observed(
    inner: Box<dyn KvCache>,
    look: impl FnMut(usize, usize, States<'_>) + Send + Sync + 'static,
) -> Box<dyn KvCache> {
    Box::new(Observed { inner, look: Box::new(look) })
}

/// `inner`, with `look` told of every step when its last layer is stored: the position of the first token, and the
/// states by layer.
pub fn observed_steps(
    inner: Box<dyn KvCache>,
    mut look: impl FnMut(usize, Vec<LayerStates>) + Send + Sync + 'static,
) -> Box<dyn KvCache> {
    let layers = inner.shape().layers;
    let mut step = Vec::with_capacity(layers);
    observed(inner, move |layer, first, states| {
        // A step that went wrong may have left some of its layers.
        step.truncate(layer);
        step.push(LayerStates::from(states));
        if step.len() == layers {
            look(first, std::mem::take(&mut step));
        }
    })
}

/// One layer's states of a step, as [`States`].
#[derive(Debug, Clone, Default)]
pub struct LayerStates {
    /// Queries `(tokens, heads, head_dim)`.
    pub q: Vec<f32>,
    /// Keys `(tokens, kv_heads, head_dim)`.
    pub k: Vec<f32>,
    /// Values `(tokens, kv_heads, head_dim)`.
    pub v: Vec<f32>,
}

impl From<States<'_>> for LayerStates {
    fn from(states: States<'_>) -> Self {
        Self { q: states.q.to_vec(), k: states.k.to_vec(), v: states.v.to_vec() }
    }
}

impl LayerStates {
    /// Borrowed.
    pub fn states(&self) -> States<'_> {
        States::new(&self.q, &self.k, &self.v)
    }
}

struct Observed {
    inner: Box<dyn KvCache>,
    look: Look,
}

impl KvCache for Observed {
    fn shape(&self) -> &ModelShape {
        self.inner.shape()
    }

    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        received: &mut Vec<f32>,
    ) -> Result<()> {
        self.inner.attend_held(layer, states, out, received)
    }

    fn store(&mut self, layer: usize, states: States<'_>, received: &[f32]) -> Result<()> {
        self.inner.store(layer, states, received)?;
        (self.look)(layer, self.inner.len(), states);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.inner.finish_step()
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        self.inner.restored(layer)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.inner.truncate(len)
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        self.inner.archive(archive)
    }

    fn fork(&self) -> Box<dyn KvCache> {
        self.inner.fork()
    }
}
