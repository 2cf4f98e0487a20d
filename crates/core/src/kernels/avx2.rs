//! The kernels for AVX2 with FMA and F16C: a strip is two registers wide.

// Register tiles: indices are constants after unrolling, and one index reads several arrays.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::f16;

use super::scalar::{self, OFFSET, TINY, UNITS};
use super::{Codes, Dense, Digits, Factor, LANES, ROWS, Sums, Weights, strip_bytes};

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
                let whole = m.steps / U * U;
                for step in (0..whole).step_by(U) {
                    for u in 0..U {
                        add(step + u, u);
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
    while row < w.factors.len() {
        // Two rows fill the sixteen registers.
        let rows = 2.min(w.factors.len() - row);
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

/// `R` rows from `row` on, half a strip at a time.
///
/// # Safety
/// As [`super::codes`] checks, for these rows; full width.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strips<const BITS: u8, const R: usize>(
    m: Codes,
    w: Digits,
    row: usize,
    y: *mut f32,
    y_stride: usize,
) {
    const VECTOR: usize = 64;
    let bytes = strip_bytes(BITS, m.steps, LANES);
    let fours = m.steps.div_ceil(4);
    let low4 = _mm256_set1_epi8(0x0f);
    let low2 = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let base = _mm256_set1_ps(256.0);
    // SAFETY: the rows exist.
    let digits = unsafe { w.digits.as_ptr().add(row * w.stride) };
    let digit = |r: usize, four: usize, i: usize| {
        // SAFETY: `four` is below a quarter of the padded steps, which each row of digits has.
        unsafe { _mm256_set1_epi32(*digits.add(r * w.stride + four * 4 + i)) }
    };
    for half in 0..2 * m.strips {
        // SAFETY: the strip exists, and has both halves.
        let x = unsafe { m.codes.as_ptr().add(half / 2 * bytes + half % 2 * (VECTOR / 2)) };
        let load = |at: usize| {
            // SAFETY: vector v of a strip lies within its bytes.
            unsafe { _mm256_loadu_si256(x.add(at).cast()) }
        };
        let mut sums = [[_mm256_setzero_si256(); 3]; R];
        // Adds the products of codes (at most 15) and digits of `N` fours: N * 2 * 15 * 128 stays within 16 bits.
        macro_rules! dot {
            ($four:expr, $codes:expr) => {{
                let codes = $codes;
                for r in 0..R {
                    for i in 0..3 {
                        let mut sum = _mm256_maddubs_epi16(codes[0], digit(r, $four, i));
                        for (n, &codes) in codes.iter().enumerate().skip(1) {
                            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, digit(r, $four + n, i)));
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
                        for i in 0..3 {
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
                    let x =
                        [x, _mm256_srli_epi16::<2>(x), _mm256_srli_epi16::<4>(x), _mm256_srli_epi16::<6>(x)];
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
        let lane = half * HALF;
        for r in 0..R {
            let [low, mid, high] = sums[r].map(|sum| _mm256_cvtepi32_ps(sum));
            let sum = _mm256_fmadd_ps(_mm256_fmadd_ps(high, base, mid), base, low);
            let factor = w.factors[row + r];
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
pub(super) fn digits(w: &[f32], steps: Option<(&[f16], &[f16])>, digits: &mut [i32]) -> Factor {
    let whole = w.len() / HALF * HALF;
    let mut most = _mm256_setzero_ps();
    let mut biases = _mm256_setzero_ps();
    let sign = _mm256_set1_ps(-0.0);
    // The products wait in the place of their digits.
    for at in (0..whole).step_by(HALF) {
        // SAFETY: `at + 8` is at most the length of the weights, which scales, zeros and digits have too.
        unsafe {
            let mut x = _mm256_loadu_ps(w.as_ptr().add(at));
            if let Some((scale, zero)) = steps {
                let zero = _mm256_cvtph_ps(_mm_loadu_si128(zero.as_ptr().add(at).cast()));
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(scale.as_ptr().add(at).cast()));
                biases = _mm256_fmadd_ps(x, zero, biases);
                x = _mm256_mul_ps(x, scale);
            } else {
                biases = _mm256_add_ps(biases, x);
            }
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, x));
            _mm256_storeu_ps(digits.as_mut_ptr().add(at).cast(), x);
        }
    }
    let mut lanes = [[0.0_f32; HALF]; 2];
    // SAFETY: both arrays have 8 elements.
    unsafe {
        _mm256_storeu_ps(lanes[0].as_mut_ptr(), most);
        _mm256_storeu_ps(lanes[1].as_mut_ptr(), biases);
    }
    let mut largest = lanes[0].into_iter().fold(0.0, f32::max);
    let mut bias: f32 = lanes[1].iter().sum();
    digits[whole..].fill(0);
    for at in whole..w.len() {
        let (x, zero) = match steps {
            Some((scale, zero)) => (w[at] * scale[at].to_f32(), w[at] * zero[at].to_f32()),
            None => (w[at], w[at]),
        };
        bias += zero;
        largest = largest.max(x.abs());
        digits[at] = x.to_bits() as i32;
    }
    let units = if largest > TINY { UNITS / largest } else { 0.0 };
    // A float of this size has its unit in the last bit: adding it rounds to an integer, in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let magic = _mm256_set1_ps(MAGIC);
    let offset = _mm256_set1_epi32(OFFSET);
    let unmagic = _mm256_set1_epi32(OFFSET.wrapping_sub(MAGIC.to_bits() as i32));
    // Four numbers of four bytes to four digits of four numbers.
    let transpose =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for digits in digits.chunks_exact_mut(HALF) {
        // SAFETY: `digits` has 8 elements of 4 bytes.
        unsafe {
            let x = _mm256_loadu_ps(digits.as_ptr().cast());
            let x = _mm256_castps_si256(_mm256_fmadd_ps(x, _mm256_set1_ps(units), magic));
            let x = _mm256_xor_si256(_mm256_add_epi32(x, unmagic), offset);
            _mm256_storeu_si256(digits.as_mut_ptr().cast(), _mm256_shuffle_epi8(x, transpose));
        }
    }
    Factor { step: if units > 0.0 { largest / UNITS } else { 0.0 }, bias }
}
