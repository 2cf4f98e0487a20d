//! A calibrated basis: what the transforms of a latent cache are made of.

use std::sync::{Arc, RwLock};

use crate::Rotary;
use crate::store::{Scheme, Side, Store};

/// The values of one group of layers. n = layers * kv_heads * head_dim, in the order (layer, head, channel).
#[derive(Debug, Clone, PartialEq)]
pub struct ValueBasis {
    /// First layer of the group.
    pub first: usize,
    /// Layers in it.
    pub layers: usize,
    /// Mean state `(n)`.
    pub mean: Vec<f32>,
    /// Symmetric matrix of each (layer, head) by which its values are multiplied before the transform,
    /// `(layers * kv_heads, head_dim, head_dim)`: the root of W_o^T W_o. Minimises the expected error of the attention
    /// block's output rather than of values.
    pub weights: Vec<f32>,
    /// Their inverses.
    pub inverse: Vec<f32>,
    /// Orthonormal columns by descending variance, `(n, n)` row-major: row = number of the weighted states, column =
    /// component.
    pub vectors: Vec<f32>,
    /// Variance of each component `(n)`, descending.
    pub variances: Vec<f32>,
}

/// The keys of one group of layers. m = layers * kv_heads, in the order (layer, head); f = head_dim / 2 frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyBasis {
    /// First layer of the group.
    pub first: usize,
    /// Layers in it.
    pub layers: usize,
    /// Mean of the un-rotated keys `(m, head_dim)`.
    pub mean: Vec<f32>,
    /// Weight of frequency j of (layer, head), by which keys are scaled before the transform: the root of the mean
    /// squared query it meets, `(m, f)`. Minimises the expected error of scores rather than of keys.
    pub weights: Vec<f32>,
    /// Unitary columns by descending variance, per frequency, `(f, m, m, 2)`: frequency, original, component, re/im.
    pub vectors: Vec<f32>,
    /// Variance |z|^2 of each complex component `(f, m)`, descending within a frequency.
    pub variances: Vec<f32>,
}

/// A basis for every group size that was calibrated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Basis {
    /// Keys, by group size, then group.
    pub keys: Vec<(usize, Vec<KeyBasis>)>,
    /// Values, by group size, then group.
    pub values: Vec<(usize, Vec<ValueBasis>)>,
}

impl Basis {
    /// The key bases of group size `group`.
    pub fn key_groups(&self, group: usize) -> Option<&[KeyBasis]> {
        self.keys.iter().find(|(g, _)| *g == group).map(|(_, b)| b.as_slice())
    }

    /// The value bases of group size `group`.
    pub fn value_groups(&self, group: usize) -> Option<&[ValueBasis]> {
        self.values.iter().find(|(g, _)| *g == group).map(|(_, b)| b.as_slice())
    }
}

/// The phases (cos w_j p, sin w_j p) of all positions so far, shared by every cache of a model: row p is the rotation
/// of (1, .., 1, 0, .., 0) to position p.
pub(crate) struct Phases {
    rotary: Arc<dyn Rotary>,
    head_dim: usize,
    table: RwLock<Store>,
}

impl Phases {
    pub(crate) fn new(rotary: Arc<dyn Rotary>, head_dim: usize) -> Self {
        let table = RwLock::new(Store::new(1, head_dim, Scheme::F32, Side::Keys));
        Self { rotary, head_dim, table }
    }

    /// Makes the rows of all positions below `len` available.
    pub(crate) fn extend(&self, len: usize) {
        if self.read(Store::len) >= len {
            return;
        }
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut row = vec![0.0; self.head_dim];
        for position in table.len()..len.next_multiple_of(64) {
            row[..self.head_dim / 2].fill(1.0);
            row[self.head_dim / 2..].fill(0.0);
            self.rotary.rotate(position, &mut row);
            table.push(&row);
        }
    }

    pub(crate) fn read<R>(&self, work: impl FnOnce(&Store) -> R) -> R {
        work(&self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    pub(crate) fn rotary(&self) -> &dyn Rotary {
        &*self.rotary
    }
}
