//! A layer's own store as a lane.

use std::ops::Range;

use crate::Footprint;
use crate::lane::{Keys, Lane, Values};
use crate::store::Store;

/// States of one side of one layer in one [`Store`].
#[derive(Clone)]
pub(crate) struct Plain(pub(crate) Store);

impl Plain {
    pub(crate) fn boxed(store: Store) -> Box<dyn Lane> {
        Box::new(Self(store))
    }
}

impl Keys for Plain {
    fn scores(&self, heads: Range<usize>, range: Range<usize>, q: &[f32], rows: usize, out: &mut [f32]) {
        let head = heads.start;
        self.0.scores(head, range, q, rows, out);
    }
}

impl Values for Plain {
    fn accumulate(&self, heads: Range<usize>, range: Range<usize>, p: &[f32], rows: usize, out: &mut [f32]) {
        let head = heads.start;
        self.0.accumulate(head, range, p, rows, out);
    }
}

impl Lane for Plain {
    fn push(&mut self, rows: &[f32]) {
        self.0.push(rows);
    }
    fn read(&self, head: usize, position: usize, out: &mut [f32]) {
        self.0.read(head, position, out);
    }
    fn drop_before(&mut self, position: usize) {
        self.0.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> Result<(), &'static str> {
        self.0.can_truncate(len)
    }
    fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }
    fn start(&self) -> usize {
        self.0.start()
    }
    fn footprint(&self) -> Footprint {
        let bytes = self.0.bytes();
        Footprint {
            states: bytes.codes,
            scales: bytes.scales,
            residual: bytes.residual,
            ..Footprint::default()
        }
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}
