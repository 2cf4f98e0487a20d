//! A method that the core does not have, written outside of it: the first tokens, which attention looks at most, stay
//! exact, and all others are packed to four bits. It stores states and says where they lie; attention is the core's.

use minicache_core::settings::Axis;
use minicache_core::{
    Footprint, KvCache, LayerView, ModelShape, Restored, Result, Scheme, Segment, Side, SideView, States,
    Store,
};

/// Tokens that stay exact.
const FIRST: usize = 4;

#[derive(Clone)]
pub(crate) struct FirstExact {
    shape: ModelShape,
    /// Keys and values of each layer.
    layers: Vec<[Stored; 2]>,
    len: usize,
    step: usize,
}

/// One side of one layer.
#[derive(Clone)]
struct Stored {
    first: Store,
    rest: Store,
}

impl Stored {
    fn new(shape: &ModelShape, side: Side) -> Self {
        let packed = Scheme::Quant { bits: 4, group: 32, axis: Axis::Token, residual: 0 };
        let store = |scheme| Store::new(shape.kv_heads, shape.head_dim, scheme, side);
        Self { first: store(Scheme::F16), rest: store(packed) }
    }

    fn push(&mut self, rows: &[f32], width: usize) {
        let (first, rest) = rows.split_at(rows.len().min((FIRST - self.first.len()) * width));
        self.first.push(first);
        self.rest.push(rest);
    }

    fn view(&self) -> SideView<'_> {
        let (first, rest) = (self.first.len(), self.rest.len());
        [Segment::new(0..first, &self.first, 0), Segment::new(first..first + rest, &self.rest, 0)]
            .into_iter()
            .collect()
    }
}

impl FirstExact {
    pub(crate) fn new(shape: &ModelShape) -> Self {
        let layer = [Stored::new(shape, Side::Keys), Stored::new(shape, Side::Values)];
        Self { shape: *shape, layers: vec![layer; shape.layers], len: 0, step: 0 }
    }

    fn view(&self, layer: usize) -> LayerView<'_> {
        let [keys, values] = &self.layers[layer];
        LayerView { keys: keys.view(), values: values.view() }
    }
}

impl KvCache for FirstExact {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn attend_held(&self, layer: usize, states: States<'_>, out: &mut [f32], _: &mut Vec<f32>) -> Result<()> {
        self.view(layer).attend(&self.shape, layer, self.len, states, out);
        Ok(())
    }

    fn store(&mut self, layer: usize, states: States<'_>, _: &[f32]) -> Result<()> {
        let [keys, values] = &mut self.layers[layer];
        keys.push(states.k, self.shape.kv_dim());
        values.push(states.v, self.shape.kv_dim());
        self.step = states.tokens(&self.shape);
        Ok(())
    }

    fn finish_step(&mut self) -> Result<()> {
        self.len += std::mem::take(&mut self.step);
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn footprint(&self) -> Footprint {
        let mut total = Footprint::default();
        for stored in self.layers.iter().flatten() {
            let rest = stored.rest.bytes();
            total.states += rest.codes;
            total.scales += rest.scales;
            total.retained += stored.first.bytes().total();
        }
        total
    }

    fn restored(&self, layer: usize) -> Result<Restored> {
        Ok(self.view(layer).restored(&self.shape, 0..self.len))
    }

    fn fork(&self) -> Box<dyn KvCache> {
        Box::new(self.clone())
    }
}
