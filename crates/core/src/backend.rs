//! The seam between a decoder and the place where its caches live.
//!
//! A method describes what a cache holds ([`CacheSpec`], [`crate::BlockLayout`], [`crate::StoreCount`]); a backend lays
//! it out and executes. What is asked of one sequence's cache, wherever it lives, is [`KvCache`]: to fork with copies on
//! write, go back, read back, count. What is asked of several at once is a [`BackendStep`]: to attend, store, merge, pack
//! and drop.

use crate::batch::Batch;
use crate::cache::KvCache;
use crate::methods::{CacheSpec, build};
use crate::resources::Resources;
use crate::sequence::Sequence;
use crate::settings::ModelShape;
use crate::states::States;
use crate::{Error, Result};

/// A place where caches live and attend: the [`Host`], or the devices of `minicache-device`.
///
/// ```
/// use minicache_core::{Backend, BackendStep, CacheSpec, Host, ModelShape, Resources, Sequence, States};
///
/// /// A prompt of as many tokens as `q` has, in every sequence; sequences of any backend.
/// fn prefill<B: Backend>(backend: &B, sequences: &mut [Sequence], layers: &[[Vec<f32>; 3]]) -> minicache_core::Result<()> {
///     let shape = *sequences[0].shape();
///     let tokens = layers[0][1].len() / shape.kv_dim() / sequences.len();
///     let mut step = backend.begin(sequences.iter_mut().map(|s| (s, tokens)).collect())?;
///     let mut out = vec![0.0; layers[0][0].len()];
///     for (layer, [q, k, v]) in layers.iter().enumerate() {
///         step.attend_host(layer, States::new(q, k, v), &mut out)?;
///     }
///     step.finish()
/// }
///
/// let shape = ModelShape { layers: 2, heads: 2, kv_heads: 1, head_dim: 16, scale: 0.25, ..ModelShape::PLAIN };
/// let mut sequences = Vec::new();
/// for name in ["kivi-4", "minicache"] {
///     let cache = Host.cache(&CacheSpec::by_name(name)?, &shape, &Resources::default())?;
///     sequences.push(Sequence::new(cache));
/// }
/// let layer = [vec![0.1; 6 * 32], vec![0.2; 6 * 16], vec![0.3; 6 * 16]];
/// prefill(&Host, &mut sequences, &[layer.clone(), layer])?;
/// assert!(sequences.iter().all(|s| s.len() == 3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Backend {
    /// A step of sequences whose caches it made.
    type Step<'c>: BackendStep
    where
        Self: 'c;

    /// An empty cache that lives here.
    ///
    /// # Errors
    /// A specification that does not fit the shape or that this backend has no operations for, by name; a resource that
    /// the method needs and `resources` lacks; no memory.
    fn cache(&self, spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>>;

    /// Begins a forward step of sequences with the number of their new tokens: makes room for these.
    ///
    /// # Errors
    /// A sequence without tokens, sequences of different shapes or of another backend; no memory. The sequences are as
    /// they were.
    fn begin<'c>(&'c self, sequences: Vec<(&'c mut Sequence, usize)>) -> Result<Self::Step<'c>>;
}

/// The shape of a step's sequences, what every backend begins with.
///
/// # Errors
/// No sequence, a sequence without new tokens, sequences of different shapes.
pub fn shape_of_step(sequences: &[(&mut Sequence, usize)]) -> Result<ModelShape> {
    let none = |what| Error::Shape { what, expected: "at least one".into(), got: "none".into() };
    let (first, _) = sequences.first().ok_or_else(|| none("sequences of a step"))?;
    let shape = *first.shape();
    for (sequence, tokens) in sequences {
        if *tokens == 0 {
            return Err(none("tokens of a step"));
        }
        if *sequence.shape() != shape {
            let (expected, got) = (format!("{shape:?}"), format!("{:?}", sequence.shape()));
            return Err(Error::Shape { what: "sequences of one shape", expected, got });
        }
    }
    Ok(shape)
}

/// A forward step of several sequences, which have any number of new tokens each: begun by a [`Backend`], taken through
/// the layers in order, then finished. Attention reads what the sequences hold and the step's own states. Dropped without
/// [`BackendStep::finish`], as after an error in some layer, it leaves every sequence as it was.
pub trait BackendStep {
    /// Queries, keys and values of all rows of a layer, one sequence after the other, where the backend reads them.
    type States<'s>: Copy;

    /// Where it writes attention: `(rows, heads, head_dim)`.
    type Out<'o>;

    /// Takes a layer's states: causal attention of their queries, then they are stored. Memory of a device that they lie
    /// in stays as it is until the next layer has been taken, whose states may be merged with these.
    ///
    /// # Errors
    /// States that do not fit or are not finite, as far as the backend looks; errors of a device.
    fn attend(&mut self, layer: usize, states: Self::States<'_>, out: Self::Out<'_>) -> Result<()>;

    /// [`BackendStep::attend`] of states in the host's memory, to which attention comes back, wherever the caches live.
    ///
    /// # Errors
    /// As [`BackendStep::attend`].
    fn attend_host(&mut self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()>;

    /// Ends the step: its tokens count as cached; what is complete is merged and packed.
    ///
    /// # Errors
    /// States that cannot be stored, errors of a device.
    fn finish(self) -> Result<()>;
}

/// The host: caches in its memory, attention on its cores.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl Backend for Host {
    type Step<'c> = Batch<'c>;

    fn cache(&self, spec: &CacheSpec, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
        build(spec, shape, resources)
    }

    fn begin<'c>(&'c self, sequences: Vec<(&'c mut Sequence, usize)>) -> Result<Batch<'c>> {
        Batch::begin(sequences)
    }
}

impl BackendStep for Batch<'_> {
    type States<'s> = States<'s>;
    type Out<'o> = &'o mut [f32];

    fn attend(&mut self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()> {
        Batch::attend(self, layer, states, out)
    }

    fn attend_host(&mut self, layer: usize, states: States<'_>, out: &mut [f32]) -> Result<()> {
        Batch::attend(self, layer, states, out)
    }

    fn finish(self) -> Result<()> {
        Batch::finish(self)
    }
}
