//! A layer's own store as a lane.

use std::ops::Range;

use crate::archive::Archive;
use crate::lane::Lane;
use crate::store::Store;
use crate::view::Segment;
use crate::{Footprint, Result};

/// States of one side of one layer in one [`Store`].
#[derive(Clone)]
pub(crate) struct Plain(pub(crate) Store);

impl Plain {
    pub(crate) fn boxed(store: Store) -> Box<dyn Lane> {
        Box::new(Self(store))
    }
}

impl Lane for Plain {
    fn push(&mut self, rows: &[f32]) {
        self.0.push(rows);
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn segment(&self, positions: Range<usize>) -> Segment<'_> {
        let first = positions.start;
        Segment::new(positions, &self.0, first)
    }
    fn drop_before(&mut self, position: usize) {
        self.0.drop_before(position);
    }
    fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
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
    fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        self.0.archive(archive)
    }
    fn fork(&self) -> Box<dyn Lane> {
        Box::new(self.clone())
    }
}
