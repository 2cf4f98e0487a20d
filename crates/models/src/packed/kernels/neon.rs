//! NEON: `smull`/`smlal` multiply signed bytes into 16 bits, `sadalp` adds pairs into 32.
//!
//! 4-bit codes are used as they are (at most 15), 8-bit codes are made signed first. Two products of a byte with
//! an activation stay within 16 bits: 2 * 128 * 127 = 32,512.

use std::arch::aarch64::*;

use super::{Kernel, Panel, Tile};
use crate::packed::activations::ActivationBlock;
use crate::packed::layout::{Layout, Line, PANEL, Scales};

/// Four registers of four output rows make a panel.
const QUARTERS: usize = PANEL / 4;

pub(in crate::packed) struct Neon;

impl Kernel for Neon {
    const PANELS: usize = 1;

    unsafe fn tile<L: Layout, const R: usize, const P: usize>(
        panels: [Panel<'_>; P],
        x: [&[ActivationBlock]; R],
        blocks: usize,
    ) -> Tile<R, P> {
        let mut out = [[[0.0; PANEL]; P]; R];
        for (p, panel) in panels.into_iter().enumerate() {
            // SAFETY: NEON is part of the base architecture.
            let rows = unsafe { panel_tile::<L, R>(panel, x, blocks) };
            for (out, row) in out.iter_mut().zip(rows) {
                out[p] = row;
            }
        }
        out
    }
}

/// Four inputs of four output rows.
#[inline]
#[target_feature(enable = "neon")]
fn load_quarter(line: &Line, quarter: usize) -> uint8x16_t {
    let (quarters, _) = line.0.as_chunks::<16>();
    // SAFETY: a quarter of a line is 16 bytes.
    unsafe { vld1q_u8(quarters[quarter].as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_scales(scales: &Scales) -> [float32x4_t; QUARTERS] {
    let floats = scales.0.map(half::f16::to_f32);
    let (quarters, _) = floats.as_chunks::<4>();
    // SAFETY: every quarter is four floats.
    std::array::from_fn(|i| unsafe { vld1q_f32(quarters[i].as_ptr()) })
}

/// Four activations, for every output row.
#[inline]
#[target_feature(enable = "neon")]
fn broadcast4(x: &ActivationBlock, g: usize) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(x.four(g)))
}

/// Adds `a x + b y`, summed over the four inputs of each output row, to `sums`, which holds two partial sums for
/// each of the four rows: rows 0 and 1 in the first register, rows 2 and 3 in the second.
#[inline]
#[target_feature(enable = "neon")]
fn add_products(
    sums: [int32x4_t; 2],
    a: int8x16_t,
    x: int8x16_t,
    b: int8x16_t,
    y: int8x16_t,
) -> [int32x4_t; 2] {
    let low = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(x)), vget_low_s8(b), vget_low_s8(y));
    let high = vmlal_high_s8(vmull_high_s8(a, x), b, y);
    [vpadalq_s16(sums[0], low), vpadalq_s16(sums[1], high)]
}

#[target_feature(enable = "neon")]
fn panel_tile<L: Layout, const R: usize>(
    panel: Panel<'_>,
    x: [&[ActivationBlock]; R],
    blocks: usize,
) -> [[f32; PANEL]; R] {
    let lines = &panel.lines[..blocks * L::LINES];
    let scales = &panel.scales[..blocks * L::SCALES];
    let x: [&[ActivationBlock]; R] = std::array::from_fn(|r| &x[r][..blocks]);

    let nibble = vdupq_n_u8(0xf);
    let sign_bit = vdupq_n_u8(0x80);
    let mut sums = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for b in 0..blocks {
        let d = load_scales(&scales[b * L::SCALES]);
        let block = &lines[b * L::LINES..(b + 1) * L::LINES];
        for quarter in 0..QUARTERS {
            let mut dots = [[vdupq_n_s32(0); 2]; R];
            if L::NIBBLES {
                for (g, line) in block.iter().enumerate() {
                    let codes = load_quarter(line, quarter);
                    let low = vreinterpretq_s8_u8(vandq_u8(codes, nibble));
                    let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(codes));
                    for r in 0..R {
                        let x = &x[r][b];
                        let (x_low, x_high) = (broadcast4(x, g), broadcast4(x, 4 + g));
                        dots[r] = add_products(dots[r], low, x_low, high, x_high);
                    }
                }
            } else {
                for (g, pair) in block.chunks_exact(2).enumerate() {
                    let [first, second] = [&pair[0], &pair[1]]
                        .map(|line| vreinterpretq_s8_u8(veorq_u8(load_quarter(line, quarter), sign_bit)));
                    for r in 0..R {
                        let x = &x[r][b];
                        let (x_first, x_second) = (broadcast4(x, 2 * g), broadcast4(x, 2 * g + 1));
                        dots[r] = add_products(dots[r], first, x_first, second, x_second);
                    }
                }
            }
            for r in 0..R {
                let mut dot = vpaddq_s32(dots[r][0], dots[r][1]);
                if L::NIBBLES {
                    // The bytes of 8-bit codes were made signed above, which takes their zero code off.
                    dot = vaddq_s32(dot, vdupq_n_s32(L::ZERO * x[r][b].negative_sum));
                }
                let dot = vmulq_n_f32(vcvtq_f32_s32(dot), x[r][b].scale);
                sums[r][quarter] = vfmaq_f32(sums[r][quarter], dot, d[quarter]);
            }
        }
        if L::MINIMUM {
            let m = load_scales(&scales[b * L::SCALES + 1]);
            for r in 0..R {
                for quarter in 0..QUARTERS {
                    sums[r][quarter] = vfmaq_n_f32(sums[r][quarter], m[quarter], x[r][b].weighted_sum);
                }
            }
        }
    }

    let mut out = [[0.0; PANEL]; R];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (quarter, sum) in sums.into_iter().enumerate() {
            // SAFETY: four floats are 16 bytes, and `out` has four times four.
            unsafe { vst1q_f32(out[4 * quarter..4 * quarter + 4].as_mut_ptr(), sum) };
        }
    }
    out
}
