//! The transforms of a plan as plain matrices, for a backend that has its caches elsewhere.

use std::ops::Range;

use super::coded::{Coded, exact_recent};
use super::plan::{LatentPlan, Plan};
use crate::methods::Latent;
use crate::settings::ModelShape;
use crate::store::{Side, Store, StoreCount};

/// One side of one group of layers.
#[derive(Clone)]
pub struct LatentGroup {
    /// Its layers.
    pub layers: Range<usize>,
    /// What shares latents, by KV head.
    pub sets: Vec<LatentSet>,
    /// How the first tokens of a layer are counted, which are exact.
    pub sinks: StoreCount,
    /// Tokens of a block of these.
    pub sink_tokens: usize,
    /// How the newest tokens of a layer are counted, where they are exact.
    pub recent: StoreCount,
}

/// The KV heads of a group that share latents: n numbers of a token, `(layers, heads, head_dim)`, become `rank`.
#[derive(Clone)]
pub struct LatentSet {
    /// The KV heads.
    pub heads: Range<usize>,
    /// Numbers of a latent.
    pub rank: usize,
    /// What is taken from a state before it is encoded, `(n)`; of keys, before they are rotated.
    pub mean: Vec<f32>,
    /// What encodes, `(n, rank)`.
    pub encode: Vec<f32>,
    /// What restores. Keys: `(layers * heads, head_dim, rank)`, by which queries are mapped. Values:
    /// `(layers * heads, rank, head_dim)`, by which weighed sums are mapped.
    pub restore: Vec<f32>,
    /// An empty store of such latents.
    pub store: Store,
}

impl LatentPlan {
    /// What it was made by.
    pub fn spec(&self) -> &Latent {
        &self.spec
    }

    /// The model's shape.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The groups of one side, by layer.
    pub fn groups(&self, side: Side) -> Vec<LatentGroup> {
        match side {
            Side::Keys => self.keys.iter().map(|plan| self.group(plan, side, |t| t.matrices())).collect(),
            Side::Values => self.values.iter().map(|plan| self.group(plan, side, |t| t.matrices())).collect(),
        }
    }

    fn group<T>(&self, plan: &Plan<T>, side: Side, matrices: impl Fn(&T) -> [Vec<f32>; 3]) -> LatentGroup {
        let coded = Coded::new(plan, side, &self.spec, &self.shape);
        let sets = plan.sets.iter().zip(&coded.latents).map(|(set, store)| {
            let [mean, encode, restore] = matrices(&set.transform);
            LatentSet {
                heads: set.heads.clone(),
                rank: store.dim(),
                mean,
                encode,
                restore,
                store: store.clone(),
            }
        });
        LatentGroup {
            layers: plan.first..plan.first + plan.layers,
            sets: sets.collect(),
            sinks: coded.sinks[0].count(),
            sink_tokens: coded.sinks[0].block_layout().tokens,
            recent: exact_recent(side, &self.spec, &self.shape).count(),
        }
    }

    /// The phases of the latents `range`, counted from the first token that has one: `(range.len(), head_dim)`, cosines,
    /// then sines.
    pub fn phases(&self, range: Range<usize>) -> Vec<f32> {
        let (first, dim) = (self.spec.sinks, self.shape.head_dim);
        self.phases.extend(first + range.end);
        let mut out = vec![0.0; range.len() * dim];
        for (i, row) in range.zip(out.chunks_exact_mut(dim)) {
            self.phases.row(first + i, row);
        }
        out
    }
}
