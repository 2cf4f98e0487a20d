//! The kernels for AVX2 with FMA and F16C: a strip is two registers wide.

// Register tiles: indices are constants after unrolling, and one index reads several arrays.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::f16;

use super::f8::{F8, OF_HALF};
use super::lines::prefetch_line;
use super::scalar;
use super::{Codes, Dense, Digits, Factor, LANES, Precision, ROWS, StepScales, Sums, Weights, padded};

/// Lanes of a register.
const HALF: usize = 8;

/// Defines the kernel for strips of `$type`, loaded as 8 f32 by `$load`.
macro_rules! dense {
    ($name:ident, $type:ty, $load:ident) => {
        /// See [`super::dense`], which has checked all bounds.
        #[target_feature(enable = "avx2,fma,f16c")]
        pub(super) fn $name(m: Dense<$type>, w: Weights, out: Sums) {
            /// `R` rows of one strip; `U` sums per row and register hide the latency of an FMA.
            ///
            /// # Safety
            /// As [`super::super::dense`] checks, for this strip and these rows; full width.
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn tile<const R: usize, const U: usize>(
                m: Dense<$type>,
                strip: usize,
                w: *const f32,
                w_stride: usize,
                y: *mut f32,
                y_stride: usize,
            ) {
                let mut sums = [[[_mm256_setzero_ps(); U]; 2]; R];
                // SAFETY: the strip exists.
                let x = unsafe { m.x.as_ptr().add(strip * m.stride) };
                let mut add = |step: usize, u: usize| {
                    // SAFETY: step < steps: the element lies in its strip, the weight in its row.
                    unsafe {
                        let x: [__m256; 2] = std::array::from_fn(|h| $load(x.add(step * LANES + h * HALF)));
                        for r in 0..R {
                            let w = _mm256_set1_ps(*w.add(r * w_stride + step));
                            for h in 0..2 {
                                sums[r][h][u] = _mm256_fmadd_ps(w, x[h], sums[r][h][u]);
                            }
                        }
                    }
                };
                const LINE: usize = 64 / size_of::<$type>();
                let next = if m.next.len() == m.x.len() { m.next.as_ptr() } else { m.x.as_ptr() };
                let next = next.wrapping_add(strip * m.stride);
                let whole = m.steps / 4 * 4;
                for step in (0..whole).step_by(4) {
                    for at in (0..4 * LANES).step_by(LINE) {
                        prefetch_line(next.wrapping_add(step * LANES + at).cast());
                    }
                    for u in 0..4 {
                        add(step + u, u % U);
                    }
                }
                for step in whole..m.steps {
                    add(step, 0);
                }
                for r in 0..R {
                    for h in 0..2 {
                        let sum = sums[r][h].into_iter().reduce(|a, b| _mm256_add_ps(a, b));
                        let sum = sum.unwrap_or(_mm256_setzero_ps());
                        // SAFETY: the strip's lanes exist in each output row.
                        unsafe {
                            let y = y.add(r * y_stride + strip * LANES + h * HALF);
                            _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), sum));
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
                            1 => tile::<1, 4>(m, strip, from, w.stride, to, out.stride),
                            2 => tile::<2, 2>(m, strip, from, w.stride, to, out.stride),
                            3 => tile::<3, 1>(m, strip, from, w.stride, to, out.stride),
                            _ => tile::<4, 1>(m, strip, from, w.stride, to, out.stride),
                        }
                    }
                }
                row += rows;
            }
        }
    };
}

/// # Safety
/// `p` points to 8 numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_f16(p: *const f16) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// # Safety
/// `p` points to 8 numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_f32(p: *const f32) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_ps(p) }
}

/// # Safety
/// `p` points to 8 numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_f8(p: *const F8) -> __m256 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
    // The sign goes to the top and the rest to where a half has it; between them the sign's copies are cut out.
    let shifted = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(bytes));
    let halves = _mm_and_si128(shifted, _mm_set1_epi16(!0x4000));
    _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(OF_HALF))
}

dense!(dense_f8, F8, load_f8);
dense!(dense_f16, f16, load_f16);
dense!(dense_f32, f32, load_f32);

/// See [`super::codes`], which has checked all bounds.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn codes(m: Codes, w: Digits, out: Sums) {
    if m.width != LANES {
        return scalar::codes(m, w, out);
    }
    let (y, stride) = (out.y.as_mut_ptr(), out.stride);
    let mut row = 0;
    while row < w.rows {
        // Two rows fill the sixteen registers.
        let rows = 2.min(w.rows - row);
        // SAFETY: `super::codes` has checked that all strips, digits, scales and outputs are there.
        unsafe {
            match (m.bits, rows, w.precision) {
                (2, 1, Precision::Coarse) => strips::<2, 1, 1>(m, w, row, y, stride),
                (2, _, Precision::Coarse) => strips::<2, 1, 2>(m, w, row, y, stride),
                (3, 1, Precision::Coarse) => strips::<3, 1, 1>(m, w, row, y, stride),
                (3, _, Precision::Coarse) => strips::<3, 1, 2>(m, w, row, y, stride),
                (4, 1, Precision::Coarse) => strips::<4, 1, 1>(m, w, row, y, stride),
                (4, _, Precision::Coarse) => strips::<4, 1, 2>(m, w, row, y, stride),
                (_, 1, Precision::Coarse) => strips::<8, 1, 1>(m, w, row, y, stride),
                (_, _, Precision::Coarse) => strips::<8, 1, 2>(m, w, row, y, stride),
                (2, 1, Precision::Fast) => strips::<2, 2, 1>(m, w, row, y, stride),
                (2, _, Precision::Fast) => strips::<2, 2, 2>(m, w, row, y, stride),
                (3, 1, Precision::Fast) => strips::<3, 2, 1>(m, w, row, y, stride),
                (3, _, Precision::Fast) => strips::<3, 2, 2>(m, w, row, y, stride),
                (4, 1, Precision::Fast) => strips::<4, 2, 1>(m, w, row, y, stride),
                (4, _, Precision::Fast) => strips::<4, 2, 2>(m, w, row, y, stride),
                (_, 1, Precision::Fast) => strips::<8, 2, 1>(m, w, row, y, stride),
                (_, _, Precision::Fast) => strips::<8, 2, 2>(m, w, row, y, stride),
                (2, 1, Precision::Exact) => strips::<2, 3, 1>(m, w, row, y, stride),
                (2, _, Precision::Exact) => strips::<2, 3, 2>(m, w, row, y, stride),
                (3, 1, Precision::Exact) => strips::<3, 3, 1>(m, w, row, y, stride),
                (3, _, Precision::Exact) => strips::<3, 3, 2>(m, w, row, y, stride),
                (4, 1, Precision::Exact) => strips::<4, 3, 1>(m, w, row, y, stride),
                (4, _, Precision::Exact) => strips::<4, 3, 2>(m, w, row, y, stride),
                (_, 1, Precision::Exact) => strips::<8, 3, 1>(m, w, row, y, stride),
                (_, _, Precision::Exact) => strips::<8, 3, 2>(m, w, row, y, stride),
            }
        }
        row += rows;
    }
}

/// `D` digits, `R` rows from `row` on, half a strip at a time.
///
/// # Safety
/// As [`super::codes`] checks, for these rows; full width.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strips<const BITS: u8, const D: usize, const R: usize>(
    m: Codes,
    w: Digits,
    row: usize,
    y: *mut f32,
    y_stride: usize,
) {
    const VECTOR: usize = 64;
    let fours = m.steps.div_ceil(4);
    let low4 = _mm256_set1_epi8(0x0f);
    let low2 = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let base = _mm256_set1_ps(256.0);
    let stride = padded(m.runs * m.steps);
    let next = if m.next.len() == m.codes.len() { m.next.as_ptr() } else { m.codes.as_ptr() };
    for half in 0..2 * m.strips {
        let first = half / 2 / m.per_set * w.rows + row;
        let mut sums = [[_mm256_setzero_si256(); D]; R];
        for run in 0..m.runs {
            let start = half / 2 * m.stride + run * m.run_stride;
            let digit = |r: usize, four: usize, i: usize| {
                // SAFETY: `four` is below a quarter of the padded steps, which each row of digits has.
                unsafe {
                    let digits = w.digits.as_ptr().add((first + r) * stride + run * m.steps);
                    _mm256_set1_epi32(*digits.add(four * 4 + i))
                }
            };
            // SAFETY: the run of the strip exists, and has both halves.
            let x = unsafe { m.codes.as_ptr().add(start + half % 2 * (VECTOR / 2)) };
            let load = |at: usize| {
                prefetch_line(next.wrapping_add(start + at).cast());
                // SAFETY: vector v of a strip lies within its bytes.
                unsafe { _mm256_loadu_si256(x.add(at).cast()) }
            };
            // Adds the products of codes (at most 15) and digits of `N` fours: N * 2 * 15 * 128 stays within 16 bits.
            macro_rules! dot {
                ($four:expr, $codes:expr) => {{
                    let codes = $codes;
                    for r in 0..R {
                        for i in 0..D {
                            let mut sum = _mm256_maddubs_epi16(codes[0], digit(r, $four, i));
                            for (n, &codes) in codes.iter().enumerate().skip(1) {
                                sum = _mm256_add_epi16(
                                    sum,
                                    _mm256_maddubs_epi16(codes, digit(r, $four + n, i)),
                                );
                            }
                            sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(sum, ones));
                        }
                    }
                }};
            }
            match BITS {
                8 => {
                    // 255 * 128 does not fit: the halves of a code apart, the upper one times 16 in 32 bits.
                    let sixteen = _mm256_set1_epi16(16);
                    for v in 0..fours {
                        let x = load(v * VECTOR);
                        let low = _mm256_and_si256(x, low4);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(x), low4);
                        for r in 0..R {
                            for i in 0..D {
                                let digit = digit(r, v, i);
                                let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, digit), ones);
                                let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, digit), sixteen);
                                sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_add_epi32(low, high));
                            }
                        }
                    }
                }
                4 => {
                    for v in 0..fours.div_ceil(2) {
                        let x = load(v * VECTOR);
                        let high = _mm256_srli_epi16::<4>(x);
                        dot!(2 * v, [_mm256_and_si256(x, low4), _mm256_and_si256(high, low4)]);
                    }
                }
                2 => {
                    for v in 0..fours.div_ceil(4) {
                        let x = load(v * VECTOR);
                        let x = [
                            x,
                            _mm256_srli_epi16::<2>(x),
                            _mm256_srli_epi16::<4>(x),
                            _mm256_srli_epi16::<6>(x),
                        ];
                        dot!(4 * v, x.map(|x| _mm256_and_si256(x, low2)));
                    }
                }
                _ => {
                    // The third bits of vectors 2u and 2u + 1 are the low and the high halves of the bytes of vector u.
                    let vectors = fours.div_ceil(4);
                    let third = _mm256_set1_epi8(4);
                    let join = |x, h| _mm256_or_si256(_mm256_and_si256(x, low2), _mm256_and_si256(h, third));
                    for v in 0..vectors {
                        let x = load(v * VECTOR);
                        let shift = _mm_cvtsi32_si128((v % 2 * 4) as i32);
                        let h = _mm256_srl_epi16(load((vectors + v / 2) * VECTOR), shift);
                        dot!(
                            4 * v,
                            [
                                join(x, _mm256_slli_epi16::<2>(h)),
                                join(_mm256_srli_epi16::<2>(x), _mm256_slli_epi16::<1>(h)),
                                join(_mm256_srli_epi16::<4>(x), h),
                                join(_mm256_srli_epi16::<6>(x), _mm256_srli_epi16::<1>(h)),
                            ]
                        );
                    }
                }
            }
        }
        let lane = half * HALF;
        for r in 0..R {
            let mut sum = _mm256_cvtepi32_ps(sums[r][D - 1]);
            for i in (0..D - 1).rev() {
                sum = _mm256_fmadd_ps(sum, base, _mm256_cvtepi32_ps(sums[r][i]));
            }
            let factor = w.factors[first + r];
            let (step, bias) = (_mm256_set1_ps(factor.step), _mm256_set1_ps(factor.bias));
            // SAFETY: the strip's lanes exist in each output row, and among the scales and zeros.
            unsafe {
                let y = y.add((row + r) * y_stride + lane);
                let mut total = _mm256_loadu_ps(y);
                if let Some((scale, zero)) = m.lanes {
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(scale.as_ptr().add(lane).cast()));
                    let zero = _mm256_cvtph_ps(_mm_loadu_si128(zero.as_ptr().add(lane).cast()));
                    total = _mm256_fmadd_ps(_mm256_mul_ps(sum, step), scale, total);
                    total = _mm256_fmadd_ps(bias, zero, total);
                } else {
                    total = _mm256_fmadd_ps(sum, step, _mm256_add_ps(total, bias));
                }
                _mm256_storeu_ps(y, total);
            }
        }
    }
}

/// See [`super::digits`], which has checked all lengths.
#[target_feature(enable = "avx2,fma,f16c")]
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
    let whole = steps / HALF * HALF;
    let stored = scales.is_some_and(|s| s.has_zeros());
    let (all, offset) = precision.units();
    // Floats from 2^23 on have their unit in the last bit: adding one rounds to an integer, in the low bits.
    let magic = _mm256_set1_ps(8_388_608.0 + offset as f32);
    let offset = _mm256_set1_epi32(offset);
    // Four numbers of four bytes to four digits of four numbers.
    let transpose =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for set in 0..scales.map_or(1, |s| s.sets) {
        let pair = scales.map(|s| s.set(set, steps));
        // None is negative: their bits are ordered as they are.
        let bits = pair.map(|(scale, _)| scale.iter().fold(0, |most, s| s.to_bits().max(most)));
        let most = bits.map_or(1.0, |bits| f16::from_bits(bits).to_f32());
        for row in 0..w.rows {
            let (units, step) = Factor::units(bounds[row], most, all);
            let units = _mm256_set1_ps(units);
            let k = set * w.rows + row;
            let w = &w.w[row * w.stride..][..steps];
            let digits = &mut digits[k * padded..][..padded];
            let mut biases = _mm256_setzero_ps();
            // The products wait in the place of their digits.
            for at in (0..whole).step_by(HALF) {
                // SAFETY: `at + 8` is at most `steps`, which weights, scales, zeros and digits have.
                unsafe {
                    let mut x = _mm256_loadu_ps(w.as_ptr().add(at));
                    if let Some((scale, zero)) = pair {
                        if stored {
                            let zero = _mm256_cvtph_ps(_mm_loadu_si128(zero.as_ptr().add(at).cast()));
                            biases = _mm256_fmadd_ps(x, zero, biases);
                        }
                        x = _mm256_mul_ps(x, _mm256_cvtph_ps(_mm_loadu_si128(scale.as_ptr().add(at).cast())));
                    }
                    _mm256_storeu_ps(digits.as_mut_ptr().add(at).cast(), x);
                }
            }
            digits[whole..].fill(0);
            let mut bias = 0.0;
            for at in whole..steps {
                digits[at] = pair.map_or(w[at], |(scale, _)| w[at] * scale[at].to_f32()).to_bits() as i32;
                if let (Some((_, zero)), true) = (pair, stored) {
                    bias += w[at] * zero[at].to_f32();
                }
            }
            for digits in digits.chunks_exact_mut(HALF) {
                // SAFETY: `digits` has 8 elements of 4 bytes.
                unsafe {
                    let x = _mm256_fmadd_ps(_mm256_loadu_ps(digits.as_ptr().cast()), units, magic);
                    if !stored {
                        biases = _mm256_add_ps(biases, _mm256_sub_ps(x, magic));
                    }
                    let x = _mm256_castps_si256(x);
                    let x = _mm256_shuffle_epi8(_mm256_sub_epi8(x, offset), transpose);
                    _mm256_storeu_si256(digits.as_mut_ptr().cast(), x);
                }
            }
            let mut lanes = [0.0_f32; HALF];
            // SAFETY: the array has 8 elements.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), biases) };
            bias += lanes.iter().sum::<f32>() * if stored { 1.0 } else { step };
            factors[k] = Factor { step, bias };
        }
    }
}
