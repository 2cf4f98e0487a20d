//! Where a vector's channels lie in a block.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use minicache_config::Axis;

use super::Side;
use crate::kernels::{
    self, Dense, Float, Isa, LANES, Line, StepScales, Sums, Weights, get_code, put_lane, put_step,
    strip_bytes,
};

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
    pub(super) fn channel(&self, head: &[f16], channel: usize, out: &mut [f32]) {
        let at = self.index(0, channel);
        match self.side {
            Side::Keys => {
                for (strip, out) in out.chunks_mut(LANES).enumerate() {
                    head[at + strip * self.dim * LANES..][..out.len()].convert_to_f32_slice(out);
                }
            }
            Side::Values => {
                let width = self.index(1, channel) - at;
                out.iter_mut().zip(head[at..].iter().step_by(width)).for_each(|(out, x)| *out = x.to_f32());
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

/// A part of a head's codes that one kernel call covers.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Channels (keys) or tokens (values) that are summed over.
    pub(super) steps: usize,
    /// First channel of the tile.
    pub(super) channel: usize,
    pub(super) strips: usize,
    pub(super) width: usize,
    /// First byte of its codes.
    pub(super) codes: usize,
    /// The group of its first channel, and the first of its entries in the group's scales.
    pub(super) group: usize,
    pub(super) entry: usize,
}

/// One head's codes in a block of `slots` tokens: the strips of all tiles, then for each group an array of scales and
/// one of zeros, indexed by channel (`Axis::Channel`, one group) or by token (`Axis::Token`).
///
/// Keys have a tile for each group; values one of all full strips, and one of the narrow last strip if there is one.
pub(super) struct CodeBlock {
    pub(super) side: Side,
    /// The axis of the scales; none where codes stand for themselves.
    axis: Option<Axis>,
    pub(super) dim: usize,
    pub(super) slots: usize,
    pub(super) bits: u8,
    /// Channels that share a scale (`Axis::Token`); all of them otherwise, each with its own.
    pub(super) group: usize,
    pub(super) tiles: Vec<Tile>,
    code_bytes: usize,
}

impl CodeBlock {
    pub(super) fn new(
        side: Side,
        axis: Option<Axis>,
        dim: usize,
        slots: usize,
        bits: u8,
        group: usize,
    ) -> Self {
        let group = if axis == Some(Axis::Token) { group.min(dim) } else { dim };
        let mut tiles = Vec::new();
        let mut codes = 0;
        let mut add = |steps, channel, strips, width| {
            if strips * width > 0 {
                let entry = if side == Side::Values && axis == Some(Axis::Channel) { channel } else { 0 };
                tiles.push(Tile { steps, channel, strips, width, codes, group: channel / group, entry });
                codes += strips * strip_bytes(bits, steps, width);
            }
        };
        match side {
            Side::Keys => {
                for channel in (0..dim).step_by(group) {
                    add(group.min(dim - channel), channel, slots / LANES, LANES);
                }
            }
            Side::Values => {
                add(slots, 0, dim / LANES, LANES);
                add(slots, dim / LANES * LANES, 1, dim % LANES);
            }
        }
        Self { side, axis, dim, slots, bits, group, tiles, code_bytes: codes.next_multiple_of(2) }
    }

    /// Whether a scale belongs to a step (and goes into its weight) or to a lane (and multiplies its sum).
    pub(super) fn scale_of_step(&self) -> bool {
        self.axis.is_some_and(|axis| (self.side == Side::Keys) == (axis == Axis::Channel))
    }

    /// Whether codes have scales and zeros.
    pub(super) fn scaled(&self) -> bool {
        self.axis.is_some()
    }

    fn scales_per_group(&self) -> usize {
        match self.axis {
            None => 0,
            Some(Axis::Channel) => self.dim,
            Some(Axis::Token) => self.slots,
        }
    }

    pub(super) fn groups(&self) -> usize {
        self.dim.div_ceil(self.group)
    }

    /// Bytes of one head's codes, and of its scales and zeros.
    pub(super) fn head_bytes(&self) -> (usize, usize) {
        (self.code_bytes, self.groups() * self.scales_per_group() * 4)
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

    /// The scales and the zeros of a tile's lanes.
    pub(super) fn lane_scales<'a>(&self, head: &'a [f16], tile: &Tile) -> (&'a [f16], &'a [f16]) {
        let n = self.scales_per_group();
        let at = self.code_bytes / 2 + tile.group * 2 * n + tile.entry;
        (&head[at..at + n - tile.entry], &head[at + n..at + 2 * n - tile.entry])
    }

    /// The scales and zeros of the steps, a set for each group.
    pub(super) fn step_scales<'a>(&self, head: &'a [f16]) -> StepScales<'a> {
        let (count, sets) = (self.scales_per_group(), self.groups());
        StepScales { data: &head[self.code_bytes / 2..][..sets * 2 * count], count, sets }
    }

    /// Where the scale of (slot, channel) is in the head's f16 view; its zero is the second index.
    pub(super) fn scale_index(&self, slot: usize, channel: usize) -> (usize, usize) {
        let n = self.scales_per_group();
        let entry = if self.axis == Some(Axis::Channel) { channel } else { slot };
        let at = self.code_bytes / 2 + channel / self.group * 2 * n + entry;
        (at, at + n)
    }

    /// The strip of (slot, channel): its first byte, its shape, and step and lane in it.
    fn strip(&self, slot: usize, channel: usize) -> (usize, (usize, usize), (usize, usize)) {
        match self.side {
            Side::Keys => {
                let first = channel / self.group * self.group;
                let steps = self.group.min(self.dim - first);
                let before =
                    channel / self.group * (self.slots / LANES) * strip_bytes(self.bits, self.group, LANES);
                let at = before + slot / LANES * strip_bytes(self.bits, steps, LANES);
                (at, (steps, LANES), (channel - first, slot % LANES))
            }
            Side::Values => {
                let strip = channel / LANES;
                let width = LANES.min(self.dim - strip * LANES);
                let at = strip * strip_bytes(self.bits, self.slots, LANES);
                (at, (self.slots, width), (slot, channel % LANES))
            }
        }
    }

    /// Writes the codes of a slot, one for each channel, into the head's bytes.
    pub(super) fn put_slot(&self, head: &mut [u8], slot: usize, codes: &[u8]) {
        let run = if self.side == Side::Keys { self.group } else { LANES };
        for (i, codes) in codes.chunks(run).enumerate() {
            let (at, shape, (step, lane)) = self.strip(slot, i * run);
            match self.side {
                Side::Keys => put_lane(&mut head[at..], self.bits, shape, lane, codes),
                Side::Values => put_step(&mut head[at..], self.bits, shape.0, step, codes),
            }
        }
    }

    /// Writes the codes of a channel, one for each slot, into the head's bytes.
    pub(super) fn put_channel(&self, head: &mut [u8], channel: usize, codes: &[u8]) {
        let run = if self.side == Side::Keys { LANES } else { self.slots };
        for (i, codes) in codes.chunks(run).enumerate() {
            let (at, shape, (step, lane)) = self.strip(i * run, channel);
            match self.side {
                Side::Keys => put_step(&mut head[at..], self.bits, shape.0, step, codes),
                Side::Values => put_lane(&mut head[at..], self.bits, shape, lane, codes),
            }
        }
    }

    /// Reads one code from the head's bytes.
    pub(super) fn get(&self, head: &[u8], slot: usize, channel: usize) -> u8 {
        let (at, shape, place) = self.strip(slot, channel);
        get_code(&head[at..], self.bits, shape, place)
    }

    /// Channels of a group, cut at the head's end.
    pub(super) fn group_channels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (group, dim) = (self.group, self.dim);
        (0..dim).step_by(group).map(move |c| c..(c + group).min(dim))
    }
}
