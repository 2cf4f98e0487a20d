//! Blocks of a fixed number of tokens, gathered into shared pages.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::archive::{Archive, damaged};
use crate::kernels::Line;

/// Blocks are gathered into pages of about this size, so that what an allocation costs beside its contents is small.
const PAGE_BYTES: usize = 16 << 10;
const MAX_BLOCKS: usize = 8;
/// The same where the blocks of a page are worked on together.
const MAX_JOINT_BLOCKS: usize = 16;

/// An `Arc` allocates two counters, padded to the lines' alignment, before the lines.
const COUNTERS: usize =
    if Line::BYTES > 2 * size_of::<usize>() { Line::BYTES } else { 2 * size_of::<usize>() };

/// What [`Pages`] take, without their blocks. The list is one, with entries of the same size, so that it grows as theirs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PageCount {
    block_bytes: usize,
    page_log: u32,
    dropped: usize,
    blocks: usize,
    list: VecDeque<[usize; 2]>,
}

impl PageCount {
    /// As [`Pages::push`].
    pub(super) fn push(&mut self) {
        if self.blocks.is_multiple_of(1 << self.page_log) {
            self.list.push_back([0; 2]);
        }
        self.blocks += 1;
    }

    /// As [`Pages::first`].
    pub(super) fn first(&self) -> usize {
        (self.dropped << self.page_log).min(self.blocks)
    }

    /// As [`Pages::drop_before`].
    pub(super) fn drop_before(&mut self, block: usize) {
        while self.dropped < block.min(self.blocks) >> self.page_log {
            self.list.pop_front();
            self.dropped += 1;
        }
    }

    /// As [`Pages::truncate`].
    pub(super) fn truncate(&mut self, blocks: usize) {
        if blocks >= self.blocks {
            return;
        }
        self.list.truncate(blocks.div_ceil(1 << self.page_log).saturating_sub(self.dropped));
        if blocks == 0 {
            self.dropped = 0;
        }
        self.blocks = blocks;
    }

    /// As [`Pages::held`].
    pub(super) fn held(&self) -> usize {
        self.blocks - self.first()
    }

    /// As [`Pages::bytes`].
    pub(super) fn bytes(&self) -> usize {
        let lists = self.list.capacity() * size_of::<[usize; 2]>();
        self.held() * self.block_bytes + self.list.len() * COUNTERS + lists
    }
}

const _: () = assert!(size_of::<[usize; 2]>() == size_of::<Arc<[Line]>>(), "an entry of the list");

/// A growing row of equal blocks. A clone shares the pages; whoever writes to a shared page copies that page. A page
/// holds exactly the blocks it has (it is copied when a block joins it), so nothing is allocated in advance.
#[derive(Clone)]
pub(super) struct Pages {
    pages: VecDeque<Arc<[Line]>>,
    block_lines: usize,
    /// Blocks per page, as a power of two.
    page_log: u32,
    /// Pages dropped at the front.
    dropped: usize,
    /// Blocks, dropped ones included.
    blocks: usize,
}

impl Pages {
    pub(super) fn new(block_lines: usize) -> Self {
        Self::sized(block_lines, MAX_BLOCKS)
    }

    /// For blocks that are worked on together, a page at a time.
    pub(super) fn joint(block_lines: usize) -> Self {
        Self::sized(block_lines, MAX_JOINT_BLOCKS)
    }

    fn sized(block_lines: usize, most: usize) -> Self {
        let page_log = (PAGE_BYTES / (block_lines * Line::BYTES).max(1)).clamp(1, most).ilog2();
        Self::with_log(block_lines, page_log)
    }

    /// Every block in a page of its own, so that each can be dropped.
    pub(super) fn single(block_lines: usize) -> Self {
        Self::with_log(block_lines, 0)
    }

    fn with_log(block_lines: usize, page_log: u32) -> Self {
        Self { pages: VecDeque::new(), block_lines, page_log, dropped: 0, blocks: 0 }
    }

    /// No blocks, of the same size.
    pub(super) fn empty(&self) -> Self {
        Self::with_log(self.block_lines, self.page_log)
    }

    /// The first block still held.
    pub(super) fn first(&self) -> usize {
        (self.dropped << self.page_log).min(self.blocks)
    }

    /// Appends a block of zeros.
    pub(super) fn push(&mut self) {
        let zeros = std::iter::repeat_n(Line::ZERO, self.block_lines);
        if self.blocks.is_multiple_of(1 << self.page_log) {
            self.pages.push_back(zeros.collect());
        } else if let Some(last) = self.pages.back_mut() {
            *last = last.iter().copied().chain(zeros).collect();
        }
        self.blocks += 1;
    }

    fn place(&self, block: usize) -> (usize, Range<usize>) {
        let start = block % (1 << self.page_log) * self.block_lines;
        ((block >> self.page_log) - self.dropped, start..start + self.block_lines)
    }

    pub(super) fn block(&self, block: usize) -> &[Line] {
        let (page, lines) = self.place(block);
        &self.pages[page][lines]
    }

    /// The blocks from `block` to the end of its page, at most `most` of them.
    pub(super) fn blocks(&self, block: usize, most: usize) -> &[Line] {
        let (page, lines) = self.place(block);
        let rest = &self.pages[page][lines.start..];
        &rest[..rest.len().min(most.saturating_mul(self.block_lines))]
    }

    /// Lines of a block.
    pub(super) fn block_lines(&self) -> usize {
        self.block_lines
    }

    pub(super) fn block_mut(&mut self, block: usize) -> &mut [Line] {
        let (page, lines) = self.place(block);
        &mut Arc::make_mut(&mut self.pages[page])[lines]
    }

    /// Frees the pages of which every block is before `block`.
    pub(super) fn drop_before(&mut self, block: usize) {
        while self.dropped < block.min(self.blocks) >> self.page_log {
            self.pages.pop_front();
            self.dropped += 1;
        }
    }

    /// Forgets the blocks from `blocks` on, and gives back what they took.
    pub(super) fn truncate(&mut self, blocks: usize) {
        if blocks >= self.blocks {
            return;
        }
        let per_page = 1 << self.page_log;
        self.pages.truncate(blocks.div_ceil(per_page).saturating_sub(self.dropped));
        let left = blocks % per_page * self.block_lines;
        if left > 0
            && let Some(last) = self.pages.back_mut()
            && last.len() > left
        {
            *last = last[..left].into();
        }
        if blocks == 0 {
            self.dropped = 0;
        }
        self.blocks = blocks;
    }

    /// Bytes allocated: pages with their counters, and the list of pages.
    pub(super) fn bytes(&self) -> usize {
        let pages: usize = self.pages.iter().map(|lines| COUNTERS + size_of_val(&lines[..])).sum();
        pages + self.pages.capacity() * size_of::<Arc<[Line]>>()
    }

    /// The count of such pages, of which there are none yet.
    pub(super) fn count(&self) -> PageCount {
        let (block_bytes, page_log) = (self.block_lines * Line::BYTES, self.page_log);
        PageCount { block_bytes, page_log, dropped: 0, blocks: 0, list: VecDeque::new() }
    }

    pub(super) fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        archive.count(&mut self.dropped)?;
        archive.count(&mut self.blocks)?;
        let per_page = 1 << self.page_log;
        let pages = self.blocks.div_ceil(per_page).checked_sub(self.dropped);
        damaged(pages.is_some())?;
        for i in 0..pages.unwrap_or(0) {
            if archive.reads() {
                self.pages.push_back(Arc::from([]));
            }
            let blocks = (self.blocks - (self.dropped + i) * per_page).min(per_page);
            archive.page(&mut self.pages[i], blocks * self.block_lines)?;
        }
        Ok(())
    }

    /// Blocks, dropped ones included.
    pub(super) fn blocks_ever(&self) -> usize {
        self.blocks
    }

    /// Blocks held.
    pub(super) fn held(&self) -> usize {
        self.blocks - self.first()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{view, view_mut};

    #[test]
    fn a_clone_shares_until_it_writes_and_dropped_pages_are_freed() {
        let mut a = Pages::new(16); // 1 KiB: eight to a page
        for i in 0..20 {
            a.push();
            view_mut::<u8>(a.block_mut(i))[5] = i as u8;
        }
        let mut b = a.clone();
        assert!(Arc::ptr_eq(&a.pages[1], &b.pages[1]));
        view_mut::<u8>(b.block_mut(9))[5] = 99;
        assert!(Arc::ptr_eq(&a.pages[0], &b.pages[0]) && !Arc::ptr_eq(&a.pages[1], &b.pages[1]));
        assert_eq!((view::<u8>(a.block(9))[5], view::<u8>(b.block(9))[5]), (9, 99));
        let before = a.bytes();
        a.drop_before(15);
        assert_eq!((a.first(), a.blocks, a.held()), (8, 20, 12));
        assert_eq!(before - a.bytes(), 8 * 1024 + 64);
        assert_eq!(view::<u8>(a.block(8))[5], 8);
        assert_eq!(view::<u8>(b.block(0))[5], 0);
    }
}
