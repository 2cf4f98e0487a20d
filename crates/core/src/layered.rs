//! The cache of every method that keeps all tokens: layers store their own states or share those of a pair.

use std::cell::RefCell;
use std::ops::Range;

use crate::settings::ModelShape;

use crate::archive::{Archive, damaged};
use crate::cache::{KvCache, Restored};
use crate::lane::Lane;
use crate::pair::{PairSide, Proposal, SideSettings};
use crate::states::{States, check_in_sight, check_layer, check_truncate};
use crate::view::{LayerView, SideView};
use crate::{Footprint, Result};

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

/// One side (keys or values) of all layers.
struct Stack {
    places: Vec<Place>,
    pairs: Vec<Pair>,
}

impl Stack {
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

    /// How the first `len` tokens of a layer lie.
    fn view(&self, layer: usize, len: usize) -> SideView<'_> {
        match &self.places[layer] {
            Place::Own(lane) => lane.segment(lane.start().min(len)..len).into(),
            Place::Shared(pair, member) => self.pairs[*pair].side.view(*member, len),
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

    /// Frees what no query sees any more; `first(layer)` is what a layer's next one sees first.
    fn drop_before(&mut self, first: impl Fn(usize) -> usize) {
        for (layer, place) in self.places.iter_mut().enumerate() {
            if let Place::Own(lane) = place {
                lane.drop_before(first(layer));
            }
        }
        for Pair { layers, side, .. } in &mut self.pairs {
            side.drop_before(first(layers.0).min(first(layers.1)));
        }
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

    fn archive(&mut self, archive: &mut Archive<'_>, len: usize) -> Result<()> {
        for place in &mut self.places {
            if let Place::Own(lane) = place {
                lane.archive(archive)?;
            }
        }
        self.pairs.iter_mut().try_for_each(|p| p.side.archive(archive, len))
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
    keys: Stack,
    values: Stack,
    joint: bool,
    len: usize,
    /// Tokens of the step in progress.
    step: usize,
}

impl Layered {
    pub(crate) fn new(shape: &ModelShape, plan: &Plan) -> Self {
        Self {
            shape: *shape,
            keys: Stack::new(shape, &*plan.own_keys, &plan.key_pairs, plan.keys.as_ref()),
            values: Stack::new(shape, &*plan.own_values, &plan.value_pairs, plan.values.as_ref()),
            joint: plan.joint,
            len: 0,
            step: 0,
        }
    }

    fn view(&self, layer: usize) -> LayerView<'_> {
        LayerView { keys: self.keys.view(layer, self.len), values: self.values.view(layer, self.len) }
    }

    /// What of a layer the next query sees.
    fn visible(&self, layer: usize) -> Range<usize> {
        self.shape.first_seen(layer, self.len)..self.len
    }

    /// Retained positions of the pair whose deeper layer is `layer`: of keys and of values, per lane.
    pub(crate) fn retained(&self, layer: usize) -> [Vec<Vec<usize>>; 2] {
        [&self.keys, &self.values].map(|side| {
            let pair = side.pairs.iter().find(|p| p.layers.1 == layer);
            pair.map_or_else(Vec::new, |p| p.side.retained_positions())
        })
    }

    fn put(&mut self, layer: usize, k: &[f32], v: &[f32]) {
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

    fn attend_held(&self, layer: usize, states: States<'_>, out: &mut [f32], _: &mut Vec<f32>) -> Result<()> {
        self.view(layer).attend(&self.shape, layer, self.len, states, out);
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> Result<()> {
        self.step = states.tokens(&self.shape);
        self.put(layer, states.k, states.v);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.len += std::mem::take(&mut self.step);
        if self.shape.window.is_some() {
            let (shape, len) = (self.shape, self.len);
            self.keys.drop_before(|layer| shape.first_seen(layer, len));
            self.values.drop_before(|layer| shape.first_seen(layer, len));
        }
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let sides = [&self.keys, &self.values];
        check_truncate(self.len, len, || {
            check_in_sight(&self.shape, len, |layer| self.keys.start(layer).max(self.values.start(layer)))?;
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
        Ok(self.view(layer).restored(&self.shape, self.visible(layer)))
    }

    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        self.keys.archive(archive, self.len)?;
        self.values.archive(archive, self.len)?;
        damaged((0..self.shape.layers).all(|layer| self.view(layer).holds(self.visible(layer))))
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(Self { keys: self.keys.fork(), values: self.values.fork(), ..*self })
    }
}
