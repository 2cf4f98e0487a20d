//! One side (keys or values) of a pair of layers: the shared vectors, the magnitudes and the retained tokens.

use std::ops::Range;
use std::sync::Arc;

use minicache_config::{ModelShape, Retention, StoreType};

use crate::Footprint;
use crate::lane::{Keys, Values};
use crate::magnitudes::Magnitudes;
use crate::merge::Merge;
use crate::resources::Rotary;
use crate::retain::Retainer;
use crate::scratch::with_buffer;
use crate::store::{Scheme, Side, Store};

/// Tokens kept exact, for one lane.
#[derive(Clone)]
struct Retained {
    /// Ascending.
    positions: Arc<Vec<u32>>,
    /// Both layers' states, indexed as `positions`.
    members: [Store; 2],
}

impl Retained {
    /// The indices of the retained tokens whose positions lie in `range`.
    fn within(&self, range: &Range<usize>) -> Range<usize> {
        let at = |p: usize| self.positions.partition_point(|&x| (x as usize) < p);
        at(range.start)..at(range.end)
    }
}

/// How a side is merged and stored.
#[derive(Clone)]
pub(crate) struct SideSettings {
    pub(crate) side: Side,
    pub(crate) merge: Arc<dyn Merge>,
    pub(crate) shared: Scheme,
    pub(crate) retained: Scheme,
    pub(crate) magnitudes: StoreType,
    pub(crate) retention: Option<Retention>,
    /// One vector per KV head instead of one per token.
    pub(crate) per_head: bool,
    /// Keys are merged before RoPE and rotated whenever they are read.
    pub(crate) rotary: Option<Arc<dyn Rotary>>,
}

/// The stored states of one side of a pair.
#[derive(Clone)]
pub(crate) struct PairSide {
    settings: SideSettings,
    kv_heads: usize,
    head_dim: usize,
    shared: Store,
    magnitudes: Option<[Magnitudes; 2]>,
    retainers: Vec<Retainer>,
    retained: Vec<Retained>,
}

/// One step merged but not yet stored: keys and values may first agree on the retained tokens.
pub(crate) struct Proposal {
    tokens: usize,
    shared: Vec<f32>,
    /// `(tokens, lanes)`.
    magnitudes: [Vec<f32>; 2],
    /// `(lanes, tokens)`.
    pub(crate) retained: Vec<bool>,
}

impl PairSide {
    pub(crate) fn new(settings: SideSettings, shape: &ModelShape) -> Self {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let lanes = if settings.per_head { kv_heads } else { 1 };
        let magnitudes = settings.merge.has_magnitudes().then(|| {
            let column = Magnitudes::new(lanes, settings.magnitudes);
            [column.clone(), column]
        });
        let retainers = settings.retention.iter().flat_map(|r| vec![Retainer::new(r); lanes]).collect();
        let store = Store::new(kv_heads / lanes, head_dim, settings.retained, settings.side);
        let retained = Retained { positions: Arc::default(), members: [store.clone(), store] };
        let retained = if settings.retention.is_some() { vec![retained; lanes] } else { Vec::new() };
        let shared = Store::new(kv_heads, head_dim, settings.shared, settings.side);
        Self { settings, kv_heads, head_dim, shared, magnitudes, retainers, retained }
    }

    fn lanes(&self) -> usize {
        if self.settings.per_head { self.kv_heads } else { 1 }
    }

    /// Merges the step's states `a` and `b`, each `(tokens, kv_heads, head_dim)`, and decides which are retained.
    /// Un-rotates keys in place where the side is merged before RoPE.
    pub(crate) fn propose(&mut self, a: &mut [f32], b: &mut [f32]) -> Proposal {
        if let Some(rotary) = &self.settings.rotary {
            let first = self.shared.len();
            for x in [&mut *a, &mut *b] {
                for (i, head) in x.chunks_exact_mut(self.head_dim).enumerate() {
                    rotary.unrotate(first + i / self.kv_heads, head);
                }
            }
        }
        let lanes = self.lanes();
        let width = self.kv_heads * self.head_dim / lanes;
        let tokens = a.len() / (width * lanes);
        let mut shared = vec![0.0; a.len()];
        let mut magnitudes = [vec![0.0; tokens * lanes], vec![0.0; tokens * lanes]];
        let mut distances = vec![0.0; tokens * lanes];
        let mut apart = vec![false; tokens * lanes];
        let vectors = a.chunks_exact(width).zip(b.chunks_exact(width)).zip(shared.chunks_exact_mut(width));
        for (i, ((a, b), e)) in vectors.enumerate() {
            let merged = self.settings.merge.merge(a, b, e);
            magnitudes[0][i] = merged.magnitude_a;
            magnitudes[1][i] = merged.magnitude_b;
            let by_lane = (i % lanes) * tokens + i / lanes;
            distances[by_lane] = merged.distance;
            apart[by_lane] = merged.apart;
        }
        let mut retained = vec![false; tokens * lanes];
        let per_lane = retained.chunks_exact_mut(tokens).zip(distances.chunks_exact(tokens));
        for ((marks, distances), retainer) in per_lane.zip(&mut self.retainers) {
            retainer.step(distances, marks);
        }
        if self.settings.retention.is_some() {
            retained.iter_mut().zip(&apart).for_each(|(r, a)| *r |= a);
        }
        Proposal { tokens, shared, magnitudes, retained }
    }

    /// Stores a step: shared vectors, magnitudes, and the retained tokens of `a` and `b` exactly.
    pub(crate) fn commit(&mut self, mut proposal: Proposal, a: &[f32], b: &[f32]) {
        let lanes = self.lanes();
        let width = self.kv_heads * self.head_dim / lanes;
        let first = self.shared.len();
        for (lane, retained) in self.retained.iter_mut().enumerate() {
            for token in 0..proposal.tokens {
                if !proposal.retained[lane * proposal.tokens + token] {
                    continue;
                }
                let i = token * lanes + lane;
                // A retained token takes no part in the shared store: a zero direction widens no quantisation range
                // and its magnitudes of zero keep it out of the weighted sum of values.
                proposal.shared[i * width..(i + 1) * width].fill(0.0);
                proposal.magnitudes.iter_mut().for_each(|m| m[i] = 0.0);
                Arc::make_mut(&mut retained.positions).push((first + token) as u32);
                for (store, x) in retained.members.iter_mut().zip([a, b]) {
                    store.push(&x[i * width..(i + 1) * width]);
                }
            }
        }
        self.shared.push(&proposal.shared);
        if let Some(columns) = &mut self.magnitudes {
            for (column, m) in columns.iter_mut().zip(&proposal.magnitudes) {
                m.chunks_exact(lanes).for_each(|m| column.push(m));
            }
        }
    }

    /// The side as `member` (0: shallower layer, 1: deeper) of the pair sees it.
    pub(crate) fn member(&self, member: usize) -> Member<'_> {
        Member { side: self, member }
    }

    pub(crate) fn start(&self) -> usize {
        self.shared.start()
    }

    /// Retained positions per lane (one lane, or one per KV head).
    pub(crate) fn retained_positions(&self) -> Vec<Vec<usize>> {
        let list = |r: &Retained| r.positions.iter().map(|&p| p as usize).collect();
        if self.retained.is_empty() {
            vec![Vec::new(); self.lanes()]
        } else {
            self.retained.iter().map(list).collect()
        }
    }

    pub(crate) fn drop_before(&mut self, position: usize) {
        self.shared.drop_before(position);
        let start = self.shared.start();
        self.magnitudes.iter_mut().flatten().for_each(|m| m.drop_before(start));
        for r in &mut self.retained {
            let gone = r.within(&(0..start)).end;
            r.members.iter_mut().for_each(|s| s.drop_before(gone));
        }
    }

    pub(crate) fn footprint(&self) -> Footprint {
        let mut out = Footprint::default();
        let shared = self.shared.bytes();
        out.directions += shared.codes;
        out.scales += shared.scales;
        out.residual += shared.residual;
        out.magnitudes = self.magnitudes.iter().flatten().map(Magnitudes::bytes).sum();
        for r in &self.retained {
            out.retained += r.positions.capacity() * size_of::<u32>();
            for store in &r.members {
                let bytes = store.bytes();
                out.retained += bytes.codes + bytes.residual;
                out.scales += bytes.scales;
            }
        }
        out
    }
}

/// One layer's view of a pair side.
pub(crate) struct Member<'a> {
    side: &'a PairSide,
    member: usize,
}

impl Member<'_> {
    /// Lane of `head`, and its head index within the lane's stores.
    fn lane(&self, head: usize) -> (usize, usize) {
        if self.side.settings.per_head { (head, 0) } else { (0, head) }
    }

    /// The vector at `position` as attention sees it.
    pub(crate) fn read(&self, head: usize, position: usize, out: &mut [f32]) {
        let (lane, inner) = self.lane(head);
        let kept = self.side.retained.get(lane).map_or(0..0, |r| r.within(&(position..position + 1)));
        if kept.is_empty() {
            self.side.shared.read(head, position, out);
            if let Some(columns) = &self.side.magnitudes {
                let m = columns[self.member].get(lane, position);
                out.iter_mut().for_each(|x| *x *= m);
            }
        } else {
            self.side.retained[lane].members[self.member].read(inner, kept.start, out);
        }
        if let Some(rotary) = &self.side.settings.rotary {
            rotary.rotate(position, out);
        }
    }

    /// Scores of keys that have to be rotated first: restored one at a time in a buffer of one vector.
    fn rotated_scores(&self, head: usize, range: Range<usize>, q: &[f32], out: &mut [f32]) {
        let (dim, width) = (self.side.head_dim, range.len());
        with_buffer(dim, |key| {
            for (column, position) in range.enumerate() {
                self.read(head, position, key);
                for (row, q) in q.chunks_exact(dim).enumerate() {
                    out[row * width + column] = q.iter().zip(&*key).map(|(a, b)| a * b).sum();
                }
            }
        });
    }
}

impl Keys for Member<'_> {
    /// <q, x_a> = ||x_a|| <q, e>, and exact scores for retained tokens.
    fn scores(&self, heads: Range<usize>, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]) {
        let head = heads.start;
        if self.side.settings.rotary.is_some() {
            return self.rotated_scores(head, range, q, out);
        }
        let width = range.len();
        let (lane, inner) = self.lane(head);
        self.side.shared.scores(head, range.clone(), q, rows, out);
        if let Some(columns) = &self.side.magnitudes {
            columns[self.member].scale(lane, range.clone(), &mut out[..rows * width]);
        }
        let Some(retained) = self.side.retained.get(lane) else { return };
        let kept = retained.within(&range);
        if kept.is_empty() {
            return;
        }
        with_buffer(rows * kept.len(), |exact| {
            retained.members[self.member].scores(inner, kept.clone(), q, rows, exact);
            for (row, exact) in exact.chunks_exact(kept.len()).enumerate() {
                for (&position, &score) in retained.positions[kept.clone()].iter().zip(exact) {
                    out[row * width + position as usize - range.start] = score;
                }
            }
        });
    }
}

impl Values for Member<'_> {
    /// sum_i p_i x_a,i = sum_i (p_i ||x_a,i||) e_i over merged tokens, plus the retained ones.
    fn accumulate(&self, heads: Range<usize>, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]) {
        let head = heads.start;
        let width = range.len();
        let (lane, inner) = self.lane(head);
        match &self.side.magnitudes {
            Some(columns) => with_buffer(rows * width, |scaled| {
                scaled.copy_from_slice(&p[..rows * width]);
                columns[self.member].scale(lane, range.clone(), scaled);
                self.side.shared.accumulate(head, range.clone(), scaled, rows, out);
            }),
            None => self.side.shared.accumulate(head, range.clone(), p, rows, out),
        }
        let Some(retained) = self.side.retained.get(lane) else { return };
        let kept = retained.within(&range);
        if kept.is_empty() {
            return;
        }
        with_buffer(rows * kept.len(), |exact| {
            for (row, exact) in exact.chunks_exact_mut(kept.len()).enumerate() {
                for (&position, x) in retained.positions[kept.clone()].iter().zip(exact) {
                    *x = p[row * width + position as usize - range.start];
                }
            }
            retained.members[self.member].accumulate(inner, kept.clone(), exact, rows, out);
        });
    }
}
