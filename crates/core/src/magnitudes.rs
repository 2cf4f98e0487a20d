//! Columns of numbers beside stored vectors: magnitudes of merged states, or scales; one number per token, or per token
//! and KV head.

use std::ops::Range;
use std::sync::Arc;

use crate::archive::{Archive, damaged};
use crate::settings::StoreType;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Result;
use crate::kernels::half;

/// Tokens per page.
const PAGE: usize = 256;

#[derive(Debug, Clone)]
enum Page {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

/// A column of numbers, or one per KV head, that vectors are multiplied with (see [`crate::Segment::times`]). Pages are
/// shared by clones until written.
#[derive(Debug, Clone)]
pub struct Magnitudes {
    dtype: StoreType,
    lanes: usize,
    /// Each page holds `lanes` runs of `PAGE` numbers.
    pages: std::collections::VecDeque<Arc<Page>>,
    first_page: usize,
    len: usize,
}

impl Magnitudes {
    /// No numbers; `lanes` columns, 1 or one per KV head, stored as `dtype`.
    pub fn new(lanes: usize, dtype: StoreType) -> Self {
        Self { dtype, lanes, pages: std::collections::VecDeque::new(), first_page: 0, len: 0 }
    }

    /// A page of zeros.
    fn page(&self) -> Arc<Page> {
        let size = self.lanes * PAGE;
        Arc::new(match self.dtype {
            StoreType::F16 => Page::F16(vec![f16::ZERO; size]),
            StoreType::F32 => Page::F32(vec![0.0; size]),
        })
    }

    /// Appends one number per lane.
    pub fn push(&mut self, values: &[f32]) {
        let at = self.len % PAGE;
        if at == 0 {
            self.pages.push_back(self.page());
        }
        let slots = values.iter().enumerate().map(|(lane, &x)| (lane * PAGE + at, x));
        match self.pages.back_mut().map(Arc::make_mut) {
            Some(Page::F16(page)) => slots.for_each(|(i, x)| page[i] = half(x)),
            Some(Page::F32(page)) => slots.for_each(|(i, x)| page[i] = x),
            None => unreachable!("a page was pushed above"),
        }
        self.len += 1;
    }

    /// The lane of a KV head.
    fn lane(&self, head: usize) -> usize {
        if self.lanes > 1 { head } else { 0 }
    }

    /// Multiplies each of `rows` rows of `y`, `stride` apart, column by column with the numbers of KV head `head` at
    /// `range`.
    pub(crate) fn scale(&self, head: usize, range: Range<usize>, y: &mut [f32], stride: usize, rows: usize) {
        let lane = self.lane(head);
        let mut at = range.start;
        let mut buffer = [0.0; PAGE];
        while at < range.end {
            let (page, offset) = (at / PAGE, at % PAGE);
            let count = (PAGE - offset).min(range.end - at);
            let from = lane * PAGE + offset;
            match &*self.pages[page - self.first_page] {
                Page::F16(p) => p[from..from + count].convert_to_f32_slice(&mut buffer[..count]),
                Page::F32(p) => buffer[..count].copy_from_slice(&p[from..from + count]),
            }
            for row in 0..rows {
                let columns = &mut y[row * stride + at - range.start..][..count];
                columns.iter_mut().zip(&buffer).for_each(|(x, m)| *x *= m);
            }
            at += count;
        }
    }

    /// The number of KV head `head` at `index`.
    pub(crate) fn of_head(&self, head: usize, index: usize) -> f32 {
        let mut one = [1.0];
        self.scale(head, index..index + 1, &mut one, 1, 1);
        one[0]
    }

    /// Frees pages that lie before `position`.
    pub fn drop_before(&mut self, position: usize) {
        while (self.first_page + 1) * PAGE <= position && self.pages.len() > 1 {
            self.pages.pop_front();
            self.first_page += 1;
        }
    }

    /// Forgets the numbers from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE).saturating_sub(self.first_page));
        if self.len == 0 {
            self.first_page = 0;
        }
    }

    /// Numbers of each column.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.len)?;
        archive.count(&mut self.first_page)?;
        let pages = self.len.div_ceil(PAGE).checked_sub(self.first_page);
        damaged(pages.is_some() || self.len == 0)?;
        for i in 0..pages.unwrap_or(0) {
            if archive.reads() {
                self.pages.push_back(self.page());
            }
            let page = Arc::make_mut(&mut self.pages[i]);
            let (size, read) = match page {
                Page::F16(page) => (page.len(), archive.numbers(page).map(|()| page.len())?),
                Page::F32(page) => (page.len(), archive.numbers(page).map(|()| page.len())?),
            };
            damaged(size == read)?;
        }
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.lanes * PAGE * self.dtype.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_what_was_pushed_and_clones_are_independent() {
        for dtype in [StoreType::F16, StoreType::F32] {
            let mut m = Magnitudes::new(2, dtype);
            (0..600).for_each(|i| m.push(&[i as f32, -(i as f32)]));
            let mut other = m.clone();
            other.push(&[1000.0, 1000.0]);
            m.push(&[5.0, 6.0]);
            assert_eq!((m.of_head(0, 600), m.of_head(1, 600), other.of_head(0, 600)), (5.0, 6.0, 1000.0));
            let mut rows = vec![1.0; 2 * 300];
            m.scale(1, 100..400, &mut rows, 300, 2);
            assert_eq!((rows[0], rows[299], rows[300], rows[599]), (-100.0, -399.0, -100.0, -399.0));
            m.drop_before(300);
            assert_eq!((m.of_head(0, 300), m.bytes()), (300.0, 2 * 2 * 256 * dtype.bytes()));
        }
    }
}
