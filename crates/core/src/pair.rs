//! One side (keys or values) of a pair of layers: the shared vectors, the magnitudes and the retained tokens.

use std::sync::Arc;

use crate::settings::{ModelShape, Retention, StoreType};

use crate::archive::{Archive, damaged};
use crate::kept::{Kept, Retained};
use crate::kernels::LANES;
use crate::magnitudes::Magnitudes;
use crate::merge::Merge;
use crate::resources::Rotary;
use crate::retain::Retainer;
use crate::scratch::with_buffer;
use crate::store::{Scheme, Side, Store};
use crate::view::{Segment, SideView};
use crate::{Footprint, Precision, Result};

/// Why a pair cannot go back.
pub const DECIDED: &str = "which tokens are retained has been decided by newer ones too";

/// The newest tokens, which are not merged yet.
#[derive(Clone)]
struct Newest {
    /// How many tokens stay here.
    window: usize,
    /// Position of the stores' first index.
    base: usize,
    /// Both layers' states.
    members: [Store; 2],
}

/// How a side is merged and stored.
#[derive(Clone)]
pub(crate) struct SideSettings {
    pub(crate) side: Side,
    /// Newest tokens of both layers that are not merged yet; 0: all are.
    pub(crate) residual: usize,
    /// First tokens, retained whatever their distances; they take no part in the rule.
    pub(crate) sinks: usize,
    /// The type of those, and of the shared vectors that wait to be quantised.
    pub(crate) exact: StoreType,
    pub(crate) merge: Arc<dyn Merge>,
    pub(crate) shared: Scheme,
    pub(crate) retained: Scheme,
    pub(crate) magnitudes: StoreType,
    pub(crate) precision: Precision,
    pub(crate) retention: Option<Retention>,
    /// One vector per KV head instead of one per token.
    pub(crate) per_head: bool,
    /// Keys are merged before RoPE and rotated whenever they are read.
    pub(crate) rotary: Option<Arc<dyn Rotary>>,
}

impl SideSettings {
    /// Whether any token may be kept exact.
    fn retains(&self) -> bool {
        self.retention.is_some() || self.sinks > 0
    }
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
    newest: Option<Newest>,
}

/// One step merged but not yet stored: keys and values may first agree on the retained tokens. Reused from step to
/// step, so that decoding allocates nothing for it.
#[derive(Default)]
pub(crate) struct Proposal {
    tokens: usize,
    shared: Vec<f32>,
    /// `(tokens, lanes)`.
    magnitudes: [Vec<f32>; 2],
    /// `(lanes, tokens)`, as are the next two.
    distances: Vec<f32>,
    apart: Vec<bool>,
    pub(crate) retained: Vec<bool>,
}

impl Proposal {
    /// Sized for a step of `tokens` tokens of `width` numbers, nothing retained.
    fn reset(&mut self, tokens: usize, width: usize, lanes: usize) {
        self.tokens = tokens;
        fresh(&mut self.shared, tokens * width);
        self.magnitudes.iter_mut().for_each(|m| fresh(m, tokens * lanes));
        fresh(&mut self.distances, tokens * lanes);
        fresh(&mut self.apart, tokens * lanes);
        fresh(&mut self.retained, tokens * lanes);
    }

    /// Gives back what a step of many tokens needed beyond one of a single token of `width` numbers.
    pub(crate) fn shrink(&mut self, width: usize) {
        self.reset(0, width, 0);
        self.shared.shrink_to(width);
        self.magnitudes.iter_mut().for_each(|m| m.shrink_to(width));
        self.distances.shrink_to(width);
        self.apart.shrink_to(width);
        self.retained.shrink_to(width);
    }
}

/// `buffer` with `len` default values.
fn fresh<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    buffer.clear();
    buffer.resize(len, T::default());
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
        let precision = settings.precision;
        let store = Store::new(kv_heads / lanes, head_dim, settings.retained, settings.side);
        let store = store.with_precision(precision).with_waiting(settings.exact).with_blocks(LANES);
        let retained = Retained { positions: Arc::default(), dropped: 0, members: [store.clone(), store] };
        let retained = if settings.retains() { vec![retained; lanes] } else { Vec::new() };
        let shared = Store::new(kv_heads, head_dim, settings.shared, settings.side)
            .with_precision(precision)
            .with_waiting(settings.exact);
        let newest = (settings.residual > 0).then(|| {
            let exact = crate::methods::exact(settings.exact);
            let store = Store::new(kv_heads, head_dim, exact, settings.side).with_blocks(LANES);
            Newest { window: settings.residual, base: 0, members: [store.clone(), store] }
        });
        Self { settings, kv_heads, head_dim, shared, magnitudes, retainers, retained, newest }
    }

    /// Takes the step's states `a` and `b` into the window of the newest tokens, and leaves in them the states of the
    /// tokens that leave it. Without a window these are the step's own.
    pub(crate) fn slide(&mut self, a: &mut Vec<f32>, b: &mut Vec<f32>) {
        let Some(newest) = &mut self.newest else { return };
        let (merged, dim, width) = (self.shared.len(), self.head_dim, self.kv_heads * self.head_dim);
        let held = newest.base + newest.members[0].len() - merged;
        let leaving = (held + a.len() / width).saturating_sub(newest.window);
        // Those held leave first; where more leave, the first of the step never enter.
        let old = leaving.min(held);
        let through = (leaving - old) * width;
        let first = merged - newest.base;
        for (store, x) in newest.members.iter_mut().zip([&mut *a, &mut *b]) {
            with_buffer(old * width, |buffer| {
                for (i, out) in buffer.chunks_exact_mut(dim).enumerate() {
                    store.read(i % self.kv_heads, first + i / self.kv_heads, out);
                }
                if through > 0 {
                    *store = store.empty();
                }
                store.push(&x[through..]);
                x.truncate(through);
                x.splice(0..0, buffer.iter().copied());
            });
        }
        if through > 0 {
            newest.base = merged + leaving;
        }
        newest.members.iter_mut().for_each(|s| s.drop_before(merged + leaving - newest.base));
    }

    fn lanes(&self) -> usize {
        if self.settings.per_head { self.kv_heads } else { 1 }
    }

    /// Merges the step's states `a` and `b`, each `(tokens, kv_heads, head_dim)`, and decides which are retained.
    /// Un-rotates keys in place where the side is merged before RoPE.
    pub(crate) fn propose(&mut self, a: &mut [f32], b: &mut [f32], out: &mut Proposal) {
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
        out.reset(tokens, width * lanes, lanes);
        if tokens == 0 {
            return;
        }
        let Proposal { shared, magnitudes, distances, apart, retained, .. } = out;
        let vectors = a.chunks_exact(width).zip(b.chunks_exact(width)).zip(shared.chunks_exact_mut(width));
        for (i, ((a, b), e)) in vectors.enumerate() {
            let merged = self.settings.merge.merge(a, b, e);
            magnitudes[0][i] = merged.magnitude_a;
            magnitudes[1][i] = merged.magnitude_b;
            let by_lane = (i % lanes) * tokens + i / lanes;
            distances[by_lane] = merged.distance;
            apart[by_lane] = merged.apart;
        }
        let sinks = self.settings.sinks.saturating_sub(self.shared.len()).min(tokens);
        let per_lane = retained.chunks_exact_mut(tokens).zip(distances.chunks_exact(tokens));
        for ((marks, distances), retainer) in per_lane.zip(&mut self.retainers) {
            retainer.step(&distances[sinks..], &mut marks[sinks..]);
        }
        retained.chunks_exact_mut(tokens).for_each(|marks| marks[..sinks].fill(true));
        if self.settings.retains() {
            retained.iter_mut().zip(&*apart).for_each(|(r, a)| *r |= a);
        }
    }

    /// Stores a step: shared vectors, magnitudes, and the retained tokens of `a` and `b` exactly.
    pub(crate) fn commit(&mut self, proposal: &mut Proposal, a: &[f32], b: &[f32]) {
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

    /// The side as `member` (0: shallower layer, 1: deeper) of the pair sees it, of a sequence of `len` tokens.
    pub(crate) fn view(&self, member: usize, len: usize) -> SideView<'_> {
        let (start, merged) = (self.shared.start(), self.shared.len());
        let kept = (!self.retained.is_empty()).then_some(Kept { lanes: &self.retained, member });
        let mut shared = Segment::new(start..merged, &self.shared, start)
            .but(kept)
            .rotated(self.settings.rotary.as_deref());
        if let Some(columns) = &self.magnitudes {
            shared = shared.times(&columns[member]);
        }
        let newest = self.newest.as_ref().filter(|_| merged < len);
        let newest = newest.map(|n| Segment::new(merged..len, &n.members[member], merged - n.base));
        std::iter::once(shared).chain(newest).collect()
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

    /// Whether it can be as if it had never had more than the first `len` tokens.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        if let Some(newest) = &self.newest
            && self.shared.len() > len.saturating_sub(newest.window)
        {
            return Err("newer tokens have been merged already");
        }
        let merged = len.min(self.shared.len());
        self.shared.can_truncate(merged)?;
        let taking_part = merged.saturating_sub(self.settings.sinks);
        if !self.retainers.iter().all(|r| r.can_truncate(taking_part)) {
            return Err(DECIDED);
        }
        for r in &self.retained {
            let kept = r.within(&(0..merged)).end;
            r.members.iter().try_for_each(|store| store.can_truncate(kept))?;
        }
        Ok(())
    }

    /// Forgets the tokens from `len` on; [`PairSide::can_truncate`] has said that it can.
    pub(crate) fn truncate(&mut self, len: usize) {
        let merged = len.min(self.shared.len());
        self.shared.truncate(merged);
        self.magnitudes.iter_mut().flatten().for_each(|m| m.truncate(merged));
        let taking_part = merged.saturating_sub(self.settings.sinks);
        self.retainers.iter_mut().for_each(|r| r.truncate(taking_part));
        for r in &mut self.retained {
            let kept = r.within(&(0..merged)).end;
            r.members.iter_mut().for_each(|store| store.truncate(kept));
            if kept < r.dropped + r.positions.len() {
                Arc::make_mut(&mut r.positions).truncate(kept.saturating_sub(r.dropped));
            }
        }
        if let Some(newest) = &mut self.newest {
            newest.members.iter_mut().for_each(|store| store.truncate(len.saturating_sub(newest.base)));
        }
    }

    /// Writes or reads what it holds, of a sequence of `len` tokens.
    pub(crate) fn archive(&mut self, archive: &mut Archive<'_>, len: usize) -> Result<()> {
        self.shared.archive(archive)?;
        let merged = self.shared.len();
        for column in self.magnitudes.iter_mut().flatten() {
            column.archive(archive)?;
            damaged(column.len() == merged)?;
        }
        self.retainers.iter_mut().try_for_each(|r| r.archive(archive))?;
        for r in &mut self.retained {
            archive.numbers(Arc::make_mut(&mut r.positions))?;
            archive.count(&mut r.dropped)?;
            let ascending = r.positions.windows(2).all(|two| two[0] < two[1]);
            damaged(ascending && r.positions.last().is_none_or(|&p| (p as usize) < merged))?;
            let ever = r.dropped.checked_add(r.positions.len());
            for store in &mut r.members {
                store.archive(archive)?;
                damaged(Some(store.len()) == ever && store.start() <= r.dropped)?;
            }
        }
        let Some(newest) = &mut self.newest else { return damaged(merged == len) };
        archive.count(&mut newest.base)?;
        for store in &mut newest.members {
            store.archive(archive)?;
            let held = newest.base.checked_add(store.len());
            damaged(held == Some(len) && newest.base.saturating_add(store.start()) <= merged)?;
        }
        Ok(())
    }

    pub(crate) fn drop_before(&mut self, position: usize) {
        self.shared.drop_before(position);
        let start = self.shared.start();
        self.magnitudes.iter_mut().flatten().for_each(|m| m.drop_before(start));
        for r in &mut self.retained {
            let gone = r.within(&(0..start)).end;
            r.members.iter_mut().for_each(|s| s.drop_before(gone));
            if gone > r.dropped {
                Arc::make_mut(&mut r.positions).drain(..gone - r.dropped);
                r.dropped = gone;
            }
        }
    }

    pub(crate) fn footprint(&self) -> Footprint {
        let mut out = Footprint::default();
        let shared = self.shared.bytes();
        out.directions += shared.codes;
        out.scales += shared.scales;
        out.residual += shared.residual;
        out.magnitudes = self.magnitudes.iter().flatten().map(Magnitudes::bytes).sum();
        for store in self.newest.iter().flat_map(|n| &n.members) {
            out.residual += store.bytes().total();
        }
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
