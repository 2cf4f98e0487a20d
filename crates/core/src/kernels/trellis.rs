//! Trellis codes to levels: a byte for every code, in the layout of codes of eight bits.
//!
//! The level of a code is `levels[w]`, w being its [`WINDOW`] low bits after the codes before it: `code | before << b |
//! the one before that << 2b ...` for codes of b bits. Codes before the first are 0. Whatever a kernel reads it can
//! decode from the codes that lie beside it; see the page of mathematics on why that is worth it.

use super::{Codes, LANES, get_code, strip_bytes};
#[cfg(target_arch = "x86_64")]
use super::{Isa, Set};

/// Bits that choose a level.
pub(crate) const WINDOW: usize = 6;
/// Levels.
pub(crate) const STATES: usize = 1 << WINDOW;

/// What codes stand for.
#[derive(Clone, Copy)]
pub(crate) struct Trellis {
    /// By window.
    pub(crate) levels: &'static [u8; STATES],
    /// Codes follow each other along the lanes of all strips of a set, instead of along the steps of a strip.
    pub(crate) along_lanes: bool,
}

/// The same strips with levels in place of codes, written to `out`.
pub(super) fn expanded<'a>(
    #[cfg(target_arch = "x86_64")] isa: Isa,
    m: &Codes<'a>,
    trellis: Trellis,
    out: &'a mut Vec<u8>,
) -> Codes<'a> {
    let bytes = strip_bytes(8, m.steps, m.width);
    let all = m.strips * m.runs * bytes;
    if out.len() < all {
        out.resize(all, 0);
    }
    #[cfg(target_arch = "x86_64")]
    let wide = isa.set() == Set::Avx512 && m.width == LANES && avx512::has();
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    if wide {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the instructions, `super::codes` has checked that the strips are there, and `out` has
        // room for their levels.
        unsafe {
            avx512::expand(m, trellis, out);
        }
    } else {
        expand(m, trellis, out);
    }
    Codes {
        bits: 8,
        codes: &out[..all],
        next: &[],
        stride: m.runs * bytes,
        run_stride: bytes,
        trellis: None,
        ..*m
    }
}

/// In plain Rust.
fn expand(m: &Codes, trellis: Trellis, out: &mut [u8]) {
    let bytes = strip_bytes(8, m.steps, m.width);
    let mask = (STATES - 1) as u8;
    // Windows by lane, or by run and step.
    let mut windows = vec![0_u8; if trellis.along_lanes { m.runs * m.steps } else { LANES }];
    for strip in 0..m.strips {
        if trellis.along_lanes && strip % m.per_set == 0 {
            windows.fill(0);
        }
        for run in 0..m.runs {
            let codes = &m.codes[strip * m.stride + run * m.run_stride..];
            let out = &mut out[(strip * m.runs + run) * bytes..][..bytes];
            if !trellis.along_lanes {
                windows.fill(0);
            }
            for step in 0..m.steps {
                for lane in 0..m.width {
                    let code = get_code(codes, m.bits, (m.steps, m.width), (step, lane));
                    let window = &mut windows[if trellis.along_lanes { run * m.steps + step } else { lane }];
                    *window = (*window << m.bits | code) & mask;
                    out[(step / 4 * m.width + lane) * 4 + step % 4] = trellis.levels[usize::from(*window)];
                }
            }
        }
    }
}

/// With vectors of a byte for each of 16 lanes and four steps: windows are put together from vectors shifted by steps
/// or by lanes, and a level is one permutation of the 64 bytes of the table.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::sync::OnceLock;

    use super::super::lines::prefetch_line;
    use super::{Codes, LANES, Trellis, strip_bytes};

    const VECTOR: usize = 64;

    /// Whether the machine has the byte permutations and double shifts that come with some AVX-512 machines only.
    pub(super) fn has() -> bool {
        static HAS: OnceLock<bool> = OnceLock::new();
        *HAS.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2")
        })
    }

    /// # Safety
    /// The machine has the instructions; strips are full, all of them are there, and `out` has room for their levels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    pub(super) unsafe fn expand(m: &Codes, trellis: Trellis, out: &mut [u8]) {
        // SAFETY: the caller's promises.
        unsafe {
            match m.bits {
                1 => strips::<1>(m, trellis, out),
                2 => strips::<2>(m, trellis, out),
                _ => strips::<3>(m, trellis, out),
            }
        }
    }

    /// Codes of four `four` of a strip.
    ///
    /// # Safety
    /// The strip lies at `x`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn codes<const BITS: usize>(x: *const u8, fours: usize, four: usize) -> __m512i {
        // SAFETY: vector v of a plane lies within the strip.
        let load = |v: usize| unsafe { _mm512_loadu_si512(x.add(v * VECTOR).cast()) };
        let right = |x: __m512i, by: usize| _mm512_srl_epi16(x, _mm_cvtsi32_si128(by as i32));
        match BITS {
            1 => _mm512_and_si512(right(load(four / 8), four % 8), _mm512_set1_epi8(1)),
            2 => _mm512_and_si512(right(load(four / 4), four % 4 * 2), _mm512_set1_epi8(3)),
            _ => {
                // Two bits, and the third of each code in a plane of its own.
                let vectors = fours.div_ceil(4);
                let low = _mm512_and_si512(right(load(four / 4), four % 4 * 2), _mm512_set1_epi8(3));
                let third = _mm512_and_si512(right(load(vectors + four / 8), four % 8), _mm512_set1_epi8(1));
                _mm512_or_si512(low, _mm512_slli_epi16::<2>(third))
            }
        }
    }

    /// # Safety
    /// As [`expand`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn strips<const BITS: usize>(m: &Codes, trellis: Trellis, out: &mut [u8]) {
        // SAFETY: 64 bytes.
        let table = unsafe { _mm512_loadu_si512(trellis.levels.as_ptr().cast()) };
        let fours = m.steps.div_ceil(4);
        let bytes = strip_bytes(8, m.steps, LANES);
        let zero = _mm512_setzero_si512();
        for strip in 0..m.strips {
            let first = strip % m.per_set == 0;
            for run in 0..m.runs {
                // SAFETY: the strip and the one before it are there.
                let (x, before) = unsafe {
                    let x = m.codes.as_ptr().add(strip * m.stride + run * m.run_stride);
                    (x, if first { x } else { x.sub(m.stride) })
                };
                if m.next.len() == m.codes.len() {
                    let next = &m.next[strip * m.stride + run * m.run_stride..];
                    let own = &next[..strip_bytes(BITS as u8, m.steps, LANES)];
                    own.chunks(VECTOR).for_each(|line| prefetch_line(line.as_ptr()));
                }
                // SAFETY: `out` has room for the levels of all strips and runs.
                let to = unsafe { out.as_mut_ptr().add((strip * m.runs + run) * bytes) };
                let (mut last, mut second) = (zero, zero);
                for four in 0..fours {
                    // SAFETY: a four of the strip, or of the one before.
                    let code = unsafe { codes::<BITS>(x, fours, four) };
                    let window = if trellis.along_lanes {
                        // SAFETY: as above.
                        let old = if first { zero } else { unsafe { codes::<BITS>(before, fours, four) } };
                        along_lanes::<BITS>(code, old)
                    } else {
                        let window = along_steps::<BITS>(code, last, second);
                        (last, second) = (code, last);
                        window
                    };
                    let level = _mm512_permutexvar_epi8(window, table);
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_si512(to.add(four * VECTOR).cast(), level) };
                }
            }
        }
    }

    /// `a | b << BITS | c << 2 BITS`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn joined<const BITS: usize>(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        // Codes are small enough that shifting pairs of bytes moves nothing from one to the other.
        let (b, c) = match BITS {
            1 => (_mm512_slli_epi16::<1>(b), _mm512_slli_epi16::<2>(c)),
            2 => (_mm512_slli_epi16::<2>(b), _mm512_slli_epi16::<4>(c)),
            _ => (_mm512_slli_epi16::<3>(b), c),
        };
        _mm512_ternarylogic_epi32::<0xfe>(a, b, c)
    }

    /// Windows of codes whose predecessors are one byte lower in the lane, or at the end of the vector before.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn along_steps<const BITS: usize>(x: __m512i, last: __m512i, second: __m512i) -> __m512i {
        let one = _mm512_shldi_epi32::<8>(x, last);
        match BITS {
            1 => {
                let two = _mm512_shldi_epi32::<16>(x, last);
                let three = _mm512_shldi_epi32::<24>(x, last);
                let five = _mm512_shldi_epi32::<8>(last, second);
                let (new, old) = (joined::<1>(x, one, two), joined::<1>(three, last, five));
                _mm512_or_si512(new, _mm512_slli_epi16::<3>(old))
            }
            2 => joined::<2>(x, one, _mm512_shldi_epi32::<16>(x, last)),
            _ => joined::<3>(x, one, _mm512_setzero_si512()),
        }
    }

    /// Windows of codes whose predecessors are one lane lower, or at the end of the strip before.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn along_lanes<const BITS: usize>(x: __m512i, before: __m512i) -> __m512i {
        let one = _mm512_alignr_epi32::<15>(x, before);
        match BITS {
            1 => {
                let two = _mm512_alignr_epi32::<14>(x, before);
                let three = _mm512_alignr_epi32::<13>(x, before);
                let four = _mm512_alignr_epi32::<12>(x, before);
                let five = _mm512_alignr_epi32::<11>(x, before);
                let (new, old) = (joined::<1>(x, one, two), joined::<1>(three, four, five));
                _mm512_or_si512(new, _mm512_slli_epi16::<3>(old))
            }
            2 => joined::<2>(x, one, _mm512_alignr_epi32::<14>(x, before)),
            _ => joined::<3>(x, one, _mm512_setzero_si512()),
        }
    }
}
