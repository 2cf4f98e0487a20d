//! Floats of eight bits, each KV head's vector of a token with a scale of its own, as a lane: see
//! [`crate::methods::Fp8`] for the formula.

use std::ops::Range;

use crate::archive::{Archive, damaged};
use crate::kernels::f8::LARGEST;
use crate::lane::Lane;
use crate::magnitudes::Magnitudes;
use crate::scratch::with_buffer;
use crate::settings::{ModelShape, StoreType};
use crate::store::{Scheme, Side, Store};
use crate::view::Segment;
use crate::{Footprint, Result};

/// States of one side of one layer as floats of eight bits.
#[derive(Clone)]
pub(crate) struct Scaled {
    states: Store,
    /// By KV head.
    scales: Magnitudes,
}

impl Scaled {
    /// Nothing; scales are stored as `scale`.
    pub(crate) fn new(shape: &ModelShape, scale: StoreType, side: Side) -> Self {
        let states = Store::new(shape.kv_heads, shape.head_dim, Scheme::F8, side);
        Self { states, scales: Magnitudes::new(shape.kv_heads, scale) }
    }

    /// The same for a window, see [`Store::for_window`].
    pub(crate) fn for_window(self) -> Self {
        Self { states: self.states.for_window(), ..self }
    }
}

impl Lane for Scaled {
    fn push(&mut self, rows: &[f32]) {
        let (heads, dim) = (self.states.heads(), self.states.dim());
        with_buffer(heads * (dim + 1), |buffer| {
            let (row, scales) = buffer.split_at_mut(heads * dim);
            for token in rows.chunks_exact(heads * dim) {
                for (scale, x) in scales.iter_mut().zip(token.chunks_exact(dim)) {
                    *scale = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / LARGEST;
                }
                self.scales.push(scales);
                let position = self.states.len();
                let vectors = row.chunks_exact_mut(dim).zip(token.chunks_exact(dim));
                for (head, (to, from)) in vectors.enumerate() {
                    // By the scale as it is stored. Where that is zero, nothing of the vector is left to store.
                    let scale = self.scales.of_head(head, position);
                    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
                }
                self.states.push(row);
            }
        });
    }
    fn len(&self) -> usize {
        self.states.len()
    }
    fn segment(&self, positions: Range<usize>) -> Segment<'_> {
        let first = positions.start;
        Segment::new(positions, &self.states, first).times(&self.scales)
    }
    fn drop_before(&mut self, position: usize) {
        self.states.drop_before(position);
        self.scales.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        self.states.can_truncate(len)
    }
    fn truncate(&mut self, len: usize) {
        self.states.truncate(len);
        self.scales.truncate(len);
    }
    fn start(&self) -> usize {
        self.states.start()
    }
    fn footprint(&self) -> Footprint {
        let states = self.states.bytes().total();
        Footprint { states, scales: self.scales.bytes(), ..Footprint::default() }
    }
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        self.states.archive(archive)?;
        self.scales.archive(archive)?;
        damaged(self.scales.len() == self.states.len())
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}
