//! What a decoder is made of: the numbers of a configuration, checked.

mod json;
mod keys;
mod rope;
#[cfg(test)]
mod tests;

use minicache_core::ModelShape;

use crate::families::{EMBEDDING, FINAL_NORM, HEAD, LayerNames, Role};
use crate::rope::RopeConfig;
use crate::{Error, Family, Result};

/// Bounds on a configuration, several times the largest model's: beyond them it is damaged, and what is computed from it
/// before its weights are looked at could not be held.
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 16;
const MOST_WIDTH: usize = 1 << 24;
const MOST_VOCAB: usize = 1 << 28;
const MOST_CONTEXT: usize = 1 << 32;
const MOST_EXPERTS: usize = 1 << 12;

/// A sparse mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts that each token is sent to.
    pub used: usize,
}

/// Everything a decoder has to know besides its weights. Filled from a Hugging Face `config.json` by
/// [`ModelConfig::from_json`], or from GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: &'static Family,
    /// Size of the residual stream.
    pub hidden: usize,
    /// Inner size of the feed-forward block (of one expert).
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of one head; need not be `hidden / heads`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Epsilon of RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Sliding window in tokens.
    pub window: Option<usize>,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Biases in the feed-forward block.
    pub mlp_bias: bool,
    /// RMSNorm of every head of queries and keys before it is rotated, with weights that a layer's heads share.
    pub qk_norm: bool,
    /// Mixture of experts; absent: a dense feed-forward block.
    pub experts: Option<Experts>,
    /// Beginning-of-sequence token.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Checks that the numbers fit together; whoever fills the struct by hand calls it.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab),
            ("max_position_embeddings", self.context),
        ];
        if let Some((key, _)) = sizes.into_iter().find(|(_, n)| *n == 0) {
            return Err(Error::Config(format!("{key} must be at least 1")));
        }
        let most = [
            MOST_WIDTH,
            MOST_WIDTH,
            MOST_LAYERS,
            MOST_HEADS,
            MOST_HEADS,
            MOST_WIDTH,
            MOST_VOCAB,
            MOST_CONTEXT,
        ];
        if let Some(((key, n), most)) = sizes.into_iter().zip(most).find(|((_, n), most)| n > most) {
            return Err(Error::Config(format!("{key} is {n}; more than {most} is no model that can be run")));
        }
        if self.q_dim() > MOST_WIDTH {
            return Err(Error::Config(format!(
                "num_attention_heads {} of head_dim {} are more than {MOST_WIDTH} numbers",
                self.heads, self.head_dim
            )));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(Error::Config(format!("rms_norm_eps {} must be 0 or above", self.rms_eps)));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::Config(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.heads, self.kv_heads
            )));
        }
        if self.window == Some(0) {
            return Err(Error::Config("sliding_window must be at least 1".into()));
        }
        if let Some(e) = self.experts
            && e.count > MOST_EXPERTS
        {
            return Err(Error::Config(format!(
                "num_local_experts is {}; more than {MOST_EXPERTS} is no model that can be run",
                e.count
            )));
        }
        if let Some(e) = self.experts
            && (e.count == 0 || e.used == 0 || e.used > e.count)
        {
            return Err(Error::Config(format!(
                "num_experts_per_tok {} must be between 1 and num_local_experts {}",
                e.used, e.count
            )));
        }
        if self.experts.is_some() && self.mlp_bias {
            return Err(Error::Config("experts with biases are not supported".into()));
        }
        for (what, on, role) in [
            ("experts", self.experts.is_some(), Role::Router),
            ("norms of queries and keys", self.qk_norm, Role::QueryNorm),
        ] {
            if on != self.family.has(role) {
                let (name, verb) = (self.family.name(), if on { "have no" } else { "have" });
                return Err(Error::Config(format!("models of the family {name} {verb} {what}")));
            }
        }
        self.rope.validate(self.head_dim)
    }

    /// What a cache has to know.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: (1.0 / (self.head_dim as f64).sqrt()) as f32,
            ..ModelShape::PLAIN
        }
    }

    /// Numbers of one token's queries: `heads * head_dim`.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of one token's keys (or values): `kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Every tensor that the weights have to hold, by Hugging Face name, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            all.extend(self.layer_tensors(layer));
        }
        all.push((FINAL_NORM.to_owned(), vec![self.hidden]));
        if !self.tied {
            all.push((HEAD.to_owned(), vec![self.vocab, self.hidden]));
        }
        all
    }

    /// A number of tensors that the weights have to hold at the least, found without naming them.
    pub(crate) fn least_tensors(&self) -> usize {
        let experts = self.experts.map_or(0, |e| e.count.saturating_mul(3));
        self.layers.saturating_mul(experts.saturating_add(5))
    }

    /// The tensors of one layer, by Hugging Face name, with their shapes.
    pub fn layer_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        LayerNames::new(self, layer).tensors()
    }

    /// Whether the model computes with tensors of this kind.
    pub(crate) fn has(&self, role: Role) -> bool {
        match role {
            Role::QueryNorm | Role::KeyNorm => self.qk_norm,
            Role::Router | Role::ExpertGate | Role::ExpertUp | Role::ExpertDown => self.experts.is_some(),
            Role::GateUp | Role::Gate | Role::Up | Role::Down => self.experts.is_none(),
            _ => true,
        }
    }

    /// Weights of the model, in numbers.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}
