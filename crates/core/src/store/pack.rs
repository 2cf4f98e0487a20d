//! How tokens come into a store: as floats, or, when as many wait as have to, as codes.

use std::cell::RefCell;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::grid::Grid;
use super::layout::{FloatBlock, Scaling};
use super::{Block, RECENT, Scheme, Store, at_least, head_view, lloyd, normal, trellis};
use crate::kernels::f8::F8;
use crate::kernels::{Float, Line, view_mut};
use crate::scratch::with_buffer;
use crate::settings::{Axis, StoreType};

thread_local! {
    static PACKING: RefCell<Packing> = RefCell::default();
}

/// Working memory of a thread that packs.
#[derive(Default)]
struct Packing {
    halves: Vec<f16>,
    eighths: Vec<F8>,
    floats: Vec<f32>,
    codes: Vec<u8>,
    trellis: trellis::Room,
}

impl Store {
    /// Appends tokens: `rows` is `(tokens, heads, dim)`.
    ///
    /// # Panics
    /// A length that is no multiple of `heads * dim`.
    pub fn push(&mut self, rows: &[f32]) {
        let size = self.heads * self.dim;
        assert_eq!(rows.len() % size.max(1), 0, "rows of {size} numbers, not {}", rows.len());
        for row in rows.chunks_exact(size) {
            match self.scheme {
                Scheme::F32 | Scheme::F16 | Scheme::F8 => self.push_floats(row),
                Scheme::Sections => {
                    PACKING.with_borrow_mut(|p| self.pack_sections(row, p));
                    self.len += 1;
                }
                Scheme::Quant { residual, axis: Axis::Token, .. } => {
                    if residual == 0 {
                        PACKING.with_borrow_mut(|p| {
                            let row = match self.waits {
                                StoreType::F32 => row,
                                StoreType::F16 => {
                                    rounded(row, &mut p.halves);
                                    at_least(&mut p.floats, size);
                                    p.halves.convert_to_f32_slice(&mut p.floats[..size]);
                                    &p.floats[..size]
                                }
                            };
                            self.pack_token(row, &mut p.codes);
                        });
                    } else {
                        if self.len - self.packed == residual {
                            self.pack_oldest_token();
                        }
                        self.keep(row);
                    }
                    self.len += 1;
                }
                Scheme::Quant { residual, group, axis: Axis::Channel, .. } => {
                    self.keep(row);
                    self.len += 1;
                    if self.len - self.packed == residual + group {
                        self.pack_block();
                    }
                }
            }
        }
    }

    /// Writes the vectors of the token at index `from` over those at `to`, both held, of a store of floats.
    pub(crate) fn copy_within(&mut self, from: usize, to: usize) {
        with_buffer(self.heads * self.dim, |row| {
            row.chunks_exact_mut(self.dim).enumerate().for_each(|(head, x)| self.read(head, from, x));
            self.write_floats(to, row);
        });
    }

    fn push_floats(&mut self, row: &[f32]) {
        if self.len.is_multiple_of(self.block_tokens()) {
            self.pages.push();
        }
        self.write_floats(self.len, row);
        self.len += 1;
        self.packed = self.len;
    }

    /// Writes a token into its slot, for which there is a block.
    fn write_floats(&mut self, index: usize, row: &[f32]) {
        let (Block::F32(block) | Block::F16(block) | Block::F8(block)) = self.block else {
            panic!("codes are written otherwise");
        };
        let (lines, slot) = (self.pages.block_mut(index / block.slots), index % block.slots);
        PACKING.with_borrow_mut(|p| match self.scheme {
            Scheme::F16 => {
                rounded(row, &mut p.halves);
                write_token(lines, block, slot, &p.halves);
            }
            Scheme::F8 => {
                rounded(row, &mut p.eighths);
                write_token(lines, block, slot, &p.eighths);
            }
            _ => write_token(lines, block, slot, row),
        });
    }

    /// Appends the next token to those that wait.
    fn keep(&mut self, row: &[f32]) {
        let slot = self.len % RECENT;
        if slot == 0 {
            self.recent.push();
        }
        let block = self.waiting();
        let lines = self.recent.block_mut(self.len / RECENT);
        match self.waits {
            StoreType::F32 => write_token(lines, block, slot, row),
            StoreType::F16 => PACKING.with_borrow_mut(|p| {
                rounded(row, &mut p.halves);
                write_token(lines, block, slot, &p.halves);
            }),
        }
    }

    /// Moves the oldest token that waits into the codes.
    fn pack_oldest_token(&mut self) {
        let slot = self.packed % RECENT;
        PACKING.with_borrow_mut(|p| {
            at_least(&mut p.floats, self.heads * self.dim);
            let x = &mut p.floats[..self.heads * self.dim];
            let lines = self.recent.block(self.packed / RECENT);
            for (head, x) in x.chunks_exact_mut(self.dim).enumerate() {
                self.read_waiting(lines, head, slot, x);
            }
            self.pack_token(x, &mut p.codes);
        });
        self.recent.drop_before(self.packed / RECENT);
    }

    /// Quantises one token `(heads, dim)` along its channels.
    fn pack_token(&mut self, x: &[f32], codes: &mut Vec<u8>) {
        self.pack_slot(x, codes, |x, bits, codes| {
            let grid = Grid::of(x, bits);
            grid.codes(x, codes);
            (grid.scale, grid.zero)
        });
    }

    /// Quantises one token section by section, around zero.
    fn pack_sections(&mut self, x: &[f32], packing: &mut Packing) {
        let Block::Codes(block) = &self.block else { return };
        let block = block.clone();
        let Packing { codes, trellis: room, .. } = packing;
        self.pack_slot(x, codes, |x, bits, codes| {
            let scale = match block.levels(bits) {
                None => normal::quantise(x, bits, codes),
                Some(table) if block.scaling == Scaling::Levels => lloyd::quantise(x, table, codes),
                Some(table) => trellis::quantise(x, block.chain(x.len()), table, room, codes),
            };
            (scale, scale)
        });
    }

    /// Appends a token to the codes; `quantise(numbers, bits, codes)` returns scale and zero.
    fn pack_slot(
        &mut self,
        x: &[f32],
        codes: &mut Vec<u8>,
        mut quantise: impl FnMut(&[f32], u8, &mut [u8]) -> (f16, f16),
    ) {
        let Block::Codes(block) = &self.block else { return };
        let slot = self.packed % block.slots;
        if slot == 0 {
            self.pages.push();
        }
        at_least(codes, block.dim);
        let lines = self.pages.block_mut(self.packed / block.slots);
        let heads = lines.chunks_exact_mut(block.head_lines());
        for (lines, x) in heads.zip(x.chunks_exact(block.dim)) {
            for (i, section) in block.sections.iter().enumerate() {
                let codes = &mut codes[..section.channels.len()];
                let pair = quantise(&x[section.channels.clone()], section.bits, codes);
                block.put_scale(lines, slot, (i, section.channels.start), pair);
                block.put_slot(view_mut(lines), slot, section, codes);
            }
        }
        self.packed += 1;
    }

    /// Quantises the oldest group of the tokens that wait along tokens, channel by channel.
    fn pack_block(&mut self) {
        let waiting = self.waiting();
        let Block::Codes(block) = &self.block else { return };
        self.pages.push();
        let lines = self.pages.block_mut(self.packed / block.slots);
        let section = &block.sections[0];
        PACKING.with_borrow_mut(|p| {
            at_least(&mut p.floats, block.slots);
            at_least(&mut p.codes, block.slots);
            let (x, codes) = (&mut p.floats[..block.slots], &mut p.codes[..block.slots]);
            for (head, lines) in lines.chunks_exact_mut(block.head_lines()).enumerate() {
                for channel in 0..block.dim {
                    for (part, x) in x.chunks_exact_mut(RECENT).enumerate() {
                        let from = self.recent.block(self.packed / RECENT + part);
                        match self.waits {
                            StoreType::F16 => {
                                waiting.channel(head_view::<f16>(from, waiting, head), channel, x)
                            }
                            StoreType::F32 => {
                                waiting.channel(head_view::<f32>(from, waiting, head), channel, x)
                            }
                        }
                    }
                    let grid = Grid::of(x, section.bits);
                    block.put_scale(lines, 0, (0, channel), (grid.scale, grid.zero));
                    grid.codes(x, codes);
                    block.put_channel(view_mut(lines), section, channel, codes);
                }
            }
        });
        self.packed += block.slots;
        self.recent.drop_before(self.packed / RECENT);
    }
}

/// A row rounded to what is stored.
fn rounded<T: Float>(row: &[f32], out: &mut Vec<T>) {
    out.clear();
    out.resize(row.len(), T::default());
    T::round(row, out);
}

/// Writes a token `(heads, dim)` into a slot of a block of floats.
fn write_token<T: Float>(lines: &mut [Line], block: FloatBlock, slot: usize, row: &[T]) {
    let heads = lines.chunks_exact_mut(block.head_lines::<T>());
    for (lines, row) in heads.zip(row.chunks_exact(block.dim)) {
        block.put(view_mut::<T>(lines), slot, row);
    }
}
