//! Trellis codes for AVX-512 with byte permutations: one of the table's 64 bytes makes levels of windows, which meet the
//! digits in the registers that they come out in.

// As the other kernels: indices are constants after unrolling.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::super::avx512::finish;
use super::super::{Codes, Digits, Precision, Sums, padded};
use super::{STATES, Trellis, VECTOR, Vector, each_window};

/// Whether the machine has the byte permutations and double shifts that come with some AVX-512 machines only.
pub(super) fn has() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
    })
}

/// See [`super::products`]; full width.
///
/// # Safety
/// As [`super::super::codes`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]
pub(super) unsafe fn products(m: Codes, trellis: Trellis<'_>, w: Digits, out: Sums) {
    let table = trellis.levels;
    // SAFETY: the caller's promise.
    unsafe {
        match (m.bits, trellis.along_lanes) {
            (1, false) => rows::<1, false>(m, table, w, out),
            (1, true) => rows::<1, true>(m, table, w, out),
            (2, false) => rows::<2, false>(m, table, w, out),
            (2, true) => rows::<2, true>(m, table, w, out),
            (3, false) => rows::<3, false>(m, table, w, out),
            (3, true) => rows::<3, true>(m, table, w, out),
            _ => rows::<4, false>(m, table, w, out),
        }
    }
}

/// # Safety
/// As [`products`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]
unsafe fn rows<const BITS: usize, const LANEWISE: bool>(
    m: Codes,
    table: &[u8; STATES],
    w: Digits,
    out: Sums,
) {
    // SAFETY: the caller's promise; as many rows as the digits have.
    unsafe {
        match (w.precision, w.rows) {
            (Precision::Coarse, 1) => strips::<BITS, LANEWISE, 1, 1>(m, table, w, out),
            (Precision::Coarse, 2) => strips::<BITS, LANEWISE, 1, 2>(m, table, w, out),
            (Precision::Coarse, 3) => strips::<BITS, LANEWISE, 1, 3>(m, table, w, out),
            (Precision::Coarse, _) => strips::<BITS, LANEWISE, 1, 4>(m, table, w, out),
            (Precision::Fast, 1) => strips::<BITS, LANEWISE, 2, 1>(m, table, w, out),
            (Precision::Fast, 2) => strips::<BITS, LANEWISE, 2, 2>(m, table, w, out),
            (Precision::Fast, 3) => strips::<BITS, LANEWISE, 2, 3>(m, table, w, out),
            (Precision::Fast, _) => strips::<BITS, LANEWISE, 2, 4>(m, table, w, out),
            (Precision::Exact, 1) => strips::<BITS, LANEWISE, 3, 1>(m, table, w, out),
            (Precision::Exact, 2) => strips::<BITS, LANEWISE, 3, 2>(m, table, w, out),
            (Precision::Exact, 3) => strips::<BITS, LANEWISE, 3, 3>(m, table, w, out),
            (Precision::Exact, _) => strips::<BITS, LANEWISE, 3, 4>(m, table, w, out),
        }
    }
}

/// `D` digits, `R` rows.
///
/// # Safety
/// As [`products`], with that many digits and rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")]
unsafe fn strips<const BITS: usize, const LANEWISE: bool, const D: usize, const R: usize>(
    m: Codes,
    table: &[u8; STATES],
    w: Digits,
    out: Sums,
) {
    let table = Bytes::load(table).0;
    let (y, y_stride) = (out.y.as_mut_ptr(), out.stride);
    let (fours, stride) = (m.steps.div_ceil(4), padded(m.runs * m.steps));
    for strip in 0..m.strips {
        let first = strip / m.per_set * R;
        let mut sums = [[[_mm512_setzero_si512(); D]; 1]; R];
        for run in 0..m.runs {
            // SAFETY: the set and the run exist.
            let digits = unsafe { w.digits.as_ptr().add(first * stride + run * m.steps) };
            each_window::<Bytes, BITS, LANEWISE>(&m, strip, run, |four, windows| {
                if four < fours {
                    let levels = _mm512_permutexvar_epi8(windows.0, table);
                    for r in 0..R {
                        for i in 0..D {
                            // SAFETY: `four` is below a quarter of the padded steps, which each row of digits has.
                            let digit = unsafe { _mm512_set1_epi32(*digits.add(r * stride + four * 4 + i)) };
                            sums[r][0][i] = _mm512_dpbusd_epi32(sums[r][0][i], levels, digit);
                        }
                    }
                }
            });
        }
        // SAFETY: the strip's lanes exist in each output row, and among the scales and zeros.
        unsafe { finish(m.lanes, &w.factors[first..], strip, sums, y, y_stride) };
    }
}

/// Made and worked on in [`products`] alone, all of whose parts become part of it.
#[derive(Clone, Copy)]
struct Bytes(__m512i);

// What uses it has been told that the machine has the instructions, and 64 bytes are 64 bytes.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Bytes {
    #[inline(always)]
    fn load(bytes: &[u8; VECTOR]) -> Self {
        Self(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn zero() -> Self {
        Self(unsafe { _mm512_setzero_si512() })
    }

    #[inline(always)]
    fn left<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_slli_epi16::<N>(self.0) })
    }

    #[inline(always)]
    fn right<const N: u32>(self) -> Self {
        Self(unsafe { _mm512_srli_epi16::<N>(self.0) })
    }

    #[inline(always)]
    fn select(mask: u8, a: Self, b: Self) -> Self {
        Self(unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(mask as i8), a.0, b.0) })
    }

    #[inline(always)]
    fn lanes_left<const N: i32>(self, before: Self) -> Self {
        Self(unsafe { _mm512_shldi_epi32::<N>(self.0, before.0) })
    }

    #[inline(always)]
    fn later<const N: i32>(self, before: Self) -> Self {
        Self(unsafe { _mm512_alignr_epi32::<N>(self.0, before.0) })
    }
}
