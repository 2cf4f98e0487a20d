//! A calibrated basis: what the transforms of a latent cache are made of.

use std::ops::Range;
use std::sync::{Arc, RwLock};

use crate::store::{Scheme, Side, Store};
use crate::{Precision, Rotary};

/// How many layers and KV heads share a latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grouping {
    /// Consecutive layers.
    pub layers: usize,
    /// Consecutive KV heads.
    pub heads: usize,
}

impl Grouping {
    /// Cuts a model of `layers` and `kv_heads`, by layer, then head; the last spans of each may be smaller.
    pub fn spans(self, layers: usize, kv_heads: usize) -> impl Iterator<Item = Span> {
        let (size, width) = (self.layers.max(1), self.heads.max(1));
        (0..layers).step_by(size).flat_map(move |first| {
            (0..kv_heads).step_by(width).map(move |head| Span {
                first,
                layers: size.min(layers - first),
                head,
                heads: width.min(kv_heads - head),
            })
        })
    }
}

/// The layers and KV heads that share a latent. Its members are in the order (layer, head).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// First layer.
    pub first: usize,
    /// Layers.
    pub layers: usize,
    /// First KV head.
    pub head: usize,
    /// KV heads.
    pub heads: usize,
}

impl Span {
    /// Number of (layer, head) pairs.
    pub fn members(&self) -> usize {
        self.layers * self.heads
    }

    /// Layer, counted from the span's first, and KV head of each member.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Span { layers, head, heads, .. } = *self;
        (0..layers).flat_map(move |layer| (head..head + heads).map(move |head| (layer, head)))
    }

    /// Index of each member among all (layer, head) of the model.
    pub fn indices(&self, kv_heads: usize) -> impl Iterator<Item = usize> + use<> {
        let first = self.first;
        self.places().map(move |(layer, head)| (first + layer) * kv_heads + head)
    }

    /// The member of a layer, counted from the span's first, and a KV head of the model.
    pub(super) fn member(&self, layer: usize, head: usize) -> usize {
        layer * self.heads + head - self.head
    }

    /// The KV heads.
    pub(super) fn head_range(&self) -> Range<usize> {
        self.head..self.head + self.heads
    }
}

/// The values of one span. n = layers * heads * head_dim, in the order (layer, head, channel).
#[derive(Debug, Clone, PartialEq)]
pub struct ValueBasis {
    /// What shares the latent.
    pub span: Span,
    /// Mean state `(n)`.
    pub mean: Vec<f32>,
    /// Symmetric matrix of each (layer, head) by which its values are multiplied before the transform,
    /// `(layers * heads, head_dim, head_dim)`: the root of W_o^T W_o. Minimises the expected error of the attention
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

/// The keys of one span. m = layers * heads, in the order (layer, head); f = head_dim / 2 frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyBasis {
    /// What shares the latent.
    pub span: Span,
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

/// A basis for every grouping that was calibrated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Basis {
    /// Keys, by grouping, then span.
    pub keys: Vec<(Grouping, Vec<KeyBasis>)>,
    /// Values, by grouping, then span.
    pub values: Vec<(Grouping, Vec<ValueBasis>)>,
}

impl Basis {
    /// The key bases of a grouping.
    pub fn key_spans(&self, grouping: Grouping) -> Option<&[KeyBasis]> {
        self.keys.iter().find(|(g, _)| *g == grouping).map(|(_, b)| b.as_slice())
    }

    /// The value bases of a grouping.
    pub fn value_spans(&self, grouping: Grouping) -> Option<&[ValueBasis]> {
        self.values.iter().find(|(g, _)| *g == grouping).map(|(_, b)| b.as_slice())
    }
}

/// The phases (cos w_j p, sin w_j p) of all positions so far, from the first that has a latent, shared by every cache of
/// a model: the row of position p is the rotation of (1, .., 1, 0, .., 0) to p.
pub(crate) struct Phases {
    rotary: Arc<dyn Rotary>,
    head_dim: usize,
    first: usize,
    table: RwLock<Store>,
}

/// Rows are added and laid out this many at a time: as many as attention works on at once.
const ROWS: usize = 256;

impl Phases {
    /// No rows yet; `first` is the position of the first.
    pub(crate) fn new(
        rotary: Arc<dyn Rotary>,
        head_dim: usize,
        first: usize,
        form: (Scheme, Precision),
    ) -> Self {
        let (scheme, precision) = form;
        let table = Store::new(1, head_dim, scheme, Side::Keys).with_blocks(ROWS).with_precision(precision);
        let table = RwLock::new(table);
        Self { rotary, head_dim, first, table }
    }

    /// Makes the rows of all positions below `len` available.
    pub(crate) fn extend(&self, len: usize) {
        let rows = len.saturating_sub(self.first);
        if self.read(Store::len) >= rows {
            return;
        }
        let mut table = self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut row = vec![0.0; self.head_dim];
        for position in table.len()..rows.next_multiple_of(ROWS) {
            row[..self.head_dim / 2].fill(1.0);
            row[self.head_dim / 2..].fill(0.0);
            self.rotary.rotate(self.first + position, &mut row);
            table.push(&row);
        }
    }

    /// Works on the table; row i is that of position `first` + i.
    pub(crate) fn read<R>(&self, work: impl FnOnce(&Store) -> R) -> R {
        work(&self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// The row of a position, which [`Phases::extend`] has made.
    pub(crate) fn row(&self, position: usize, out: &mut [f32]) {
        self.read(|table| table.read(0, position - self.first, out));
    }
}
