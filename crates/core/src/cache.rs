//! The seam between decoder and cache.

#[cfg(feature = "candle")]
use candle_core::{Device, Tensor};

use crate::archive::Archive;
use crate::settings::ModelShape;
use crate::states::{States, check_truncate};
use crate::{Footprint, Result};

/// One sequence's KV cache.
///
/// A forward step takes the new tokens through the layers in order: in each, attention reads what the cache holds of
/// earlier tokens ([`KvCache::attend_held`]) beside the exact states of the step's own, which are then stored
/// ([`KvCache::store`]); [`KvCache::finish_step`] ends it. [`KvCache::attend_into`] is the first two at once, and a
/// [`crate::Batch`] is the steps of several sequences.
///
/// Whoever writes a cache of their own stores states as they like, describes by a [`crate::LayerView`] how they lie,
/// and leaves attention to [`crate::LayerView::attend`].
pub trait KvCache: Send + Sync {
    /// The model's shape.
    fn shape(&self) -> &ModelShape;

    /// Writes causal attention of the step's queries over held and new tokens to `out`, of the shape of `states.q`.
    /// Query head h reads KV head `h / (heads / kv_heads)`. `received` takes what [`KvCache::store`] needs to know of
    /// it, of a method that ranks tokens by the attention they receive; others leave it as it is.
    ///
    /// # Errors
    /// What the cache cannot read. Shapes and numbers have been checked.
    fn attend_held(
        &self,
        layer: usize,
        states: States<'_>,
        out: &mut [f32],
        received: &mut Vec<f32>,
    ) -> Result<()>;

    /// Stores the step's states of `layer`; `received` is what [`KvCache::attend_held`] left of them, or nothing for
    /// states that were computed elsewhere.
    ///
    /// # Errors
    /// What the cache cannot store. Shapes and numbers have been checked.
    fn store(&mut self, layer: usize, states: States<'_>, received: &[f32]) -> Result<()>;

    /// Ends a forward step: tokens of the step now count as cached; what is complete is merged and packed.
    ///
    /// # Errors
    /// States that cannot be stored.
    fn finish_step(&mut self) -> Result<()>;

    /// Tokens seen so far, those that a window or an eviction policy dropped included: the next token's position.
    fn len(&self) -> usize;

    /// Whether no token has been seen.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes really held, by part.
    fn footprint(&self) -> Footprint;

    /// Keys and values of `layer` as attention sees them: positions held, and for each `(tokens, kv_heads, head_dim)`.
    ///
    /// # Errors
    /// A layer that the model does not have.
    fn restored(&self, layer: usize) -> Result<Restored>;

    /// Forgets the tokens from `len` on, as for another continuation or tokens that were drafted and not accepted: what
    /// follows is what it were if they had never been there, to the last bit where `len` is between two steps. (Latents of
    /// a step's tokens are products that are rounded by how many there are.) Not within a step.
    ///
    /// # Errors
    /// [`crate::Error::Truncate`] where something has been made of these tokens that cannot be undone (codes of a window
    /// that has moved on, tokens that were dropped), and a length beyond the cache's own. The cache is then as it was.
    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.len(), len, || Err("it keeps no more than it needs to go on"))
    }

    /// An independent copy that shares storage until either side writes (a shared prefix, several continuations).
    fn fork(&self) -> Box<dyn KvCache>;

    /// Writes what it holds to a file, or reads it, see [`crate::archive`].
    ///
    /// # Errors
    /// A cache that cannot be saved, a damaged file, what the file says.
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        let _ = archive;
        Err(crate::Error::Archive("is of a method that does not save".into()))
    }

    /// The cache as what it is, for a decoder that has caches of its own kind, whose states do not pass through here.
    fn as_any_mut(&mut self) -> Option<&mut dyn std::any::Any> {
        None
    }

    /// [`KvCache::attend_held`], then [`KvCache::store`]: `q (tokens, heads, head_dim)`, `k` and `v`
    /// `(tokens, kv_heads, head_dim)` in, attention `(tokens, heads, head_dim)` out.
    ///
    /// # Errors
    /// Slices of the wrong length; states that are not finite, with layer and position.
    fn attend_into(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        let states = States::new(q, k, v);
        states.check(self.shape(), layer, self.len(), out)?;
        let mut received = Vec::new();
        self.attend_held(layer, states, out, &mut received)?;
        self.store(layer, states, &received)
    }

    /// Stores `k` and `v` as [`KvCache::attend_into`] does, without attending: for states that were computed
    /// elsewhere. A method that ranks tokens by the attention they receive counts none for these.
    ///
    /// # Errors
    /// As [`KvCache::attend_into`].
    fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let states = States::new(&[], k, v);
        states.check_stored(self.shape(), layer, self.len())?;
        self.store(layer, states, &[])
    }

    /// [`KvCache::attend_into`] on candle tensors: `q` `(heads, tokens, head_dim)`, `k` and `v`
    /// `(kv_heads, tokens, head_dim)`; gives `(heads, tokens, head_dim)` on the device and in the dtype of `q`.
    ///
    /// # Errors
    /// As [`KvCache::attend_into`], and errors of candle.
    #[cfg(feature = "candle")]
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (heads, tokens, dim) = q.dims3()?;
        let shape = *self.shape();
        let wanted = (shape.kv_heads, tokens, shape.head_dim);
        for (what, t) in [("keys", k), ("values", v)] {
            if t.dims3()? != wanted {
                return Err(crate::Error::Shape {
                    what,
                    expected: format!("{wanted:?}"),
                    got: format!("{:?}", t.dims()),
                });
            }
        }
        let rows = |t: &Tensor| -> Result<Vec<f32>> {
            let t = t.transpose(0, 1)?.to_dtype(candle_core::DType::F32)?.flatten_all()?;
            Ok(t.to_vec1::<f32>()?)
        };
        let mut out = vec![0.0; heads * tokens * dim];
        self.attend_into(layer, &rows(q)?, &rows(k)?, &rows(v)?, &mut out)?;
        let out = Tensor::from_vec(out, (tokens, heads, dim), &Device::Cpu)?.transpose(0, 1)?.contiguous()?;
        Ok(out.to_dtype(q.dtype())?.to_device(q.device())?)
    }
}

/// One layer's states as attention sees them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Restored {
    /// Positions held, ascending (per layer; all KV heads alike unless the method evicts per head).
    pub positions: Vec<usize>,
    /// `(tokens, kv_heads, head_dim)`.
    pub keys: Vec<f32>,
    /// `(tokens, kv_heads, head_dim)`.
    pub values: Vec<f32>,
}
