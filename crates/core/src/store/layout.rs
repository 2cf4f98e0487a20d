//! Where a vector's channels lie in a block.

use std::borrow::Cow;
use std::ops::Range;

use super::trellis::{Levels, MIDDLE};
use super::{Side, normal};
use crate::kernels::{
    self, Dense, Float, Isa, LANES, Line, StepScales, Sums, Trellis, WINDOW, Weights, get_code, put_lane,
    put_step, strip_bytes, view, view_mut,
};
use half::f16;

/// One head's floats in a block of `slots` tokens. Keys: strips of 16 tokens, a step per channel (`slots` is a
/// multiple of 16). Values: strips of 16 channels, the last narrower if 16 does not divide `dim`, a step per token.
#[derive(Clone, Copy)]
pub(super) struct FloatBlock {
    pub(super) side: Side,
    pub(super) dim: usize,
    pub(super) slots: usize,
}

impl FloatBlock {
    /// Lines of one head.
    pub(super) fn head_lines<T>(&self) -> usize {
        Line::count(self.dim * self.slots * size_of::<T>())
    }

    pub(super) fn index(&self, slot: usize, channel: usize) -> usize {
        match self.side {
            Side::Keys => (slot / LANES * self.dim + channel) * LANES + slot % LANES,
            Side::Values => {
                let first = channel / LANES * LANES;
                let width = LANES.min(self.dim - first);
                first * self.slots + slot * width + channel % LANES
            }
        }
    }

    /// Writes the vector of one slot.
    pub(super) fn put<T: Float>(&self, head: &mut [T], slot: usize, x: &[T]) {
        let run = if self.side == Side::Keys { 1 } else { LANES };
        for (i, x) in x.chunks(run).enumerate() {
            let at = self.index(slot, i * run);
            head[at..at + x.len()].copy_from_slice(x);
        }
    }

    /// One channel of every slot.
    pub(super) fn channel<T: Float>(&self, head: &[T], channel: usize, out: &mut [f32]) {
        let at = self.index(0, channel);
        match self.side {
            Side::Keys => {
                for (strip, out) in out.chunks_mut(LANES).enumerate() {
                    T::widen(&head[at + strip * self.dim * LANES..][..out.len()], out);
                }
            }
            Side::Values => {
                let width = self.index(1, channel) - at;
                out.iter_mut().zip(head[at..].iter().step_by(width)).for_each(|(out, x)| *out = x.get());
            }
        }
    }

    /// Keys: `out` gets the scores of the strips `strips` (16 tokens each) under the queries `w`.
    pub(super) fn scores<T: Float>(
        &self,
        isa: Isa,
        (x, next): (&[T], &[T]),
        strips: Range<usize>,
        w: Weights,
        out: Sums,
    ) {
        let stride = self.dim * LANES;
        let x = &x[strips.start * stride..strips.end * stride];
        let m = Dense { x, strips: strips.len(), stride, width: LANES, steps: self.dim, next };
        kernels::dense(isa, m, w, out);
    }

    /// Values: `out` gets the sum of the tokens `slots` weighed by `w`, which starts with the first of them.
    pub(super) fn sums<T: Float>(
        &self,
        isa: Isa,
        (x, next): (&[T], &[T]),
        slots: Range<usize>,
        w: Weights,
        out: Sums,
    ) {
        let full = self.dim / LANES;
        let stride = self.slots * LANES;
        let steps = slots.len();
        let Sums { y, stride: y_stride } = out;
        if full > 0 {
            let m = Dense { x: &x[slots.start * LANES..], strips: full, stride, width: LANES, steps, next };
            kernels::dense(isa, m, w, Sums { y, stride: y_stride });
        }
        let width = self.dim % LANES;
        if width > 0 {
            let x = &x[full * stride + slots.start * width..];
            let m = Dense { x, strips: 1, stride: 0, width, steps, next: &[] };
            kernels::dense(isa, m, w, Sums { y: &mut y[full * LANES..], stride: y_stride });
        }
    }
}

/// Consecutive channels with the same number of bits, and scales of their own.
pub(super) struct Section {
    pub(super) channels: Range<usize>,
    pub(super) bits: u8,
    /// First byte of its codes.
    pub(super) codes: usize,
}

/// A part of a head's codes that one kernel call covers.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) bits: u8,
    /// Channels (keys) or tokens (values) that are summed over.
    pub(super) steps: usize,
    /// First channel of the tile.
    pub(super) channel: usize,
    pub(super) strips: usize,
    pub(super) width: usize,
    /// Strips of one section.
    pub(super) per_section: usize,
    /// First byte of its codes.
    pub(super) codes: usize,
    /// The section of its first channel, and the first of its entries in the section's scales.
    pub(super) section: usize,
    pub(super) entry: usize,
}

/// How a block's codes are scaled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scaling {
    /// A scale and a zero per channel, for all tokens of the block.
    Channels,
    /// A scale and a zero per token and section.
    Tokens,
    /// A byte of scale per token and section ([`normal::scale`]); zero is in the middle of the codes.
    Centred,
    /// Likewise, with codes of a trellis where there are tables for their bits.
    Trellis,
    /// An f16 of scale per token and section, and a level of its own for each code.
    Levels,
}

impl Scaling {
    /// Whether scales are bytes, and zero is where it is.
    pub(super) fn is_centred(self) -> bool {
        matches!(self, Scaling::Centred | Scaling::Trellis)
    }
}

/// One head's codes in a block of `slots` tokens: the strips of all sections, then for each section an array of scales
/// and, where there are some, one of zeros, indexed by channel ([`Scaling::Channels`], one section) or by token.
///
/// Keys have a tile for each section. Values have one for all full strips of equal sections in a row, and one for the
/// narrow last strip of a section if there is one.
pub(super) struct CodeBlock {
    pub(super) side: Side,
    pub(super) scaling: Scaling,
    pub(super) dim: usize,
    pub(super) slots: usize,
    pub(super) sections: Vec<Section>,
    pub(super) tiles: Vec<Tile>,
    /// What codes stand for, by bits; of the others, steps as wide as the scale.
    tables: Cow<'static, [Levels]>,
    code_bytes: usize,
}

impl CodeBlock {
    /// `sections` lists bits and channels.
    pub(super) fn new(
        side: Side,
        scaling: Scaling,
        slots: usize,
        sections: impl Iterator<Item = (u8, usize)>,
        tables: Cow<'static, [Levels]>,
    ) -> Self {
        let (sections_of, tiles) = (Vec::new(), Vec::new());
        let mut block =
            Self { side, scaling, dim: 0, slots, sections: sections_of, tiles, tables, code_bytes: 0 };
        sections.filter(|s| s.1 > 0).for_each(|(bits, channels)| block.add(bits, channels));
        block.code_bytes = block.code_bytes.next_multiple_of(2);
        block
    }

    fn add(&mut self, bits: u8, channels: usize) {
        let (section, codes) = (self.sections.len(), self.code_bytes);
        let entry = 0;
        self.sections.push(Section { channels: self.dim..self.dim + channels, bits, codes });
        let tile = |channel, steps, strips, width, codes| Tile {
            bits,
            steps,
            channel,
            strips,
            width,
            per_section: strips,
            codes,
            section,
            entry,
        };
        let full = channels / LANES;
        match self.side {
            Side::Keys => {
                let strips = self.slots / LANES;
                self.tiles.push(tile(self.dim, channels, strips, LANES, codes));
                self.code_bytes += strips * strip_bytes(bits, channels, LANES);
            }
            Side::Values => {
                match self.tiles.last_mut() {
                    Some(last)
                        if last.bits == bits
                            && last.width == LANES
                            && last.strips % last.per_section == 0
                            && full <= last.per_section =>
                    {
                        last.strips += full;
                    }
                    _ if full > 0 => self.tiles.push(tile(self.dim, self.slots, full, LANES, codes)),
                    _ => {}
                }
                self.code_bytes += full * strip_bytes(bits, self.slots, LANES);
                let narrow = channels % LANES;
                if narrow > 0 {
                    let channel = self.dim + full * LANES;
                    let entry = if self.scaling == Scaling::Channels { full * LANES } else { 0 };
                    let last = Tile { entry, ..tile(channel, self.slots, 1, narrow, self.code_bytes) };
                    self.tiles.push(last);
                    self.code_bytes += strip_bytes(bits, self.slots, narrow);
                }
            }
        }
        self.dim += channels;
    }

    /// Whether a scale belongs to a step (and goes into its weight) or to a lane (and multiplies its sum).
    pub(super) fn scale_of_step(&self) -> bool {
        (self.side == Side::Keys) == (self.scaling == Scaling::Channels)
    }

    /// Whether zeros are stored, or are in the middle of the codes.
    fn has_zeros(&self) -> bool {
        matches!(self.scaling, Scaling::Channels | Scaling::Tokens)
    }

    /// The levels that codes of so many bits stand for, where there is a table.
    pub(super) fn levels(&self, bits: u8) -> Option<&Levels> {
        self.tables.iter().find(|table| table.bits == bits)
    }

    /// The first so many of `channels` channels of a section follow each other, and so do the rest: the last strip of
    /// values may be a tile of its own.
    pub(super) fn chain(&self, channels: usize) -> usize {
        if self.side == Side::Keys { channels } else { channels / LANES * LANES }
    }

    /// What a tile's codes stand for, where there is a table.
    pub(super) fn trellis(&self, tile: &Tile) -> Option<Trellis<'_>> {
        let along_lanes = self.side == Side::Values;
        self.levels(tile.bits).map(|table| Trellis { levels: &table.levels, along_lanes })
    }

    fn scales_per_section(&self) -> usize {
        if self.scaling == Scaling::Channels { self.dim } else { self.slots }
    }

    /// From the scales of a section to its zeros.
    fn to_zero(&self) -> usize {
        if self.has_zeros() { self.scales_per_section() } else { 0 }
    }

    fn section_floats(&self) -> usize {
        self.to_zero() + self.scales_per_section()
    }

    /// How many times the stored zero the zero of a section is; of centred codes, how many times their scale.
    pub(super) fn zero_weight(&self, section: usize) -> f32 {
        let bits = self.sections[section].bits;
        match self.levels(bits) {
            _ if self.has_zeros() => 1.0,
            None => -normal::middle(bits),
            Some(_) => -f32::from(MIDDLE),
        }
    }

    /// Bytes of one head's codes, and of its scales and zeros.
    pub(super) fn head_bytes(&self) -> (usize, usize) {
        let sections = self.sections.len();
        if self.scaling.is_centred() {
            return (self.code_bytes, sections * self.slots);
        }
        (self.code_bytes, sections * self.section_floats() * size_of::<f16>())
    }

    /// Lines of one head.
    pub(super) fn head_lines(&self) -> usize {
        let (codes, scales) = self.head_bytes();
        Line::count(codes + scales)
    }

    /// The lines of a head that hold its scales and zeros.
    pub(super) fn scale_lines(&self) -> Range<usize> {
        self.code_bytes / Line::BYTES..self.head_lines()
    }

    /// The scales and the zeros of a tile's lanes, unless they are centred.
    pub(super) fn lane_scales<'a>(&self, head: &'a [f16], tile: &Tile) -> (&'a [f16], &'a [f16]) {
        let at = self.code_bytes / 2 + tile.section * self.section_floats() + tile.entry;
        let n = self.scales_per_section() - tile.entry;
        (&head[at..at + n], &head[at + self.to_zero()..][..n])
    }

    /// The scales and zeros of the steps, a set for each section, unless they are centred.
    pub(super) fn step_scales<'a>(&self, head: &'a [f16]) -> StepScales<'a> {
        let (sets, stride) = (self.sections.len(), self.section_floats());
        let data = &head[self.code_bytes / 2..][..sets * stride];
        StepScales { data, sets, stride, to_zero: self.to_zero() }
    }

    /// The scales of centred codes of several blocks, `block_bytes` apart, by section, then token.
    pub(super) fn centred_scales(&self, bytes: &[u8], block_bytes: usize, out: &mut [f16]) {
        let blocks = bytes.len() / block_bytes;
        for (section, out) in out.chunks_exact_mut(blocks * self.slots).take(self.sections.len()).enumerate()
        {
            for (bytes, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(self.slots)) {
                let from = &bytes[self.code_bytes + section * self.slots..][..self.slots];
                // Of a length that the compiler knows.
                let (out, _) = out.as_chunks_mut::<LANES>();
                let (from, _) = from.as_chunks::<LANES>();
                for (out, from) in out.iter_mut().zip(from) {
                    *out = from.map(normal::scale);
                }
            }
        }
    }

    /// Where the scale of (slot, first channel of a section, or channel) is in the head's f16 view, and its zero.
    fn scale_index(&self, slot: usize, section: usize, channel: usize) -> (usize, usize) {
        let entry = if self.scaling == Scaling::Channels { channel } else { slot };
        let at = self.code_bytes / 2 + section * self.section_floats() + entry;
        (at, at + self.to_zero())
    }

    /// Writes scale and zero of (slot, first channel of a section, or channel) into a head's lines.
    pub(super) fn put_scale(&self, head: &mut [Line], slot: usize, place: (usize, usize), pair: (f16, f16)) {
        let (section, channel) = place;
        if self.scaling.is_centred() {
            view_mut::<u8>(head)[self.code_bytes + section * self.slots + slot] = normal::scale_byte(pair.0);
            return;
        }
        let (scale, zero) = self.scale_index(slot, section, channel);
        let floats = view_mut::<f16>(head);
        floats[zero] = pair.1;
        floats[scale] = pair.0;
    }

    /// Makes the scales of the slots from `from` on what they are in a new block, where each slot has its own.
    pub(super) fn clear_scales(&self, head: &mut [Line], from: usize) {
        for section in 0..self.sections.len() {
            if self.scaling.is_centred() {
                let at = self.code_bytes + section * self.slots;
                view_mut::<u8>(head)[at + from..at + self.slots].fill(0);
            } else {
                let (scale, zero) = self.scale_index(0, section, 0);
                let floats = view_mut::<f16>(head);
                floats[scale + from..scale + self.slots].fill(f16::ZERO);
                floats[zero + from..zero + self.slots].fill(f16::ZERO);
            }
        }
    }

    /// Scale and zero of (slot, first channel of a section, or channel).
    pub(super) fn scale(&self, head: &[Line], slot: usize, (section, channel): (usize, usize)) -> (f16, f32) {
        let scale = if self.scaling.is_centred() {
            normal::scale(view::<u8>(head)[self.code_bytes + section * self.slots + slot])
        } else {
            let (scale, zero) = self.scale_index(slot, section, channel);
            let floats = view::<f16>(head);
            if self.has_zeros() {
                return (floats[scale], floats[zero].to_f32());
            }
            floats[scale]
        };
        (scale, self.zero_weight(section) * scale.to_f32())
    }

    /// The strip of a slot and a channel of a section: its first byte, its shape, and step and lane in it.
    fn strip(
        &self,
        section: &Section,
        slot: usize,
        channel: usize,
    ) -> (usize, (usize, usize), (usize, usize)) {
        let (len, place) = (section.channels.len(), channel - section.channels.start);
        match self.side {
            Side::Keys => {
                let at = section.codes + slot / LANES * strip_bytes(section.bits, len, LANES);
                (at, (len, LANES), (place, slot % LANES))
            }
            Side::Values => {
                let strip = place / LANES;
                let at = section.codes + strip * strip_bytes(section.bits, self.slots, LANES);
                (at, (self.slots, LANES.min(len - strip * LANES)), (slot, place % LANES))
            }
        }
    }

    /// Writes the codes of a slot and a section, one for each channel, into the head's bytes.
    pub(super) fn put_slot(&self, head: &mut [u8], slot: usize, section: &Section, codes: &[u8]) {
        let run = if self.side == Side::Keys { codes.len() } else { LANES };
        for (i, codes) in codes.chunks(run).enumerate() {
            let (at, shape, (step, lane)) = self.strip(section, slot, section.channels.start + i * run);
            match self.side {
                Side::Keys => put_lane(&mut head[at..], section.bits, shape, lane, codes),
                Side::Values => put_step(&mut head[at..], section.bits, shape.0, step, codes),
            }
        }
    }

    /// Writes the codes of a channel, one for each slot, into the head's bytes.
    pub(super) fn put_channel(&self, head: &mut [u8], section: &Section, channel: usize, codes: &[u8]) {
        let run = if self.side == Side::Keys { LANES } else { self.slots };
        for (i, codes) in codes.chunks(run).enumerate() {
            let (at, shape, (step, lane)) = self.strip(section, i * run, channel);
            match self.side {
                Side::Keys => put_step(&mut head[at..], section.bits, shape.0, step, codes),
                Side::Values => put_lane(&mut head[at..], section.bits, shape, lane, codes),
            }
        }
    }

    /// Reads one code, or the level that it stands for, from the head's bytes.
    pub(super) fn get(&self, head: &[u8], section: &Section, slot: usize, channel: usize) -> u8 {
        let code = |channel: usize| {
            let (at, shape, place) = self.strip(section, slot, channel);
            get_code(&head[at..], section.bits, shape, place)
        };
        let Some(table) = self.levels(section.bits) else { return code(channel) };
        let (start, end) = (section.channels.start, self.chain(section.channels.len()));
        let first = if channel - start < end { start } else { start + end };
        let last = WINDOW / usize::from(section.bits);
        let codes = (first.max((channel + 1).saturating_sub(last))..=channel).map(code);
        table.levels[codes.fold(0, |window, code| window << section.bits | usize::from(code))]
    }
}
