//! AVX-512 with VNNI: `vpdpbusd` multiplies unsigned weight codes with signed activations, four inputs of sixteen
//! output rows at a time, and adds into 32 bits without saturation.

use std::arch::x86_64::*;

use super::{Kernel, Panel, Tile};
use crate::packed::activations::ActivationBlock;
use crate::packed::layout::{Layout, Line, PANEL, Scales};

pub(in crate::packed) struct Avx512;

impl Kernel for Avx512 {
    const PANELS: usize = 2;

    unsafe fn tile<L: Layout, const R: usize, const P: usize>(
        panels: [Panel<'_>; P],
        x: [&[ActivationBlock]; R],
        blocks: usize,
    ) -> Tile<R, P> {
        // SAFETY: the caller vouches for the instructions.
        unsafe { tile::<L, R, P>(panels, x, blocks) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512((&raw const line.0).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_scales(scales: &Scales) -> __m512 {
    // SAFETY: sixteen f16 are 32 bytes, aligned to 32.
    _mm512_cvtph_ps(unsafe { _mm256_load_si256((&raw const scales.0).cast()) })
}

/// Asks for what lies `distance` elements after `data`: the same block of the panels that come next. The hardware
/// prefetcher alone loses its way from panel to panel (measured: 1.4 times the time for 2 to 8 rows).
#[inline]
#[target_feature(enable = "sse")]
// The intrinsic has become safe since the minimum version of Rust.
#[allow(unused_unsafe)]
fn prefetch_ahead<T>(data: &[T], distance: usize) {
    // One request per cache line, and for a shorter piece all the same.
    let step = (64 / size_of::<T>()).max(1);
    for i in (0..data.len()).step_by(step) {
        // SAFETY: prefetching an address never faults; at the end of the matrix it is that of something else.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().wrapping_add(i + distance).cast()) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<L: Layout, const R: usize, const P: usize>(
    panels: [Panel<'_>; P],
    x: [&[ActivationBlock]; R],
    blocks: usize,
) -> Tile<R, P> {
    // One check here instead of one per block; without closures, which would be calls.
    let mut lines = [&panels[0].lines[..blocks * L::LINES]; P];
    let mut scales = [&panels[0].scales[..blocks * L::SCALES]; P];
    for p in 1..P {
        lines[p] = &panels[p].lines[..blocks * L::LINES];
        scales[p] = &panels[p].scales[..blocks * L::SCALES];
    }
    let mut x = x;
    x.iter_mut().for_each(|x| *x = &x[..blocks]);

    let nibble = _mm512_set1_epi8(0xf);
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    for b in 0..blocks {
        let mut xb = [&x[0][b]; R];
        for r in 1..R {
            xb[r] = &x[r][b];
        }
        let mut dots = [[_mm512_setzero_si512(); P]; R];
        for r in 0..R {
            let start = _mm512_set1_epi32(xb[r].negative_sum);
            dots[r] = [match L::ZERO {
                0 => _mm512_setzero_si512(),
                8 => _mm512_slli_epi32::<3>(start),
                128 => _mm512_slli_epi32::<7>(start),
                zero => _mm512_mullo_epi32(start, _mm512_set1_epi32(zero)),
            }; P];
        }
        for p in 0..P {
            prefetch_ahead(&lines[p][b * L::LINES..(b + 1) * L::LINES], P * lines[p].len());
            prefetch_ahead(&scales[p][b * L::SCALES..(b + 1) * L::SCALES], P * scales[p].len());
        }
        for g in 0..L::LINES {
            let mut codes = [_mm512_setzero_si512(); P];
            for p in 0..P {
                codes[p] = load(&lines[p][b * L::LINES + g]);
            }
            if L::NIBBLES {
                let mut high = codes;
                for p in 0..P {
                    high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes[p]), nibble);
                    codes[p] = _mm512_and_si512(codes[p], nibble);
                }
                for r in 0..R {
                    let x_low = _mm512_set1_epi32(xb[r].four(g));
                    let x_high = _mm512_set1_epi32(xb[r].four(4 + g));
                    for p in 0..P {
                        dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], codes[p], x_low);
                        dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], high[p], x_high);
                    }
                }
            } else {
                for r in 0..R {
                    let x = _mm512_set1_epi32(xb[r].four(g));
                    for p in 0..P {
                        dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], codes[p], x);
                    }
                }
            }
        }
        for p in 0..P {
            let d = load_scales(&scales[p][b * L::SCALES]);
            for r in 0..R {
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][p]), _mm512_set1_ps(xb[r].scale));
                sums[r][p] = _mm512_fmadd_ps(dot, d, sums[r][p]);
            }
            if L::MINIMUM {
                let m = load_scales(&scales[p][b * L::SCALES + 1]);
                for r in 0..R {
                    sums[r][p] = _mm512_fmadd_ps(m, _mm512_set1_ps(xb[r].weighted_sum), sums[r][p]);
                }
            }
        }
    }

    let mut out = [[[0.0; PANEL]; P]; R];
    for r in 0..R {
        for p in 0..P {
            // SAFETY: sixteen floats are 64 bytes.
            unsafe { _mm512_storeu_ps(out[r][p].as_mut_ptr(), sums[r][p]) };
        }
    }
    out
}
