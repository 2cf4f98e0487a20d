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

/// Pages at the front of which some have been dropped, and the blocks in them.
#[derive(Debug, Clone, PartialEq)]
struct Paged<P> {
    pages: VecDeque<P>,
    /// Blocks per page, as a power of two.
    page_log: u32,
    /// Pages dropped at the front.
    dropped: usize,
    /// Blocks, dropped ones included.
    blocks: usize,
}

impl<P> Paged<P> {
    fn new(page_log: u32) -> Self {
        Self { pages: VecDeque::new(), page_log, dropped: 0, blocks: 0 }
    }

    fn first(&self) -> usize {
        (self.dropped << self.page_log).min(self.blocks)
    }

    fn held(&self) -> usize {
        self.blocks - self.first()
    }

    /// Whether the next block begins a page.
    fn is_full(&self) -> bool {
        self.blocks.is_multiple_of(1 << self.page_log)
    }

    fn drop_before(&mut self, block: usize) {
        while self.dropped < block.min(self.blocks) >> self.page_log {
            self.pages.pop_front();
            self.dropped += 1;
        }
    }

    /// Forgets the blocks from `blocks` on, of which there are some.
    fn truncate(&mut self, blocks: usize) {
        self.pages.truncate(blocks.div_ceil(1 << self.page_log).saturating_sub(self.dropped));
        if blocks == 0 {
            self.dropped = 0;
        }
        self.blocks = blocks;
    }

    /// Bytes of the list of pages.
    fn list_bytes(&self) -> usize {
        self.pages.capacity() * size_of::<P>()
    }
}

/// What [`Pages`] take, without their blocks. The list has entries of the same size, so that it grows as theirs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PageCount {
    block_bytes: usize,
    list: Paged<[usize; 2]>,
}

impl PageCount {
    /// As [`Pages::push`].
    pub(super) fn push(&mut self) {
        if self.list.is_full() {
            self.list.pages.push_back([0; 2]);
        }
        self.list.blocks += 1;
    }

    /// As [`Pages::first`].
    pub(super) fn first(&self) -> usize {
        self.list.first()
    }

    /// As [`Pages::drop_before`].
    pub(super) fn drop_before(&mut self, block: usize) {
        self.list.drop_before(block);
    }

    /// As [`Pages::truncate`].
    pub(super) fn truncate(&mut self, blocks: usize) {
        if blocks < self.list.blocks {
            self.list.truncate(blocks);
        }
    }

    /// As [`Pages::held`].
    pub(super) fn held(&self) -> usize {
        self.list.held()
    }

    /// As [`Pages::bytes`].
    pub(super) fn bytes(&self) -> usize {
        self.held() * self.block_bytes + self.list.pages.len() * COUNTERS + self.list.list_bytes()
    }
}

const _: () = assert!(size_of::<[usize; 2]>() == size_of::<Arc<[Line]>>(), "an entry of the list");

/// A growing row of equal blocks. A clone shares the pages; whoever writes to a shared page copies that page. A page
/// holds exactly the blocks it has (it is copied when a block joins it), so nothing is allocated in advance.
#[derive(Clone)]
pub(super) struct Pages {
    list: Paged<Arc<[Line]>>,
    block_lines: usize,
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
        Self { list: Paged::new(page_log), block_lines }
    }

    /// No blocks, of the same size.
    pub(super) fn empty(&self) -> Self {
        Self::with_log(self.block_lines, self.list.page_log)
    }

    /// The first block still held.
    pub(super) fn first(&self) -> usize {
        self.list.first()
    }

    /// Appends a block of zeros.
    pub(super) fn push(&mut self) {
        let zeros = std::iter::repeat_n(Line::ZERO, self.block_lines);
        if self.list.is_full() {
            self.list.pages.push_back(zeros.collect());
        } else if let Some(last) = self.list.pages.back_mut() {
            *last = last.iter().copied().chain(zeros).collect();
        }
        self.list.blocks += 1;
    }

    fn place(&self, block: usize) -> (usize, Range<usize>) {
        let Paged { page_log, dropped, .. } = self.list;
        let start = block % (1 << page_log) * self.block_lines;
        ((block >> page_log) - dropped, start..start + self.block_lines)
    }

    pub(super) fn block(&self, block: usize) -> &[Line] {
        let (page, lines) = self.place(block);
        &self.list.pages[page][lines]
    }

    /// The blocks from `block` to the end of its page, at most `most` of them.
    pub(super) fn blocks(&self, block: usize, most: usize) -> &[Line] {
        let (page, lines) = self.place(block);
        let rest = &self.list.pages[page][lines.start..];
        &rest[..rest.len().min(most.saturating_mul(self.block_lines))]
    }

    /// Lines of a block.
    pub(super) fn block_lines(&self) -> usize {
        self.block_lines
    }

    pub(super) fn block_mut(&mut self, block: usize) -> &mut [Line] {
        let (page, lines) = self.place(block);
        &mut Arc::make_mut(&mut self.list.pages[page])[lines]
    }

    /// Frees the pages of which every block is before `block`.
    pub(super) fn drop_before(&mut self, block: usize) {
        self.list.drop_before(block);
    }

    /// Forgets the blocks from `blocks` on, and gives back what they took.
    pub(super) fn truncate(&mut self, blocks: usize) {
        if blocks >= self.list.blocks {
            return;
        }
        self.list.truncate(blocks);
        let left = blocks % (1 << self.list.page_log) * self.block_lines;
        if left > 0
            && let Some(last) = self.list.pages.back_mut()
            && last.len() > left
        {
            *last = last[..left].into();
        }
    }

    /// Bytes allocated: pages with their counters, and the list of pages.
    pub(super) fn bytes(&self) -> usize {
        let pages: usize = self.list.pages.iter().map(|lines| COUNTERS + size_of_val(&lines[..])).sum();
        pages + self.list.list_bytes()
    }

    /// The count of such pages, of which there are none yet.
    pub(super) fn count(&self) -> PageCount {
        PageCount { block_bytes: self.block_lines * Line::BYTES, list: Paged::new(self.list.page_log) }
    }

    pub(super) fn archive(&mut self, archive: &mut Archive<'_>) -> Result<()> {
        let Self { list, block_lines } = self;
        archive.count(&mut list.dropped)?;
        archive.count(&mut list.blocks)?;
        let per_page = 1 << list.page_log;
        let pages = list.blocks.div_ceil(per_page).checked_sub(list.dropped);
        damaged(pages.is_some())?;
        for i in 0..pages.unwrap_or(0) {
            if archive.reads() {
                list.pages.push_back(Arc::from([]));
            }
            let blocks = (list.blocks - (list.dropped + i) * per_page).min(per_page);
            archive.page(&mut list.pages[i], blocks * *block_lines)?;
        }
        Ok(())
    }

    /// Blocks, dropped ones included.
    pub(super) fn blocks_ever(&self) -> usize {
        self.list.blocks
    }

    /// Blocks held.
    pub(super) fn held(&self) -> usize {
        self.list.held()
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
        assert!(Arc::ptr_eq(&a.list.pages[1], &b.list.pages[1]));
        view_mut::<u8>(b.block_mut(9))[5] = 99;
        assert!(
            Arc::ptr_eq(&a.list.pages[0], &b.list.pages[0])
                && !Arc::ptr_eq(&a.list.pages[1], &b.list.pages[1])
        );
        assert_eq!((view::<u8>(a.block(9))[5], view::<u8>(b.block(9))[5]), (9, 99));
        let before = a.bytes();
        a.drop_before(15);
        assert_eq!((a.first(), a.list.blocks, a.held()), (8, 20, 12));
        assert_eq!(before - a.bytes(), 8 * 1024 + 64);
        assert_eq!(view::<u8>(a.block(8))[5], 8);
        assert_eq!(view::<u8>(b.block(0))[5], 0);
    }
}
