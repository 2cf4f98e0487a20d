//! xKV (Chang et al. 2025, arXiv 2503.18893): a prompt's keys and values of several layers in one low rank. Layers that
//! lie together have states that point elsewhere, but their singular vectors are alike, so that one set of token
//! coefficients serves them all.
//!
//! At the end of the prompt the states of each group of G layers are put side by side, keys before their rotary
//! embedding: X (tokens, G * kv_heads * head_dim), not centred, and X ~ U_r S_r V_r^T by the truncated singular value
//! decomposition (Eckart and Young: no other product of this rank is nearer). Held are U_r S_r, once for the group, and
//! each layer's columns of V_r^T, which belong to the sequence as well. Tokens after the prompt are exact.
//!
//! As the authors' code has it (`xKV/customized_cache/fake_layer_merge_dynamic_cache.py` in abdelfattah-lab/xKV), but that
//! multiplies the factors at once and holds the states again, where this holds the factors and attends over them; and
//! a group whose factors would take more bytes than its states stays exact here. The paper has its ranks by number, 512
//! for keys and 768 for values of four layers of Llama 3.1 8B, an eighth and three sixteenths of the 4,096 numbers that
//! these have; shares do the same for any model. A prompt is the first step, so it has to come in one.

use super::{Alike, Method, Stored, exact};
use crate::account::Nominal;
use crate::angles::Angles;
use crate::cache::KvCache;
use crate::factored::{FactoredCache, Factoring};
use crate::layered::Plan;
use crate::settings::bounds::{MOST_TOKENS, check_number};
use crate::settings::{Checked, ModelShape, Rank, SettingError, StoreType};
use crate::{Footprint, Resources, Result};

/// The prompt's states of groups of layers in factors of a low rank (xKV).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Xkv {
    /// The storage type.
    pub dtype: StoreType,
    /// Consecutive layers that are factored together; the last group has what is left.
    pub group: usize,
    /// Singular vectors kept of a group's keys: a number, or a share of its numbers per token.
    pub rank_k: Rank,
    /// Those kept of its values.
    pub rank_v: Rank,
}

impl Default for Xkv {
    /// The paper's groups, and its ranks for Llama 3.1 8B as shares.
    fn default() -> Self {
        Self {
            dtype: StoreType::F16,
            group: 4,
            rank_k: Rank::Fraction(0.125),
            rank_v: Rank::Fraction(0.1875),
        }
    }
}

impl Xkv {
    pub(super) const ABOUT: &'static str =
        "the prompt's states of a group of layers by one low-rank SVD, keys before RoPE; later tokens exact (xKV)";

    fn factoring(&self, resources: &Resources) -> Factoring {
        Factoring {
            group: self.group,
            ranks: [self.rank_k, self.rank_v],
            scheme: exact(self.dtype),
            rotary: resources.rotary.clone(),
        }
    }
}

impl Method for Xkv {
    fn validate(&self) -> Checked {
        check_number("group", self.group, 1..=MOST_TOKENS)?;
        for (key, rank) in [("rank_k", self.rank_k), ("rank_v", self.rank_v)] {
            rank.validate(key)?;
            if matches!(rank, Rank::Energy { .. }) {
                let message = "must be a number or a share: energy would make it another one for every prompt";
                return Err(SettingError::new(key, message));
            }
        }
        Ok(())
    }

    fn stored(&self) -> Stored {
        Stored::exact(self.dtype)
    }

    fn dtype(&mut self) -> &mut StoreType {
        &mut self.dtype
    }

    fn plan(&self, _: &ModelShape, _: &Resources) -> Result<Plan> {
        super::no_plan("xkv")
    }

    /// Without a rotary embedding among the resources, keys are taken as those of a model that rotates none.
    fn build(&self, shape: &ModelShape, resources: &Resources) -> Result<Box<dyn KvCache>> {
        Ok(Box::new(FactoredCache::new(shape, self.factoring(resources))))
    }

    /// A group's layers are not alike, nor is the last group the others.
    fn alike(&self) -> Alike {
        Alike::Nothing
    }

    fn footprint(&self, shape: &ModelShape, context: usize) -> Option<Result<Footprint>> {
        let factoring = self.factoring(&Resources::default());
        Some(Ok(FactoredCache::bytes_of(shape, &factoring, context)))
    }

    fn measured_layers(&self, shape: &ModelShape, _: &Resources) -> usize {
        self.group.min(shape.layers)
    }

    /// The rotations of keys, which all sequences read.
    fn shared_bytes(&self, shape: &ModelShape, context: usize) -> Result<usize> {
        Ok(Angles::bytes(context, shape.head_dim))
    }

    fn nominal(&self, shape: &ModelShape, context: usize) -> Option<Nominal> {
        let group = self.group.min(shape.layers);
        let width = group * shape.kv_dim();
        let numbers = self.factoring(&Resources::default()).numbers(shape, context);
        let mut lines = Vec::new();
        let sides = [("keys", self.rank_k), ("values", self.rank_v)];
        for ((name, rank), (held, all)) in sides.into_iter().zip(numbers) {
            let share = held as f64 / all as f64;
            lines.push(match rank.of(width) {
                Some(rank) if held < all => format!(
                    "{name}: rank {rank} of {width} numbers of {group} layers, for {context} tokens: \
                     {share:.3} of the numbers"
                ),
                _ => format!("{name}: exact, factors of {context} tokens would take more"),
            });
        }
        let [keys, values] = numbers.map(|(held, all)| held as f64 / all as f64);
        let bits = 8 * self.dtype.bytes();
        let ratio = 2.0 / (keys + values) * 16.0 / bits as f64;
        let width = if bits == 16 { String::new() } else { format!(" x 16/{bits}") };
        lines.push(format!("2 / ({keys:.3} + {values:.3}){width} = {ratio:.2}x"));
        Some(Nominal { ratio, lines })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{CacheSpec, nominal};

    const LLAMA_8B: ModelShape =
        ModelShape { layers: 32, heads: 32, kv_heads: 8, head_dim: 128, ..ModelShape::PLAIN };

    #[test]
    fn shares_are_the_papers_ranks() {
        let of = |text: &str, context| {
            nominal(&CacheSpec::parse(text).unwrap(), &LLAMA_8B, context).unwrap()
        };
        let numbers = "{ method = \"xkv\", rank_k = 512, rank_v = 768 }";
        assert_eq!(of("xkv", 65_536), of(numbers, 65_536));
        // 2 T n / ((512 + 768) (T + n)), n = 4096.
        let want = 2.0 * 65_536.0 * 4096.0 / (1280.0 * (65_536.0 + 4096.0));
        let got = of("xkv", 65_536);
        assert!((got.ratio - want).abs() < 1e-9, "{got:?}");
        assert_eq!(got.lines.last().unwrap(), "2 / (0.133 + 0.199) = 6.02x");
        // Of 500 tokens 512 singular vectors save nothing.
        assert!((of(numbers, 500).ratio - 1.0).abs() < 1e-9);
        assert!(of(numbers, 500).lines[0].contains("exact"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, key) in [
            ("{ method = \"xkv\", group = 0 }", "group"),
            ("{ method = \"xkv\", rank_k = 0 }", "rank_k"),
            ("{ method = \"xkv\", rank_v = 1.5 }", "rank_v"),
            ("{ method = \"xkv\", rank_v = { energy = 0.9 } }", "rank_v"),
        ] {
            let e = CacheSpec::parse(text).unwrap_err().to_string();
            assert!(e.contains(key), "{text}: {e}");
        }
    }
}
