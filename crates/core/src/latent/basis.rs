//! A calibrated basis: what the transforms of a latent cache are made of.

use std::ops::Range;
use std::sync::{Arc, RwLock};

use crate::store::{Scheme, Side, Store};
use crate::{ModelShape, Precision, Rotary};

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

impl Basis {
    /// Checks that the basis is one of a model of `shape`: every grouping whole, every array of the length that its span
    /// asks for, and numbers that can be computed with.
    ///
    /// # Errors
    /// The first thing that is not so.
    pub fn check(&self, shape: &ModelShape) -> Result<(), String> {
        check_side("keys", &self.keys, shape, |b| b.span, |b| key_lengths(b, shape.head_dim))?;
        check_side("values", &self.values, shape, |b| b.span, |b| value_lengths(b, shape.head_dim))?;
        for basis in self.keys.iter().flat_map(|(_, spans)| spans) {
            if !basis.weights.iter().all(|w| *w > 0.0) {
                return Err(broken("keys", basis.span, "weights that are not above 0"));
            }
            if !basis.variances.chunks(basis.span.members()).all(descends) {
                return Err(broken("keys", basis.span, "variances that do not descend to 0"));
            }
        }
        for basis in self.values.iter().flat_map(|(_, spans)| spans) {
            if !descends(&basis.variances) {
                return Err(broken("values", basis.span, "variances that do not descend to 0"));
            }
        }
        Ok(())
    }
}

/// An array of a basis, and how long it has to be.
type Length<'a> = (&'a [f32], usize);

fn key_lengths(basis: &KeyBasis, head_dim: usize) -> [Length<'_>; 4] {
    let (m, half) = (basis.span.members(), head_dim / 2);
    [
        (&basis.mean, m.saturating_mul(head_dim)),
        (&basis.weights, m.saturating_mul(half)),
        (&basis.vectors, m.saturating_mul(m).saturating_mul(2 * half)),
        (&basis.variances, m.saturating_mul(half)),
    ]
}

fn value_lengths(basis: &ValueBasis, head_dim: usize) -> [Length<'_>; 5] {
    let n = basis.span.members().saturating_mul(head_dim);
    [
        (&basis.mean, n),
        (&basis.weights, n.saturating_mul(head_dim)),
        (&basis.inverse, n.saturating_mul(head_dim)),
        (&basis.vectors, n.saturating_mul(n)),
        (&basis.variances, n),
    ]
}

/// Checks one side: its groupings' spans, and their arrays.
fn check_side<'a, T, const N: usize>(
    side: &str,
    groupings: &'a [(Grouping, Vec<T>)],
    shape: &ModelShape,
    span: impl Fn(&T) -> Span,
    lengths: impl Fn(&'a T) -> [Length<'a>; N],
) -> Result<(), String> {
    for (grouping, bases) in groupings {
        let Grouping { layers, heads } = *grouping;
        if !grouping.spans(shape.layers, shape.kv_heads).eq(bases.iter().map(&span)) {
            return Err(format!(
                "its {side} of {layers} layers and {heads} KV heads are not those of a model of {} layers and {} KV heads",
                shape.layers, shape.kv_heads
            ));
        }
        for basis in bases {
            for (array, wanted) in lengths(basis) {
                if array.len() != wanted {
                    let wrong = format!("an array of {} numbers where {wanted} are needed", array.len());
                    return Err(broken(side, span(basis), &wrong));
                }
                if !array.iter().all(|x| x.is_finite()) {
                    return Err(broken(side, span(basis), "NaN or infinity"));
                }
            }
        }
    }
    Ok(())
}

fn broken(side: &str, span: Span, what: &str) -> String {
    format!("its {side} from layer {}, KV head {} on have {what}", span.first, span.head)
}

fn descends(variances: &[f32]) -> bool {
    variances.is_sorted_by(|a, b| a >= b) && variances.last().is_none_or(|least| *least >= 0.0)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHAPE: ModelShape =
        ModelShape { layers: 3, heads: 2, kv_heads: 2, head_dim: 4, scale: 0.5, ..ModelShape::PLAIN };

    fn basis() -> Basis {
        let grouping = Grouping { layers: 2, heads: 1 };
        let key = |span: Span| {
            let m = span.members();
            KeyBasis {
                span,
                mean: vec![0.0; m * 4],
                weights: vec![1.0; m * 2],
                vectors: vec![0.5; 4 * m * m],
                variances: vec![1.0; m * 2],
            }
        };
        let value = |span: Span| {
            let n = span.members() * 4;
            ValueBasis {
                span,
                mean: vec![0.0; n],
                weights: vec![1.0; n * 4],
                inverse: vec![1.0; n * 4],
                vectors: vec![0.5; n * n],
                variances: vec![1.0; n],
            }
        };
        let spans = || grouping.spans(3, 2);
        Basis {
            keys: vec![(grouping, spans().map(key).collect())],
            values: vec![(grouping, spans().map(value).collect())],
        }
    }

    #[test]
    fn what_does_not_fit_the_model_is_named() {
        assert_eq!(basis().check(&SHAPE), Ok(()));
        type Damage = fn(&mut Basis);
        let cases: [(Damage, &str); 9] = [
            (|b| drop(b.keys[0].1.remove(1)), "its keys of 2 layers and 1 KV heads are not those"),
            (|b| b.values[0].1[0].span.head = 1, "its values of 2 layers and 1 KV heads are not those"),
            (|b| b.values[0].0.layers = usize::MAX, "layers and 1 KV heads are not those"),
            (
                |b| {
                    let _ = b.keys[0].1[0].vectors.pop();
                },
                "have an array of 15 numbers where 16 are needed",
            ),
            (|b| b.values[0].1[2].inverse.push(0.0), "layer 2, KV head 0 on have an array of 17 numbers"),
            (|b| b.values[0].1[0].mean[3] = f32::NAN, "have NaN or infinity"),
            (|b| b.keys[0].1[0].weights[0] = 0.0, "weights that are not above 0"),
            (|b| b.keys[0].1[0].variances[1] = 2.0, "variances that do not descend"),
            (|b| *b.values[0].1[0].variances.last_mut().unwrap() = -1.0, "variances that do not descend"),
        ];
        for (damage, wanted) in cases {
            let mut damaged = basis();
            damage(&mut damaged);
            let message = damaged.check(&SHAPE).unwrap_err();
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
        let other = ModelShape { layers: 4, ..SHAPE };
        assert!(basis().check(&other).is_err());
    }
}
