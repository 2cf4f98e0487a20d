//! The kernels for AVX-512 (F, BW, VL, VNNI): a strip is one register wide.

// Register tiles: indices are constants after unrolling, and one index reads several arrays.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::f16;

use super::f8::{F8, OF_HALF};
use super::lines::prefetch_line;
use super::scalar;
use super::{Codes, Dense, Digits, Factor, LANES, Precision, ROWS, StepScales, Sums, Weights, padded};

/// Defines the kernel for strips of `$type`, loaded as 16 f32 by `$load`.
macro_rules! dense {
    ($name:ident, $type:ty, $load:ident) => {
        /// See [`super::dense`], which has checked all bounds.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
        pub(super) fn $name(m: Dense<$type>, w: Weights, out: Sums) {
            /// `R` rows of one strip; `U` sums per row hide the latency of an FMA. One strip at a time: two streams
            /// through memory halve the bandwidth.
            ///
            /// # Safety
            /// As [`super::super::dense`] checks, for this strip and these rows; full width.
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
            unsafe fn tile<const R: usize, const U: usize>(
                m: Dense<$type>,
                strip: usize,
                w: *const f32,
                w_stride: usize,
                y: *mut f32,
                y_stride: usize,
            ) {
                const LINE: usize = 64 / size_of::<$type>();
                let mut sums = [[_mm512_setzero_ps(); U]; R];
                // SAFETY: the strip exists.
                let x = unsafe { m.x.as_ptr().add(strip * m.stride) };
                let next = if m.next.len() == m.x.len() { m.next.as_ptr() } else { m.x.as_ptr() };
                let next = next.wrapping_add(strip * m.stride);
                let mut add = |step: usize, u: usize| {
                    // SAFETY: step < steps: the element lies in its strip, the weight in its row.
                    unsafe {
                        let x = $load(x.add(step * LANES));
                        for r in 0..R {
                            let w = _mm512_set1_ps(*w.add(r * w_stride + step));
                            sums[r][u] = _mm512_fmadd_ps(w, x, sums[r][u]);
                        }
                    }
                };
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
                    let sum = sums[r].into_iter().reduce(|a, b| _mm512_add_ps(a, b));
                    let sum = sum.unwrap_or(_mm512_setzero_ps());
                    // SAFETY: the strip's lanes exist in each output row.
                    unsafe {
                        let y = y.add(r * y_stride + strip * LANES);
                        _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), sum));
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
                            2 => tile::<2, 4>(m, strip, from, w.stride, to, out.stride),
                            3 => tile::<3, 2>(m, strip, from, w.stride, to, out.stride),
                            _ => tile::<4, 2>(m, strip, from, w.stride, to, out.stride),
                        }
                    }
                }
                row += rows;
            }
        }
    };
}

/// # Safety
/// `p` points to 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_f16(p: *const f16) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
}

/// # Safety
/// `p` points to 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_f32(p: *const f32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_ps(p) }
}

/// # Safety
/// `p` points to 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn load_f8(p: *const F8) -> __m512 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadu_si128(p.cast()) };
    // The sign goes to the top and the rest to where a half has it; between them the sign's copies are cut out.
    let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
    let halves = _mm256_and_si256(shifted, _mm256_set1_epi16(!0x4000));
    _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(OF_HALF))
}

dense!(dense_f8, F8, load_f8);
dense!(dense_f16, f16, load_f16);
dense!(dense_f32, f32, load_f32);

/// See [`super::codes`], which has checked all bounds.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn codes(m: Codes, w: Digits, out: Sums) {
    if m.width != LANES {
        return scalar::codes(m, w, out);
    }
    // SAFETY: `super::codes` has checked that all strips, digits, scales and outputs are there.
    unsafe {
        match (m.bits, w.precision) {
            (2, Precision::Coarse) => rows::<2, 1>(m, w, out),
            (3, Precision::Coarse) => rows::<3, 1>(m, w, out),
            (4, Precision::Coarse) => rows::<4, 1>(m, w, out),
            (_, Precision::Coarse) => rows::<8, 1>(m, w, out),
            (2, Precision::Fast) => rows::<2, 2>(m, w, out),
            (3, Precision::Fast) => rows::<3, 2>(m, w, out),
            (4, Precision::Fast) => rows::<4, 2>(m, w, out),
            (_, Precision::Fast) => rows::<8, 2>(m, w, out),
            (2, Precision::Exact) => rows::<2, 3>(m, w, out),
            (3, Precision::Exact) => rows::<3, 3>(m, w, out),
            (4, Precision::Exact) => rows::<4, 3>(m, w, out),
            (_, Precision::Exact) => rows::<8, 3>(m, w, out),
        }
    }
}

/// # Safety
/// As [`super::codes`] checks; full width.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn rows<const BITS: u8, const D: usize>(m: Codes, w: Digits, out: Sums) {
    let (y, stride) = (out.y.as_mut_ptr(), out.stride);
    let mut strip = 0;
    while strip < m.strips {
        // Two strips share the loads of their digits, if these are the same.
        let pair = strip + 1 < m.strips && (strip + 1) % m.per_set != 0;
        // SAFETY: strips below `m.strips`, as many rows as the digits have.
        unsafe {
            match (w.rows, pair) {
                (1, true) => tile::<BITS, D, 1, 2>(m, strip, w, y, stride),
                (2, true) => tile::<BITS, D, 2, 2>(m, strip, w, y, stride),
                (3, true) => tile::<BITS, D, 3, 2>(m, strip, w, y, stride),
                (_, true) => tile::<BITS, D, 4, 2>(m, strip, w, y, stride),
                (1, false) => tile::<BITS, D, 1, 1>(m, strip, w, y, stride),
                (2, false) => tile::<BITS, D, 2, 1>(m, strip, w, y, stride),
                (3, false) => tile::<BITS, D, 3, 1>(m, strip, w, y, stride),
                (_, false) => tile::<BITS, D, 4, 1>(m, strip, w, y, stride),
            }
        }
        strip += 1 + usize::from(pair);
    }
}

/// `D` digits, `R` rows, `S` strips from `strip` on, all of one set.
///
/// # Safety
/// As [`super::codes`] checks, for these strips and rows; full width.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const BITS: u8, const D: usize, const R: usize, const S: usize>(
    m: Codes,
    strip: usize,
    w: Digits,
    y: *mut f32,
    y_stride: usize,
) {
    const VECTOR: usize = 64;
    let fours = m.steps.div_ceil(4);
    let stride = padded(m.runs * m.steps);
    let first = strip / m.per_set * R;
    let next = if m.next.len() == m.codes.len() { m.next.as_ptr() } else { m.codes.as_ptr() };
    let mut sums = [[[_mm512_setzero_si512(); D]; S]; R];
    let low4 = _mm512_set1_epi8(0x0f);
    let low2 = _mm512_set1_epi8(3);
    for run in 0..m.runs {
        let at = strip * m.stride + run * m.run_stride;
        // SAFETY: the run of the strip and its set exist.
        let (x, digits) =
            unsafe { (m.codes.as_ptr().add(at), w.digits.as_ptr().add(first * stride + run * m.steps)) };
        let next = next.wrapping_add(at);
        let mut dot = |four: usize, codes: [__m512i; S]| {
            for r in 0..R {
                for i in 0..D {
                    // SAFETY: `four` is below a quarter of the padded steps, which each row of digits has.
                    let digit = unsafe { _mm512_set1_epi32(*digits.add(r * stride + four * 4 + i)) };
                    for s in 0..S {
                        sums[r][s][i] = _mm512_dpbusd_epi32(sums[r][s][i], codes[s], digit);
                    }
                }
            }
        };
        let load = |s: usize, at: usize| {
            prefetch_line(next.wrapping_add(s * m.stride + at).cast());
            // SAFETY: vector v of a strip lies within its bytes.
            unsafe { _mm512_loadu_si512(x.add(s * m.stride + at).cast()) }
        };
        match BITS {
            8 => (0..fours).for_each(|v| dot(v, std::array::from_fn(|s| load(s, v * VECTOR)))),
            4 => {
                for v in 0..fours.div_ceil(2) {
                    let x: [__m512i; S] = std::array::from_fn(|s| load(s, v * VECTOR));
                    dot(2 * v, x.map(|x| _mm512_and_si512(x, low4)));
                    dot(2 * v + 1, x.map(|x| _mm512_and_si512(_mm512_srli_epi16::<4>(x), low4)));
                }
            }
            2 => {
                for v in 0..fours.div_ceil(4) {
                    let x: [__m512i; S] = std::array::from_fn(|s| load(s, v * VECTOR));
                    dot(4 * v, x.map(|x| _mm512_and_si512(x, low2)));
                    dot(4 * v + 1, x.map(|x| _mm512_and_si512(_mm512_srli_epi16::<2>(x), low2)));
                    dot(4 * v + 2, x.map(|x| _mm512_and_si512(_mm512_srli_epi16::<4>(x), low2)));
                    dot(4 * v + 3, x.map(|x| _mm512_and_si512(_mm512_srli_epi16::<6>(x), low2)));
                }
            }
            _ => {
                // The third bits of vectors 2u and 2u + 1 are the low and the high halves of the bytes of vector u.
                let vectors = fours.div_ceil(4);
                let third = _mm512_set1_epi8(4);
                // low2(x) | (h & 4)
                let join = |x, h| _mm512_or_si512(_mm512_and_si512(x, low2), _mm512_and_si512(h, third));
                for v in 0..vectors {
                    let x: [__m512i; S] = std::array::from_fn(|s| load(s, v * VECTOR));
                    let half = _mm_cvtsi32_si128((v % 2 * 4) as i32);
                    let h: [__m512i; S] =
                        std::array::from_fn(|s| _mm512_srl_epi16(load(s, (vectors + v / 2) * VECTOR), half));
                    dot(4 * v, std::array::from_fn(|s| join(x[s], _mm512_slli_epi16::<2>(h[s]))));
                    dot(
                        4 * v + 1,
                        std::array::from_fn(|s| {
                            join(_mm512_srli_epi16::<2>(x[s]), _mm512_slli_epi16::<1>(h[s]))
                        }),
                    );
                    dot(4 * v + 2, std::array::from_fn(|s| join(_mm512_srli_epi16::<4>(x[s]), h[s])));
                    dot(
                        4 * v + 3,
                        std::array::from_fn(|s| {
                            join(_mm512_srli_epi16::<6>(x[s]), _mm512_srli_epi16::<1>(h[s]))
                        }),
                    );
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { finish(m.lanes, &w.factors[first..], strip, sums, y, y_stride) };
}

/// Adds the integer sums of `R` rows and of the `S` strips from `strip` on to `y`, as numbers. Part of the kernel that
/// calls it, where the sums are in registers.
///
/// # Safety
/// The machine has the instructions of [`codes`]; the strips' lanes exist in each row of `y`, and among the scales and
/// zeros; there are `R` factors.
#[inline(always)]
pub(super) unsafe fn finish<const D: usize, const R: usize, const S: usize>(
    lanes: Option<(&[f16], &[f16])>,
    factors: &[Factor],
    strip: usize,
    sums: [[[__m512i; D]; S]; R],
    y: *mut f32,
    y_stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let base = _mm512_set1_ps(256.0);
        for s in 0..S {
            let lane = (strip + s) * LANES;
            for r in 0..R {
                let mut sum = _mm512_cvtepi32_ps(sums[r][s][D - 1]);
                for i in (0..D - 1).rev() {
                    sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(sums[r][s][i]));
                }
                let (step, bias) = (_mm512_set1_ps(factors[r].step), _mm512_set1_ps(factors[r].bias));
                let y = y.add(r * y_stride + lane);
                let mut total = _mm512_loadu_ps(y);
                if let Some((scale, zero)) = lanes {
                    let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scale.as_ptr().add(lane).cast()));
                    let zero = _mm512_cvtph_ps(_mm256_loadu_si256(zero.as_ptr().add(lane).cast()));
                    total = _mm512_fmadd_ps(_mm512_mul_ps(sum, step), scale, total);
                    total = _mm512_fmadd_ps(bias, zero, total);
                } else {
                    total = _mm512_fmadd_ps(sum, step, _mm512_add_ps(total, bias));
                }
                _mm512_storeu_ps(y, total);
            }
        }
    }
}

/// See [`super::largest`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn largest(w: &[f32]) -> f32 {
    let mut most = _mm512_setzero_ps();
    for at in (0..w.len()).step_by(LANES) {
        let left = w.len() - at;
        let mask: __mmask16 = if left >= LANES { !0 } else { (1 << left) - 1 };
        // SAFETY: the masked load touches only elements below the slice's length.
        let x = unsafe { _mm512_maskz_loadu_ps(mask, w.as_ptr().add(at)) };
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    _mm512_reduce_max_ps(most)
}

/// See [`super::digits`], which has checked all lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
    let stored = scales.is_some_and(|s| s.has_zeros());
    let (all, offset) = precision.units();
    // Floats from 2^23 on have their unit in the last bit: adding one rounds to an integer, in the low bits.
    let magic = _mm512_set1_ps(8_388_608.0 + offset as f32);
    let offset = _mm512_set1_epi32(offset);
    // Four numbers of four bytes to four digits of four numbers.
    let transpose =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for set in 0..scales.map_or(1, |s| s.sets) {
        let pair = scales.map(|s| s.set(set, steps));
        let most = pair.map_or(1.0, |(scale, _)| largest_scale(scale));
        for row in 0..w.rows {
            let (units, step) = Factor::units(bounds[row], most, all);
            let units = _mm512_set1_ps(units);
            let k = set * w.rows + row;
            let w = &w.w[row * w.stride..][..steps];
            let digits = &mut digits[k * padded..][..padded];
            let mut bias = _mm512_setzero_ps();
            for (chunk, digits) in digits.chunks_exact_mut(LANES).enumerate() {
                let at = chunk * LANES;
                let left = steps - at;
                let mask: __mmask16 = if left >= LANES { !0 } else { (1 << left) - 1 };
                // SAFETY: `at` is below `steps`, and masked loads touch only elements below it, which weights, scales
                // and zeros have. `digits` has 16 elements of 4 bytes.
                unsafe {
                    let mut x = _mm512_maskz_loadu_ps(mask, w.as_ptr().add(at));
                    if let Some((scale, zero)) = pair {
                        if stored {
                            let zero = _mm256_maskz_loadu_epi16(mask, zero.as_ptr().add(at).cast());
                            bias = _mm512_fmadd_ps(x, _mm512_cvtph_ps(zero), bias);
                        }
                        let scale = _mm256_maskz_loadu_epi16(mask, scale.as_ptr().add(at).cast());
                        x = _mm512_mul_ps(x, _mm512_cvtph_ps(scale));
                    }
                    let x = _mm512_fmadd_ps(x, units, magic);
                    if !stored {
                        bias = _mm512_add_ps(bias, _mm512_sub_ps(x, magic));
                    }
                    let x = _mm512_castps_si512(x);
                    let x = _mm512_shuffle_epi8(_mm512_sub_epi8(x, offset), transpose);
                    _mm512_storeu_si512(digits.as_mut_ptr().cast(), x);
                }
            }
            let bias = _mm512_reduce_add_ps(bias);
            factors[k] = Factor { step, bias: if stored { bias } else { bias * step } };
        }
    }
}

/// The largest of scales, none of which is negative: their bits are ordered as they are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn largest_scale(scale: &[f16]) -> f32 {
    const LANES: usize = 32;
    let mut most = _mm512_setzero_si512();
    for at in (0..scale.len()).step_by(LANES) {
        let left = scale.len() - at;
        let mask: __mmask32 = if left >= LANES { !0 } else { (1 << left) - 1 };
        // SAFETY: the masked load touches only elements below the slice's length.
        let x = unsafe { _mm512_maskz_loadu_epi16(mask, scale.as_ptr().add(at).cast()) };
        most = _mm512_max_epu16(most, x);
    }
    let most = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
    let most = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    // The instruction finds a minimum.
    let ones = _mm_set1_epi16(-1);
    let most = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(most, ones)), ones);
    _mm_cvtss_f32(_mm_cvtph_ps(most))
}
