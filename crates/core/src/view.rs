//! What attention reads of a layer, as data: runs of positions and the stores where their states lie.

use std::ops::Range;

use smallvec::SmallVec;

use crate::attend;
use crate::cache::Restored;
use crate::factored::FactoredRows;
use crate::kept::Kept;
use crate::kernels::{Sums, Weights};
use crate::latent::{LatentKeys, LatentValues};
use crate::magnitudes::Magnitudes;
use crate::resources::Rotary;
use crate::settings::ModelShape;
use crate::states::States;
use crate::store::Store;
use crate::turned::TurnedRows;
use crate::vectors::Vectors;

/// Keys and values of one layer that a cache holds of earlier tokens.
#[derive(Clone)]
pub struct LayerView<'a> {
    /// Keys.
    pub keys: SideView<'a>,
    /// Values, of the same positions or more.
    pub values: SideView<'a>,
}

impl LayerView<'_> {
    /// First position that both sides hold.
    pub(crate) fn start(&self) -> usize {
        self.keys.start().max(self.values.start())
    }

    /// Causal attention of the step's queries over what is held and the step's own states, for
    /// [`crate::KvCache::attend_held`] of `layer`: `len` tokens have been seen before the step.
    ///
    /// # Panics
    /// States whose shapes have not been checked; positions up to `len` that are not held, unless a sliding window
    /// has left them behind.
    pub fn attend(&self, shape: &ModelShape, layer: usize, len: usize, states: States<'_>, out: &mut [f32]) {
        attend::attend(shape, layer, self, len, states, out);
    }

    /// Whether both sides hold these positions.
    pub(crate) fn holds(&self, positions: Range<usize>) -> bool {
        self.keys.holds(positions.clone()) && self.values.holds(positions)
    }

    /// The states at `positions`, for [`crate::KvCache::restored`].
    ///
    /// # Panics
    /// Positions that are not held.
    pub fn restored(&self, shape: &ModelShape, positions: Range<usize>) -> Restored {
        let (heads, dim) = (shape.kv_heads, shape.head_dim);
        let read = |side: &SideView<'_>| {
            let mut out = vec![0.0; positions.len() * heads * dim];
            side.read_all(positions.start, (heads, dim), &mut out);
            out
        };
        Restored { keys: read(&self.keys), values: read(&self.values), positions: positions.collect() }
    }
}

/// Keys and values of one KV head that a cache holds of earlier tokens, which other heads need not hold: of the methods that
/// drop tokens. The segments' "positions" are places, 0 and on; `positions` says which tokens lie there, in any order.
///
/// ```
/// use minicache_core::{HeadView, ModelShape, Scheme, Segment, Side, States, Store};
///
/// let shape = ModelShape { layers: 1, heads: 2, kv_heads: 1, head_dim: 16, scale: 0.25, ..ModelShape::PLAIN };
/// let [mut keys, mut values] = [Side::Keys, Side::Values].map(|side| Store::new(1, 16, Scheme::F16, side));
/// keys.push(&[0.5; 2 * 16]);
/// values.push(&[1.0; 2 * 16]);
/// // Tokens 7 and 3 are left of the nine that have been seen.
/// let place = |store| Segment::new(0..2, store, 0).into();
/// let head = HeadView { keys: place(&keys), values: place(&values), positions: &[7, 3] };
/// let (q, k, v, mut out) = ([0.5; 2 * 16], [0.5; 16], [4.0; 16], [0.0; 2 * 16]);
/// HeadView::attend(&[head], &shape, 0, 9, States::new(&q, &k, &v), &mut out);
/// // Three keys of one score: the mean of the three values.
/// assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-3));
/// ```
#[derive(Clone)]
pub struct HeadView<'a> {
    /// Keys, of stores of one head.
    pub keys: SideView<'a>,
    /// Values, in the same places.
    pub values: SideView<'a>,
    /// The position of the token in each place.
    pub positions: &'a [u32],
}

impl HeadView<'_> {
    /// Causal attention of the step's queries, for [`crate::KvCache::attend_held`] of `layer`, over what each of the KV
    /// heads holds and the step's own states: `len` tokens have been seen before the step. Of a layer with a sliding
    /// window no token is held that the step's first query does not see.
    ///
    /// # Panics
    /// Views of fewer heads or more; states whose shapes have not been checked.
    pub fn attend(
        heads: &[Self],
        shape: &ModelShape,
        layer: usize,
        len: usize,
        states: States<'_>,
        out: &mut [f32],
    ) {
        attend::attend_heads(shape, layer, heads, len, states, out, None);
    }
}

/// One side (keys or values) of a layer: segments that follow each other without gaps.
#[derive(Clone, Default)]
pub struct SideView<'a> {
    segments: SmallVec<[Segment<'a>; 3]>,
}

impl<'a> FromIterator<Segment<'a>> for SideView<'a> {
    fn from_iter<T: IntoIterator<Item = Segment<'a>>>(segments: T) -> Self {
        Self { segments: segments.into_iter().collect() }
    }
}

impl<'a> From<Segment<'a>> for SideView<'a> {
    fn from(segment: Segment<'a>) -> Self {
        std::iter::once(segment).collect()
    }
}

/// A run of positions, and where their states lie.
#[derive(Clone)]
pub struct Segment<'a> {
    positions: Range<usize>,
    /// Index in the stores of the first position.
    first: usize,
    rows: Rows<'a>,
}

#[derive(Clone, Copy)]
enum Rows<'a> {
    Vectors(Vectors<'a>),
    LatentKeys(LatentKeys<'a>),
    LatentValues(LatentValues<'a>),
    Turned(TurnedRows<'a>),
    Factored(FactoredRows<'a>),
}

impl Rows<'_> {
    /// Whether they have these indices.
    fn holds(&self, indices: &Range<usize>) -> bool {
        match self {
            Rows::Vectors(vectors) => {
                indices.start >= vectors.store.start() && indices.end <= vectors.store.len()
            }
            Rows::Turned(rows) => rows.holds(indices),
            Rows::Factored(rows) => rows.holds(indices),
            Rows::LatentKeys(_) | Rows::LatentValues(_) => true,
        }
    }
}

impl<'a> Segment<'a> {
    /// The vectors of `store` from index `first` on, one for each of `positions`.
    pub fn new(positions: Range<usize>, store: &'a Store, first: usize) -> Self {
        let vectors = Vectors { store, magnitudes: None, channels: None, kept: None, rotary: None };
        Self { positions, first, rows: Rows::Vectors(vectors) }
    }

    /// Latents of keys, from index `first` on.
    pub(crate) fn latent_keys(positions: Range<usize>, keys: LatentKeys<'a>, first: usize) -> Self {
        Self { positions, first, rows: Rows::LatentKeys(keys) }
    }

    /// Latents of values, from index `first` on.
    pub(crate) fn latent_values(positions: Range<usize>, values: LatentValues<'a>, first: usize) -> Self {
        Self { positions, first, rows: Rows::LatentValues(values) }
    }

    /// A prompt's states in factors, from index `first` on.
    pub(crate) fn factored(positions: Range<usize>, rows: FactoredRows<'a>, first: usize) -> Self {
        Self { positions, first, rows: Rows::Factored(rows) }
    }

    /// Vectors after a linear map, from index `first` on.
    pub(crate) fn turned(positions: Range<usize>, rows: TurnedRows<'a>, first: usize) -> Self {
        Self { positions, first, rows: Rows::Turned(rows) }
    }

    /// The same rows at positions that are later by `by`.
    pub(crate) fn later(mut self, by: usize) -> Self {
        self.positions = self.positions.start + by..self.positions.end + by;
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Vectors<'a>)) -> Self {
        if let Rows::Vectors(vectors) = &mut self.rows {
            change(vectors);
        }
        self
    }

    /// Each vector times its number in a column (at the index that the store has it), by KV head or for all of them.
    #[must_use]
    pub fn times(self, magnitudes: &'a Magnitudes) -> Self {
        self.with(|vectors| vectors.magnitudes = Some(magnitudes))
    }

    /// Each channel times a factor, `(kv_heads, head_dim)`.
    #[must_use]
    pub fn times_channels(self, factors: &'a [f32]) -> Self {
        self.with(|vectors| vectors.channels = Some(factors))
    }

    /// Some vectors kept apart, which replace those of the store.
    pub(crate) fn but(self, kept: Option<Kept<'a>>) -> Self {
        self.with(|vectors| vectors.kept = kept)
    }

    /// Vectors to be rotated to their positions (but for those of other segments).
    pub(crate) fn rotated(self, rotary: Option<&'a dyn Rotary>) -> Self {
        self.with(|vectors| vectors.rotary = rotary)
    }

    /// The part of `range` that is in this segment.
    fn cut(&self, range: &Range<usize>) -> Range<usize> {
        let from = range.start.max(self.positions.start);
        from..range.end.min(self.positions.end).max(from)
    }

    /// Where these positions are in the store.
    fn indices(&self, positions: &Range<usize>) -> Range<usize> {
        let index = |p: usize| self.first + p - self.positions.start;
        index(positions.start)..index(positions.end)
    }
}

impl SideView<'_> {
    /// Whether these positions are held, by stores that have them.
    pub(crate) fn holds(&self, positions: Range<usize>) -> bool {
        let mut at = positions.start.max(self.start());
        for segment in &self.segments {
            let stored = segment.rows.holds(&segment.indices(&segment.positions));
            if segment.positions.is_empty() {
                continue;
            }
            if !stored || segment.positions.start > at {
                return false;
            }
            at = at.max(segment.positions.end);
        }
        self.start() <= positions.start && at >= positions.end
    }

    /// The segments that a range meets: their rows, the positions of the range in them, and where those are stored.
    fn parts(&self, range: &Range<usize>) -> impl Iterator<Item = (&Rows<'_>, Range<usize>, Range<usize>)> {
        let cut = move |segment: &Segment<'_>| (segment.cut(range), segment.indices(&segment.cut(range)));
        let parts = self.segments.iter().map(move |segment| (segment, cut(segment)));
        parts.filter(|(_, (part, _))| !part.is_empty()).map(|(s, (part, indices))| (&s.rows, part, indices))
    }

    /// First position held.
    pub(crate) fn start(&self) -> usize {
        self.segments.first().map_or(0, |s| s.positions.start)
    }

    /// Numbers of a mapped query: of the query itself, unless latents have parts of their own.
    pub(crate) fn query_dim(&self, head_dim: usize) -> usize {
        match self.mapped() {
            Some(Rows::LatentKeys(keys)) => keys.query_dim(head_dim),
            Some(Rows::Turned(rows)) => rows.row_dim(head_dim),
            _ => head_dim,
        }
    }

    /// Numbers of an accumulated row. The first `head_dim` of them are in the space of values.
    pub(crate) fn sum_dim(&self, head_dim: usize) -> usize {
        match self.mapped() {
            Some(Rows::LatentValues(values)) => values.sum_dim(head_dim),
            Some(Rows::Turned(rows)) => rows.row_dim(head_dim),
            Some(Rows::Factored(rows)) => rows.sum_dim(head_dim),
            _ => head_dim,
        }
    }

    /// KV heads that one call had better serve, because they read the same storage: all of them, or one.
    pub(crate) fn together(&self) -> usize {
        match self.mapped() {
            Some(Rows::LatentKeys(keys)) => keys.together(),
            Some(Rows::LatentValues(values)) => values.together(),
            _ => 1,
        }
    }

    /// Stored positions lie in blocks from this one on.
    pub(crate) fn aligned_from(&self) -> usize {
        let latents = self.segments.iter().find(|s| matches!(s.rows, Rows::LatentKeys(_)));
        latents.map_or(0, |s| s.positions.start - s.first)
    }

    /// What queries or sums are mapped for, if any.
    fn mapped(&self) -> Option<&Rows<'_>> {
        self.segments.iter().map(|s| &s.rows).find(|rows| !matches!(rows, Rows::Vectors(_)))
    }

    /// Maps the queries `q (rows, head_dim)`, rows spread evenly over the KV heads `heads`, once per step, to
    /// `out (rows, query_dim)`.
    pub(crate) fn map_queries(&self, heads: Range<usize>, head_dim: usize, q: &[f32], out: &mut [f32]) {
        match self.mapped() {
            Some(Rows::LatentKeys(keys)) => keys.map_queries(heads, head_dim, q, out),
            Some(Rows::Turned(rows)) => rows.map_queries(head_dim, q, out),
            _ => out.copy_from_slice(q),
        }
    }

    /// Maps accumulated rows `(rows, sum_dim)` of KV head `head`, once per step, to values `out (rows, head_dim)`,
    /// overwritten.
    pub(crate) fn map_sums(&self, head: usize, head_dim: usize, sums: &[f32], rows: usize, out: &mut [f32]) {
        match self.mapped() {
            Some(Rows::LatentValues(values)) => values.map_sums(head, head_dim, sums, rows, out),
            Some(Rows::Turned(turned)) => turned.map_sums(head_dim, sums, rows, out),
            Some(Rows::Factored(factored)) => factored.map_sums(head, head_dim, sums, rows, out),
            _ => out.copy_from_slice(sums),
        }
    }

    /// `out (rows, range.len())`: the scores of mapped queries `q (rows, query_dim)` against the positions `range` of
    /// the KV heads `heads`, the rows spread evenly over them.
    pub(crate) fn scores(
        &self,
        heads: Range<usize>,
        head_dim: usize,
        range: Range<usize>,
        q: &[f32],
        rows: usize,
        out: &mut [f32],
    ) {
        let (width, stride) = (range.len(), self.query_dim(head_dim));
        let per_head = rows / heads.len();
        out.fill(0.0);
        for (rows_of, part, indices) in self.parts(&range) {
            let column = part.start - range.start;
            if let Rows::LatentKeys(keys) = rows_of {
                let q = Weights { w: q, stride, rows };
                let y = Sums { y: &mut out[column..], stride: width };
                keys.scores(heads.clone(), head_dim, indices, q, y);
                continue;
            }
            for (i, head) in heads.clone().enumerate() {
                let q = Weights { w: &q[i * per_head * stride..], stride, rows: per_head };
                let y = Sums { y: &mut out[i * per_head * width + column..], stride: width };
                let indices = indices.clone();
                match rows_of {
                    Rows::Vectors(vectors) => vectors.scores(head, head_dim, &part, indices, q, y),
                    Rows::Turned(turned) => turned.scores(head, head_dim, indices, q, y),
                    Rows::Factored(factored) => factored.scores(head, head_dim, &part, indices, q, y),
                    Rows::LatentKeys(_) | Rows::LatentValues(_) => unreachable!("values have no scores"),
                }
            }
        }
    }

    /// `out (rows, sum_dim) +=` the sum of the positions `range`, weighed by `p (rows, range.len())`; `heads` as in
    /// [`SideView::scores`].
    pub(crate) fn accumulate(
        &self,
        heads: Range<usize>,
        head_dim: usize,
        range: Range<usize>,
        p: &[f32],
        rows: usize,
        out: &mut [f32],
    ) {
        let (width, stride) = (range.len(), self.sum_dim(head_dim));
        let per_head = rows / heads.len();
        for (rows_of, part, indices) in self.parts(&range) {
            let column = part.start - range.start;
            if let Rows::LatentValues(values) = rows_of {
                let p = Weights { w: &p[column..], stride: width, rows };
                let y = Sums { y: &mut *out, stride };
                values.accumulate(heads.clone(), head_dim, indices, p, y);
                continue;
            }
            for (i, head) in heads.clone().enumerate() {
                let first = i * per_head;
                let p = Weights { w: &p[first * width + column..], stride: width, rows: per_head };
                let y = Sums { y: &mut out[first * stride..], stride };
                let indices = indices.clone();
                match rows_of {
                    Rows::Vectors(vectors) => vectors.accumulate(head, head_dim, &part, indices, p, y),
                    Rows::Turned(turned) => turned.accumulate(head, head_dim, indices, p, y),
                    Rows::Factored(factored) => factored.accumulate(head_dim, indices, p, y),
                    Rows::LatentKeys(_) | Rows::LatentValues(_) => unreachable!("keys are not summed"),
                }
            }
        }
    }

    /// The vectors of the positions from `first` on, `(tokens, heads, head_dim)`.
    pub(crate) fn read_all(&self, first: usize, (heads, head_dim): (usize, usize), out: &mut [f32]) {
        for (i, row) in out.chunks_exact_mut(head_dim).enumerate() {
            self.read(i % heads, first + i / heads, row);
        }
    }

    /// The vector at `position` as attention sees it.
    pub(crate) fn read(&self, head: usize, position: usize, out: &mut [f32]) {
        let Some(segment) = self.segments.iter().find(|s| s.positions.contains(&position)) else {
            panic!("position {position} is not held");
        };
        let index = segment.indices(&(position..position + 1)).start;
        match &segment.rows {
            Rows::Vectors(vectors) => vectors.read(head, position, index, out),
            Rows::LatentKeys(keys) => keys.read(head, position, index, out),
            Rows::LatentValues(values) => values.read(head, index, out),
            Rows::Turned(rows) => rows.read(head, index, out),
            Rows::Factored(rows) => rows.read(head, position, index, out),
        }
    }
}
