//! The kernels for NEON with the dot product extension: a strip is four registers wide.

// Register tiles: indices are constants after unrolling, and one index reads several arrays.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::f8::{F8, OF_HALF};
use super::lines::prefetch_line;
use super::scalar;
use super::{Codes, Dense, Digits, Factor, LANES, Precision, ROWS, StepScales, Sums, Weights, padded};

/// Registers of a strip, and lanes of each.
const PARTS: usize = 4;
const PART: usize = 4;

/// Four f16 as f32. (The intrinsic needs an unstable type.)
///
/// # Safety
/// `p` points to 4 numbers.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_f16(p: *const f16) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the caller's promise; the instruction reads and writes registers only.
    unsafe {
        let half: uint16x4_t = vld1_u16(p.cast());
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) half, options(pure, nomem, nostack));
    }
    wide
}

/// # Safety
/// `p` points to 4 numbers.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_f32(p: *const f32) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vld1q_f32(p) }
}

/// Defines the kernel for strips of `$type`, loaded as 4 f32 by `$load`.
macro_rules! dense {
    ($name:ident, $type:ty, $load:ident) => {
        /// See [`super::dense`], which has checked all bounds.
        #[target_feature(enable = "neon,dotprod")]
        pub(super) fn $name(m: Dense<$type>, w: Weights, out: Sums) {
            /// `R` rows of one strip.
            ///
            /// # Safety
            /// As [`super::super::dense`] checks, for this strip and these rows; full width.
            #[target_feature(enable = "neon,dotprod")]
            unsafe fn tile<const R: usize>(
                m: Dense<$type>,
                strip: usize,
                w: *const f32,
                w_stride: usize,
                y: *mut f32,
                y_stride: usize,
            ) {
                let mut sums = [[vdupq_n_f32(0.0); PARTS]; R];
                // SAFETY: the strip exists.
                let x = unsafe { m.x.as_ptr().add(strip * m.stride) };
                const STEP: usize = LANES * size_of::<$type>();
                let next = if m.next.len() == m.x.len() { m.next.as_ptr() } else { m.x.as_ptr() };
                let next = next.wrapping_add(strip * m.stride);
                for step in 0..m.steps {
                    if step * STEP % 64 == 0 {
                        prefetch_line(next.wrapping_add(step * LANES).cast());
                    }
                    // SAFETY: step < steps: the element lies in its strip, the weight in its row.
                    unsafe {
                        let x: [float32x4_t; PARTS] =
                            std::array::from_fn(|i| $load(x.add(step * LANES + i * PART)));
                        for r in 0..R {
                            let w = *w.add(r * w_stride + step);
                            for i in 0..PARTS {
                                sums[r][i] = vfmaq_n_f32(sums[r][i], x[i], w);
                            }
                        }
                    }
                }
                for r in 0..R {
                    for i in 0..PARTS {
                        // SAFETY: the strip's lanes exist in each output row.
                        unsafe {
                            let y = y.add(r * y_stride + strip * LANES + i * PART);
                            vst1q_f32(y, vaddq_f32(vld1q_f32(y), sums[r][i]));
                        }
                    }
                }
            }
            if m.width != LANES {
                return scalar::dense(m, w, out);
            }
            let mut row = 0;
            while row < w.rows {
                let rows = ROWS.min(w.rows - row);
                let from = w.w[row * w.stride..].as_ptr();
                let to = out.y[row * out.stride..].as_mut_ptr();
                for strip in 0..m.strips {
                    // SAFETY: `dense` has checked that all strips, steps, rows and outputs are there.
                    unsafe {
                        match rows {
                            1 => tile::<1>(m, strip, from, w.stride, to, out.stride),
                            2 => tile::<2>(m, strip, from, w.stride, to, out.stride),
                            3 => tile::<3>(m, strip, from, w.stride, to, out.stride),
                            _ => tile::<4>(m, strip, from, w.stride, to, out.stride),
                        }
                    }
                }
                row += rows;
            }
        }
    };
}

/// # Safety
/// `p` points to 4 numbers.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_f8(p: *const F8) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the caller's promise; the instruction reads and writes registers only.
    unsafe {
        let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
        // The sign goes to the top and the rest to where a half has it; between them the sign's copies are cut out.
        let shifted = vshl_n_s16::<7>(vget_low_s16(vmovl_s8(bytes)));
        let half = vand_s16(shifted, vdup_n_s16(!0x4000));
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) half, options(pure, nomem, nostack));
    }
    vmulq_n_f32(wide, OF_HALF)
}

dense!(dense_f8, F8, load_f8);
dense!(dense_f16, f16, load_f16);
dense!(dense_f32, f32, load_f32);

/// `sum` plus, in each lane, the dot product of the lane's four codes with digit `I` of four weights.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const I: usize>(mut sum: int32x4_t, codes: uint8x16_t, digits: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes registers only; the feature is enabled. (Its intrinsic is unstable.)
    unsafe {
        match I {
            0 => {
                asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[0]", inout(vreg) sum, in(vreg) codes, in(vreg) digits,
                options(pure, nomem, nostack))
            }
            1 => {
                asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[1]", inout(vreg) sum, in(vreg) codes, in(vreg) digits,
                options(pure, nomem, nostack))
            }
            _ => {
                asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[2]", inout(vreg) sum, in(vreg) codes, in(vreg) digits,
                options(pure, nomem, nostack))
            }
        }
    }
    sum
}

/// See [`super::codes`], which has checked all bounds.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn codes(m: Codes, w: Digits, out: Sums) {
    if m.width != LANES {
        return scalar::codes(m, w, out);
    }
    let (y, stride) = (out.y.as_mut_ptr(), out.stride);
    let mut row = 0;
    while row < w.rows {
        // Two rows of three digits fill the registers.
        let rows = 2.min(w.rows - row);
        // SAFETY: `super::codes` has checked that all strips, digits, scales and outputs are there.
        unsafe {
            match (m.bits, rows) {
                (2, 1) => strips::<2, 1>(m, w, row, y, stride),
                (2, _) => strips::<2, 2>(m, w, row, y, stride),
                (3, 1) => strips::<3, 1>(m, w, row, y, stride),
                (3, _) => strips::<3, 2>(m, w, row, y, stride),
                (4, 1) => strips::<4, 1>(m, w, row, y, stride),
                (4, _) => strips::<4, 2>(m, w, row, y, stride),
                (_, 1) => strips::<8, 1>(m, w, row, y, stride),
                (_, _) => strips::<8, 2>(m, w, row, y, stride),
            }
        }
        row += rows;
    }
}

/// `R` rows from `row` on.
///
/// # Safety
/// As [`super::codes`] checks, for these rows; full width.
#[target_feature(enable = "neon,dotprod")]
unsafe fn strips<const BITS: u8, const R: usize>(
    m: Codes,
    w: Digits,
    row: usize,
    y: *mut f32,
    y_stride: usize,
) {
    const VECTOR: usize = 64;
    let fours = m.steps.div_ceil(4);
    let stride = padded(m.runs * m.steps);
    let (fine, exact) = (w.precision != Precision::Coarse, w.precision == Precision::Exact);
    let low4 = vdupq_n_u8(0x0f);
    let low2 = vdupq_n_u8(3);
    let third = vdupq_n_u8(4);
    let next = if m.next.len() == m.codes.len() { m.next.as_ptr() } else { m.codes.as_ptr() };
    for strip in 0..m.strips {
        let first = strip / m.per_set * w.rows + row;
        let mut sums = [[[vdupq_n_s32(0); PARTS]; 3]; R];
        // Sums of the digits themselves, a lane for each digit.
        let mut totals = [vdupq_n_s32(0); R];
        for run in 0..m.runs {
            let start = strip * m.stride + run * m.run_stride;
            // SAFETY: the run of the strip exists.
            let x = unsafe { m.codes.as_ptr().add(start) };
            let load = |at: usize, i: usize| {
                if i == 0 {
                    prefetch_line(next.wrapping_add(start + at));
                }
                // SAFETY: a vector at `at` lies within the strip's bytes.
                unsafe { vld1q_u8(x.add(at + i * 16)) }
            };
            let mut add = |four: usize, codes: [uint8x16_t; PARTS]| {
                for r in 0..R {
                    // SAFETY: `four` is below a quarter of the padded steps, which each row of digits has.
                    let digits = unsafe {
                        let digits = w.digits.as_ptr().add((first + r) * stride + run * m.steps);
                        vreinterpretq_s8_s32(vld1q_s32(digits.add(four * 4)))
                    };
                    for i in 0..PARTS {
                        sums[r][0][i] = dot::<0>(sums[r][0][i], codes[i], digits);
                        if fine {
                            sums[r][1][i] = dot::<1>(sums[r][1][i], codes[i], digits);
                        }
                        if exact {
                            sums[r][2][i] = dot::<2>(sums[r][2][i], codes[i], digits);
                        }
                    }
                    if BITS == 8 {
                        totals[r] = vpadalq_s16(totals[r], vpaddlq_s8(digits));
                    }
                }
            };
            match BITS {
                8 => {
                    for v in 0..fours {
                        // The instruction takes signed bytes: codes less 128, which the totals make good.
                        let x = std::array::from_fn(|i| veorq_u8(load(v * VECTOR, i), vdupq_n_u8(0x80)));
                        add(v, x);
                    }
                }
                4 => {
                    for v in 0..fours.div_ceil(2) {
                        let x: [uint8x16_t; PARTS] = std::array::from_fn(|i| load(v * VECTOR, i));
                        add(2 * v, x.map(|x| vandq_u8(x, low4)));
                        add(2 * v + 1, x.map(|x| vshrq_n_u8::<4>(x)));
                    }
                }
                2 => {
                    for v in 0..fours.div_ceil(4) {
                        let x: [uint8x16_t; PARTS] = std::array::from_fn(|i| load(v * VECTOR, i));
                        add(4 * v, x.map(|x| vandq_u8(x, low2)));
                        add(4 * v + 1, x.map(|x| vandq_u8(vshrq_n_u8::<2>(x), low2)));
                        add(4 * v + 2, x.map(|x| vandq_u8(vshrq_n_u8::<4>(x), low2)));
                        add(4 * v + 3, x.map(|x| vshrq_n_u8::<6>(x)));
                    }
                }
                _ => {
                    // The third bits of vectors 2u and 2u + 1 are the low and the high halves of the bytes of vector u.
                    let vectors = fours.div_ceil(4);
                    let join = |x, h| vorrq_u8(vandq_u8(x, low2), vandq_u8(h, third));
                    for v in 0..vectors {
                        let x: [uint8x16_t; PARTS] = std::array::from_fn(|i| load(v * VECTOR, i));
                        let half = vdupq_n_s8(-((v % 2 * 4) as i8));
                        let h: [uint8x16_t; PARTS] =
                            std::array::from_fn(|i| vshlq_u8(load((vectors + v / 2) * VECTOR, i), half));
                        add(4 * v, std::array::from_fn(|i| join(x[i], vshlq_n_u8::<2>(h[i]))));
                        add(
                            4 * v + 1,
                            std::array::from_fn(|i| join(vshrq_n_u8::<2>(x[i]), vshlq_n_u8::<1>(h[i]))),
                        );
                        add(4 * v + 2, std::array::from_fn(|i| join(vshrq_n_u8::<4>(x[i]), h[i])));
                        add(
                            4 * v + 3,
                            std::array::from_fn(|i| join(vshrq_n_u8::<6>(x[i]), vshrq_n_u8::<1>(h[i]))),
                        );
                    }
                }
            }
        }
        for r in 0..R {
            let mut total = [0_i32; 4];
            // SAFETY: the array has 4 elements.
            unsafe { vst1q_s32(total.as_mut_ptr(), totals[r]) };
            let factor = w.factors[first + r];
            for i in 0..PARTS {
                let part = |digit: usize| {
                    vcvtq_f32_s32(vaddq_s32(sums[r][digit][i], vdupq_n_s32(128 * total[digit])))
                };
                let mut sum = part(0);
                if exact {
                    sum = vfmaq_n_f32(sum, vfmaq_n_f32(part(1), part(2), 256.0), 256.0);
                } else if fine {
                    sum = vfmaq_n_f32(sum, part(1), 256.0);
                }
                let lane = strip * LANES + i * PART;
                // SAFETY: the strip's lanes exist in each output row, and among the scales and zeros.
                unsafe {
                    let y = y.add((row + r) * y_stride + lane);
                    let mut y_new = vld1q_f32(y);
                    if let Some((scale, zero)) = m.lanes {
                        let scale = load_f16(scale.as_ptr().add(lane));
                        let zero = load_f16(zero.as_ptr().add(lane));
                        y_new = vfmaq_f32(y_new, vmulq_n_f32(sum, factor.step), scale);
                        y_new = vfmaq_n_f32(y_new, zero, factor.bias);
                    } else {
                        y_new = vfmaq_n_f32(vaddq_f32(y_new, vdupq_n_f32(factor.bias)), sum, factor.step);
                    }
                    vst1q_f32(y, y_new);
                }
            }
        }
    }
}

/// See [`super::digits`], which has checked all lengths.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn digits(
    precision: Precision,
    w: Weights,
    bounds: &[f32],
    steps: usize,
    scales: Option<StepScales>,
    digits: &mut [i32],
    factors: &mut [Factor],
) {
    let padded = padded(steps);
    let whole = steps / PART * PART;
    let stored = scales.is_some_and(|s| s.has_zeros());
    let (all, offset) = precision.units();
    // Floats from 2^23 on have their unit in the last bit: adding one rounds to an integer, in the low bits.
    let magic = vdupq_n_f32(8_388_608.0 + offset as f32);
    let offset = vreinterpretq_u8_s32(vdupq_n_s32(offset));
    // Four numbers of four bytes to four digits of four numbers.
    const TRANSPOSE: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
    // SAFETY: the array has 16 bytes.
    let transpose = unsafe { vld1q_u8(TRANSPOSE.as_ptr()) };
    for set in 0..scales.map_or(1, |s| s.sets) {
        let pair = scales.map(|s| s.set(set, steps));
        // None is negative: their bits are ordered as they are.
        let bits = pair.map(|(scale, _)| scale.iter().fold(0, |most, s| s.to_bits().max(most)));
        let most = bits.map_or(1.0, |bits| f16::from_bits(bits).to_f32());
        for (row, &bound) in bounds[..w.rows].iter().enumerate() {
            let (units, step) = Factor::units(bound, most, all);
            let k = set * w.rows + row;
            let w = &w.w[row * w.stride..][..steps];
            let digits = &mut digits[k * padded..][..padded];
            let mut biases = vdupq_n_f32(0.0);
            let mut wholes = vdupq_n_f32(0.0);
            let mut split = |x: float32x4_t| {
                let x = vfmaq_n_f32(magic, x, units);
                wholes = vaddq_f32(wholes, vsubq_f32(x, magic));
                let x = vsubq_u8(vreinterpretq_u8_f32(x), offset);
                vreinterpretq_s32_u8(vqtbl1q_u8(x, transpose))
            };
            for at in (0..whole).step_by(PART) {
                // SAFETY: `at + 4` is at most `steps`, which weights, scales, zeros and digits have.
                unsafe {
                    let mut x = vld1q_f32(w.as_ptr().add(at));
                    if let Some((scale, zero)) = pair {
                        if stored {
                            biases = vfmaq_f32(biases, x, load_f16(zero.as_ptr().add(at)));
                        }
                        x = vmulq_f32(x, load_f16(scale.as_ptr().add(at)));
                    }
                    vst1q_s32(digits.as_mut_ptr().add(at), split(x));
                }
            }
            let mut bias = vaddvq_f32(biases);
            digits[whole..].fill(0);
            if whole < steps {
                let mut last = [0.0_f32; PART];
                for at in whole..steps {
                    last[at - whole] = pair.map_or(w[at], |(scale, _)| w[at] * scale[at].to_f32());
                    if let (Some((_, zero)), true) = (pair, stored) {
                        bias += w[at] * zero[at].to_f32();
                    }
                }
                // SAFETY: both have 4 elements: the padded digits go on to a multiple of 16.
                unsafe {
                    vst1q_s32(digits.as_mut_ptr().add(whole), split(vld1q_f32(last.as_ptr())));
                }
            }
            if !stored {
                bias = vaddvq_f32(wholes) * step;
            }
            factors[k] = Factor { step, bias };
        }
    }
}
