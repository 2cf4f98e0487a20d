//! AVX2: `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs into 16 bits, with saturation, so the
//! operands are chosen to stay below it.
//!
//! * 4-bit codes: a pair is at most 2 * 15 * 127 = 3,810; all eight pairs of a block fit 16 bits.
//! * 8-bit codes: the weight's absolute value times the activation with the weight's sign is at most
//!   2 * 128 * 127 = 32,512; every pair is widened at once.

use std::arch::x86_64::*;

use super::{Kernel, Panel, Tile};
use crate::packed::activations::ActivationBlock;
use crate::packed::layout::{Layout, Line, PANEL, Scales};

pub(in crate::packed) struct Avx2;

impl Kernel for Avx2 {
    const PANELS: usize = 1;

    unsafe fn tile<L: Layout, const R: usize, const P: usize>(
        panels: [Panel<'_>; P],
        x: [&[ActivationBlock]; R],
        blocks: usize,
    ) -> Tile<R, P> {
        let mut out = [[[0.0; PANEL]; P]; R];
        for (p, panel) in panels.into_iter().enumerate() {
            // SAFETY: the caller vouches for the instructions.
            let rows = unsafe { panel_tile::<L, R>(panel, x, blocks) };
            for (out, row) in out.iter_mut().zip(rows) {
                out[p] = row;
            }
        }
        out
    }
}

/// Half a line: four inputs of eight output rows.
#[inline]
#[target_feature(enable = "avx2")]
fn load_half(line: &Line, half: usize) -> __m256i {
    let (halves, _) = line.0.as_chunks::<32>();
    // SAFETY: half a line is 32 bytes, aligned to 32.
    unsafe { _mm256_load_si256((&raw const halves[half]).cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_half_scales(scales: &Scales, half: usize) -> __m256 {
    let (halves, _) = scales.0.as_chunks::<8>();
    // SAFETY: eight f16 are 16 bytes, aligned to 16.
    _mm256_cvtph_ps(unsafe { _mm_load_si128((&raw const halves[half]).cast()) })
}

#[target_feature(enable = "avx2,fma,f16c")]
fn panel_tile<L: Layout, const R: usize>(
    panel: Panel<'_>,
    x: [&[ActivationBlock]; R],
    blocks: usize,
) -> [[f32; PANEL]; R] {
    let lines = &panel.lines[..blocks * L::LINES];
    let scales = &panel.scales[..blocks * L::SCALES];
    let x: [&[ActivationBlock]; R] = std::array::from_fn(|r| &x[r][..blocks]);

    let nibble = _mm256_set1_epi8(0xf);
    let sign_bit = _mm256_set1_epi8(-128);
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for b in 0..blocks {
        let mut xb = [&x[0][b]; R];
        for r in 1..R {
            xb[r] = &x[r][b];
        }
        // Sums of pairs in 16 bits (4-bit codes) or of fours in 32 bits (8-bit codes).
        let mut dots = [[_mm256_setzero_si256(); 2]; R];
        for g in 0..L::LINES {
            let line = &lines[b * L::LINES + g];
            for half in 0..2 {
                let codes = load_half(line, half);
                if L::NIBBLES {
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble);
                    let low = _mm256_and_si256(codes, nibble);
                    for r in 0..R {
                        let pairs = _mm256_add_epi16(
                            _mm256_maddubs_epi16(low, _mm256_set1_epi32(xb[r].four(g))),
                            _mm256_maddubs_epi16(high, _mm256_set1_epi32(xb[r].four(4 + g))),
                        );
                        dots[r][half] = _mm256_add_epi16(dots[r][half], pairs);
                    }
                } else {
                    let weights = _mm256_xor_si256(codes, sign_bit);
                    let absolute = _mm256_abs_epi8(weights);
                    for r in 0..R {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(xb[r].four(g)), weights);
                        let pairs = _mm256_maddubs_epi16(absolute, signed);
                        dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
        }
        for half in 0..2 {
            let d = load_half_scales(&scales[b * L::SCALES], half);
            for r in 0..R {
                let mut dot = dots[r][half];
                if L::NIBBLES {
                    dot = _mm256_madd_epi16(dot, ones);
                    // The bytes of 8-bit codes were made signed above, which takes their zero code off.
                    dot = _mm256_add_epi32(dot, _mm256_set1_epi32(L::ZERO * xb[r].negative_sum));
                }
                let dot = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(xb[r].scale));
                sums[r][half] = _mm256_fmadd_ps(dot, d, sums[r][half]);
            }
            if L::MINIMUM {
                let m = load_half_scales(&scales[b * L::SCALES + 1], half);
                for r in 0..R {
                    let sum = _mm256_set1_ps(xb[r].weighted_sum);
                    sums[r][half] = _mm256_fmadd_ps(m, sum, sums[r][half]);
                }
            }
        }
    }

    let mut out = [[0.0; PANEL]; R];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: eight floats are 32 bytes, and `out` has two times eight.
            unsafe { _mm256_storeu_ps(out[8 * half..8 * half + 8].as_mut_ptr(), sum) };
        }
    }
    out
}
