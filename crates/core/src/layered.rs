//! The cache of every method that keeps all tokens: layers store their own states or share those of a pair.

use std::cell::RefCell;

use crate::settings::ModelShape;

use crate::attend::{Past, Step, attend};
use crate::cache::{KvCache, Restored, check_truncate};
use crate::lane::{Keys, Lane, Values};
use crate::pair::{PairSide, Proposal, SideSettings};
use crate::{Error, Footprint, Result};

/// What a method decides: how each side of each layer is stored.
pub(crate) struct Plan {
    /// An empty store for the keys of an unmerged layer.
    pub(crate) own_keys: Box<dyn Lane>,
    /// The same for values.
    pub(crate) own_values: Box<dyn Lane>,
    /// Pairs of layers whose keys are merged, and how.
    pub(crate) key_pairs: Vec<(usize, usize)>,
    pub(crate) keys: Option<SideSettings>,
    /// Pairs of layers whose values are merged, and how.
    pub(crate) value_pairs: Vec<(usize, usize)>,
    pub(crate) values: Option<SideSettings>,
    /// Keys and values of a pair retain the same tokens.
    pub(crate) joint: bool,
}

impl Plan {
    /// Every layer for itself.
    pub(crate) fn unmerged(own_keys: Box<dyn Lane>, own_values: Box<dyn Lane>) -> Self {
        let (key_pairs, value_pairs) = (Vec::new(), Vec::new());
        Self { own_keys, own_values, key_pairs, keys: None, value_pairs, values: None, joint: false }
    }
}

/// Where one side of one layer lives.
enum Place {
    Own(Box<dyn Lane>),
    /// Index of the pair side, and which member of the pair this layer is.
    Shared(usize, usize),
}

impl Place {
    fn fork(&self) -> Self {
        match self {
            Place::Own(lane) => Place::Own(lane.fork()),
            Place::Shared(pair, member) => Place::Shared(*pair, *member),
        }
    }
}

/// One side of one pair and the states of the shallower layer that wait for the deeper one within a step.
#[derive(Clone)]
struct Pair {
    layers: (usize, usize),
    side: PairSide,
    waiting: Vec<f32>,
}

/// One kind of states (keys or values) of all layers.
struct States {
    places: Vec<Place>,
    pairs: Vec<Pair>,
}

impl States {
    fn new(
        shape: &ModelShape,
        own: &dyn Lane,
        pairs: &[(usize, usize)],
        settings: Option<&SideSettings>,
    ) -> Self {
        let mut places: Vec<Place> = (0..shape.layers).map(|_| Place::Own(own.fork())).collect();
        let mut sides = Vec::new();
        for &(a, b) in pairs {
            let Some(settings) = settings else { break };
            places[a] = Place::Shared(sides.len(), 0);
            places[b] = Place::Shared(sides.len(), 1);
            let side = PairSide::new(settings.clone(), shape);
            sides.push(Pair { layers: (a, b), side, waiting: Vec::new() });
        }
        Self { places, pairs: sides }
    }

    fn fork(&self) -> Self {
        Self { places: self.places.iter().map(Place::fork).collect(), pairs: self.pairs.clone() }
    }

    fn start(&self, layer: usize) -> usize {
        match &self.places[layer] {
            Place::Own(lane) => lane.start(),
            Place::Shared(pair, _) => self.pairs[*pair].side.start(),
        }
    }

    fn read(&self, layer: usize, head: usize, position: usize, out: &mut [f32]) {
        match &self.places[layer] {
            Place::Own(lane) => lane.read(head, position, out),
            Place::Shared(pair, member) => self.pairs[*pair].side.member(*member).read(head, position, out),
        }
    }

    /// Stores what needs no partner. Gives the index of the pair that is complete with this layer.
    fn push(&mut self, layer: usize, rows: &[f32]) -> Option<usize> {
        match &mut self.places[layer] {
            Place::Own(lane) => {
                lane.push(rows);
                None
            }
            Place::Shared(pair, 0) => {
                let waiting = &mut self.pairs[*pair].waiting;
                waiting.clear();
                waiting.extend_from_slice(rows);
                None
            }
            Place::Shared(pair, _) => Some(*pair),
        }
    }

    fn drop_before(&mut self, position: usize) {
        for place in &mut self.places {
            if let Place::Own(lane) = place {
                lane.drop_before(position);
            }
        }
        self.pairs.iter_mut().for_each(|p| p.side.drop_before(position));
    }

    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        for place in &self.places {
            if let Place::Own(lane) = place {
                lane.can_truncate(len)?;
            }
        }
        self.pairs.iter().try_for_each(|p| p.side.can_truncate(len))
    }

    fn truncate(&mut self, len: usize) {
        for place in &mut self.places {
            if let Place::Own(lane) = place {
                lane.truncate(len);
            }
        }
        self.pairs.iter_mut().for_each(|p| p.side.truncate(len));
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        for place in &self.places {
            if let Place::Own(lane) = place {
                total += lane.footprint();
            }
        }
        for pair in &self.pairs {
            total += pair.side.footprint();
            total.residual += pair.waiting.capacity() * size_of::<f32>();
        }
        total
    }
}

thread_local! {
    /// For keys and for values: no heap allocation per decode step after warm-up.
    static WORK: RefCell<[Work; 2]> = RefCell::default();
}

/// What merging one side of a step needs beside the stores.
#[derive(Default)]
struct Work {
    proposal: Proposal,
    /// The deeper layer's states.
    deeper: Vec<f32>,
}

impl Work {
    fn propose(&mut self, pair: &mut Pair, rows: &[f32]) {
        self.deeper.clear();
        self.deeper.extend_from_slice(rows);
        pair.side.slide(&mut pair.waiting, &mut self.deeper);
        pair.side.propose(&mut pair.waiting, &mut self.deeper, &mut self.proposal);
    }

    /// Drops the originals of a long prefill and keeps room for a decode step of `kv_dim` numbers.
    fn commit(&mut self, pair: &mut Pair, kv_dim: usize) {
        pair.side.commit(&mut self.proposal, &pair.waiting, &self.deeper);
        for states in [&mut pair.waiting, &mut self.deeper] {
            states.clear();
            states.shrink_to(kv_dim);
        }
        self.proposal.shrink(kv_dim);
    }
}

/// Keeps every token (within the model's window); see [`Plan`].
pub(crate) struct Layered {
    shape: ModelShape,
    keys: States,
    values: States,
    joint: bool,
    len: usize,
    /// Tokens of the step in progress.
    step: usize,
}

impl Layered {
    pub(crate) fn new(shape: &ModelShape, plan: &Plan) -> Self {
        Self {
            shape: *shape,
            keys: States::new(shape, &*plan.own_keys, &plan.key_pairs, plan.keys.as_ref()),
            values: States::new(shape, &*plan.own_values, &plan.value_pairs, plan.values.as_ref()),
            joint: plan.joint,
            len: 0,
            step: 0,
        }
    }

    /// First position that the next query sees.
    fn first_visible(&self) -> usize {
        first_visible(&self.shape, self.len)
    }

    /// Retained positions of the pair whose deeper layer is `layer`: of keys and of values, per lane.
    pub(crate) fn retained(&self, layer: usize) -> [Vec<Vec<usize>>; 2] {
        [&self.keys, &self.values].map(|side| {
            let pair = side.pairs.iter().find(|p| p.layers.1 == layer);
            pair.map_or_else(Vec::new, |p| p.side.retained_positions())
        })
    }

    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) {
        let pairs = [self.keys.push(layer, k), self.values.push(layer, v)];
        let [mut keys, mut values] = [(&mut self.keys, pairs[0]), (&mut self.values, pairs[1])]
            .map(|(side, p)| p.map(|p| &mut side.pairs[p]));
        // Taken out while in use: merging must not depend on what else this thread is in the middle of.
        let mut works = WORK.take();
        let [key, value] = &mut works;
        if let Some(pair) = &mut keys {
            key.propose(pair, k);
        }
        if let Some(pair) = &mut values {
            value.propose(pair, v);
        }
        if self.joint && keys.is_some() && values.is_some() {
            for (k, v) in key.proposal.retained.iter_mut().zip(&mut value.proposal.retained) {
                (*k, *v) = (*k || *v, *k || *v);
            }
        }
        for (pair, work) in [(keys, key), (values, value)] {
            if let Some(pair) = pair {
                work.commit(pair, self.shape.kv_dim());
            }
        }
        WORK.set(works);
    }
}

impl KvCache for Layered {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_into(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        let tokens = check_step(&self.shape, layer, self.len, q, k, v, out)?;
        let (start, end) = (self.keys.start(layer).max(self.values.start(layer)), self.len);
        let step = Step { q, k, v, tokens };
        match (&self.keys.places[layer], &self.values.places[layer]) {
            (Place::Own(keys), Place::Own(values)) => {
                let (keys, values) = (&**keys as &dyn Keys, &**values as &dyn Values);
                attend(&self.shape, Past { keys, values, start, end }, step, out);
            }
            (keys, values) => {
                let key_view = View::of(keys, &self.keys);
                let value_view = View::of(values, &self.values);
                let past = Past { keys: key_view.keys(), values: value_view.values(), start, end };
                attend(&self.shape, past, step, out);
            }
        }
        self.store(layer, k, v);
        self.step = tokens;
        Ok(())
    }

    fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.step = check_states(&self.shape, layer, self.len, k, v)?;
        self.store(layer, k, v);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.len += std::mem::take(&mut self.step);
        let first = self.first_visible();
        if first > 0 {
            self.keys.drop_before(first);
            self.values.drop_before(first);
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let sides = [&self.keys, &self.values];
        check_truncate(self.len, len, || {
            let first = first_visible(&self.shape, len);
            let starts = sides.iter().flat_map(|side| (0..self.shape.layers).map(|l| side.start(l)));
            if len > 0 && starts.max() > Some(first) {
                return Err(GONE);
            }
            sides.iter().try_for_each(|side| side.can_truncate(len))
        })?;
        self.keys.truncate(len);
        self.values.truncate(len);
        self.len = len;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = self.keys.footprint();
        total += self.values.footprint();
        total
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        check_layer(&self.shape, layer)?;
        let positions: Vec<usize> = (self.first_visible()..self.len).collect();
        let (heads, dim) = (self.shape.kv_heads, self.shape.head_dim);
        let read = |side: &States| {
            let mut out = vec![0.0; positions.len() * heads * dim];
            for (i, row) in out.chunks_exact_mut(dim).enumerate() {
                side.read(layer, i % heads, positions[i / heads], row);
            }
            out
        };
        Ok(Restored { keys: read(&self.keys), values: read(&self.values), positions })
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self { keys: self.keys.fork(), values: self.values.fork(), ..*self })
    }
}

/// First position that the query after `len` tokens sees.
pub(crate) fn first_visible(shape: &ModelShape, len: usize) -> usize {
    shape.window.map_or(0, |w| (len + 1).saturating_sub(w))
}

/// Why a cache with a sliding window cannot go back.
pub(crate) const GONE: &str = "tokens that would come into sight again have left the sliding window";

/// One side of one layer as attention reads it.
enum View<'a> {
    Own(&'a dyn Lane),
    Shared(crate::pair::Member<'a>),
}

impl<'a> View<'a> {
    fn of(place: &'a Place, side: &'a States) -> Self {
        match place {
            Place::Own(lane) => View::Own(&**lane),
            Place::Shared(pair, member) => View::Shared(side.pairs[*pair].side.member(*member)),
        }
    }

    fn keys(&self) -> &dyn Keys {
        match self {
            View::Own(lane) => *lane,
            View::Shared(member) => member,
        }
    }

    fn values(&self) -> &dyn Values {
        match self {
            View::Own(lane) => *lane,
            View::Shared(member) => member,
        }
    }
}

/// Checks the slices of a step against the shape, and the states for NaN and infinity. Gives the tokens of the step.
pub(crate) fn check_step(
    shape: &ModelShape,
    layer: usize,
    len: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
) -> Result<usize> {
    let tokens = check_states(shape, layer, len, k, v)?;
    let width = shape.heads * shape.head_dim;
    check_len("queries", q.len(), tokens, width)?;
    check_len("output", out.len(), tokens, width)?;
    Ok(tokens)
}

/// [`check_step`] without queries.
pub(crate) fn check_states(
    shape: &ModelShape,
    layer: usize,
    len: usize,
    k: &[f32],
    v: &[f32],
) -> Result<usize> {
    check_layer(shape, layer)?;
    let width = shape.kv_dim();
    let tokens = k.len() / width;
    check_len("keys", k.len(), tokens, width)?;
    check_len("values", v.len(), tokens, width)?;
    for (side, x) in [("key", k), ("value", v)] {
        // One pass without branches, and the slow search only on failure.
        if !x.iter().fold(true, |all, v| all & v.is_finite()) {
            let at = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
            return Err(Error::NotFinite { side, layer, position: len + at / width });
        }
    }
    Ok(tokens)
}

fn check_len(what: &'static str, got: usize, tokens: usize, width: usize) -> Result<()> {
    if tokens > 0 && got == tokens * width {
        return Ok(());
    }
    let expected = format!("{} tokens of {width} numbers", tokens.max(1));
    Err(Error::Shape { what, expected, got: format!("{got} numbers") })
}

pub(crate) fn check_layer(shape: &ModelShape, layer: usize) -> Result<()> {
    if layer < shape.layers {
        return Ok(());
    }
    let expected = format!("below {}", shape.layers);
    Err(Error::Shape { what: "layer", expected, got: layer.to_string() })
}
