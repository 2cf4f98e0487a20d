//! What a store holds, without it: for a backend that keeps the same blocks elsewhere.

use std::ops::Range;

use super::pages::PageCount;
use super::{Block, RECENT, Scheme, Store, StoreBytes, can_truncate, waiting_blocks};
use crate::settings::Axis;

/// The tokens of a [`Store`] as numbers: how many there are, how many of them are packed, and what the blocks take that
/// hold them, in the same pages and with the same lists to find them. So a cache weighs the same whatever memory it is in,
/// and goes back as far.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreCount {
    scheme: Scheme,
    /// Tokens of a block, and bytes of its scales.
    tokens: usize,
    scale_bytes: usize,
    len: usize,
    packed: usize,
    pages: PageCount,
    recent: PageCount,
}

impl Store {
    /// The count of such a store, of no tokens.
    pub fn count(&self) -> StoreCount {
        let scale_bytes = match &self.block {
            Block::Codes(block) => self.heads * block.head_bytes().1,
            _ => 0,
        };
        StoreCount {
            scheme: self.scheme,
            tokens: self.block_tokens(),
            scale_bytes,
            len: 0,
            packed: 0,
            pages: self.pages.count(),
            recent: self.recent.count(),
        }
    }
}

impl StoreCount {
    /// As [`Store::push`] of so many tokens.
    pub fn push(&mut self, tokens: usize) {
        for _ in 0..tokens {
            match self.scheme {
                Scheme::F32 | Scheme::F16 | Scheme::F8 | Scheme::Sections => self.pack(),
                Scheme::Quant { residual: 0, axis: Axis::Token, .. } => self.pack(),
                Scheme::Quant { residual, axis: Axis::Token, .. } => {
                    if self.len - self.packed == residual {
                        self.pack();
                        self.recent.drop_before(self.packed / RECENT);
                    }
                    self.wait();
                }
                Scheme::Quant { residual, group, axis: Axis::Channel, .. } => {
                    self.wait();
                    if self.len + 1 - self.packed == residual + group {
                        self.pages.push();
                        self.packed += group;
                        self.recent.drop_before(self.packed / RECENT);
                    }
                }
            }
            self.len += 1;
        }
    }

    fn pack(&mut self) {
        if self.packed.is_multiple_of(self.tokens) {
            self.pages.push();
        }
        self.packed += 1;
    }

    fn wait(&mut self) {
        if self.len.is_multiple_of(RECENT) {
            self.recent.push();
        }
    }

    /// As [`Store::drop_before`].
    pub fn drop_before(&mut self, index: usize) {
        self.pages.drop_before(index.min(self.packed) / self.tokens);
    }

    /// As [`Store::can_truncate`].
    ///
    /// # Errors
    /// Why not.
    pub fn can_truncate(&self, len: usize) -> std::result::Result<(), &'static str> {
        can_truncate(self.scheme, self.packed, len)
    }

    /// As [`Store::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.packed = self.packed.min(len);
        self.pages.truncate(self.packed.div_ceil(self.tokens));
        self.recent.truncate(waiting_blocks(self.packed, self.len));
    }

    /// As [`Store::len`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token was pushed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// As [`Store::start`].
    pub fn start(&self) -> usize {
        (self.pages.first() * self.tokens).min(self.packed)
    }

    /// The blocks of packed tokens that are held, and those of tokens that wait.
    pub fn blocks(&self) -> [Range<usize>; 2] {
        [&self.pages, &self.recent].map(|pages| pages.first()..pages.first() + pages.held())
    }

    /// As [`Store::bytes`].
    pub fn bytes(&self) -> StoreBytes {
        let scales = self.pages.held() * self.scale_bytes;
        StoreBytes { codes: self.pages.bytes() - scales, scales, residual: self.recent.bytes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Side;

    #[test]
    fn a_count_weighs_what_a_store_weighs() {
        let quant = |axis, residual| Scheme::Quant { bits: 4, group: 32, axis, residual };
        let schemes = [
            Scheme::F16,
            quant(Axis::Channel, 40),
            quant(Axis::Channel, 0),
            quant(Axis::Token, 24),
            quant(Axis::Token, 0),
        ];
        for scheme in schemes {
            let mut stores = vec![Store::new(3, 40, scheme, Side::Keys)];
            let mut counts = vec![stores[0].count()];
            let alike = |stores: &[Store], counts: &[StoreCount]| {
                for (store, count) in stores.iter().zip(counts) {
                    assert_eq!(store.bytes(), count.bytes(), "{scheme:?}");
                    assert_eq!((store.len(), store.start()), (count.len(), count.start()), "{scheme:?}");
                }
            };
            for tokens in [1, 90, 7, 400, 1, 1] {
                stores.iter_mut().for_each(|s| s.push(&vec![0.5; tokens * 120]));
                counts.iter_mut().for_each(|c| c.push(tokens));
                alike(&stores, &counts);
                stores[0].drop_before(tokens);
                counts[0].drop_before(tokens);
                stores.push(stores[0].clone());
                counts.push(counts[0].clone());
                alike(&stores, &counts);
            }
            for len in [498, 460, 0] {
                let possible = stores[0].can_truncate(len);
                assert_eq!(possible, counts[0].can_truncate(len), "{scheme:?}");
                if possible.is_ok() {
                    stores[0].truncate(len);
                    counts[0].truncate(len);
                    alike(&stores, &counts);
                }
            }
        }
    }
}
