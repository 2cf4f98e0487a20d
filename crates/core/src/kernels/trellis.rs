//! Trellis codes to levels: a byte for every code, in the layout of codes of eight bits.
//!
//! The level of a code is `levels[w]`, w being its [`WINDOW`] low bits after the codes before it: `code | before << b |
//! the one before that << 2b ...` for codes of b bits. Codes before the first are 0. Whatever a kernel reads it can
//! decode from the codes that lie beside it; see the page of mathematics on why that is worth it. A table that repeats
//! itself every 2^b levels makes codes stand for levels of their own, whatever came before; so do codes of four bits,
//! of which a window has room for no second one.

use std::ops::Range;

use super::{Codes, Digits, Isa, LANES, Set, Sums, get_code, padded, strip_bytes};

/// Bits that choose a level.
pub(crate) const WINDOW: usize = 6;
/// Levels.
pub(crate) const STATES: usize = 1 << WINDOW;

/// What codes stand for.
#[derive(Clone, Copy)]
pub(crate) struct Trellis<'a> {
    /// By window.
    pub(crate) levels: &'a [u8; STATES],
    /// Codes follow each other along the lanes of all strips of a set, instead of along the steps of a strip.
    pub(crate) along_lanes: bool,
}

/// Bytes of levels at a time: they are to be in the first-level cache when the product comes to them.
const AT_ONCE: usize = 16 << 10;

/// [`super::codes`] over levels, a few strips at a time, which are expanded to `room`.
pub(super) fn products(isa: Isa, m: Codes, trellis: Trellis<'_>, w: Digits, out: Sums, room: &mut Vec<u8>) {
    let bytes = strip_bytes(8, m.steps, m.width);
    let most = (AT_ONCE / (m.runs * bytes)).max(1);
    let padded = padded(m.steps * m.runs);
    let mut at = 0;
    while at < m.strips {
        let set = at / m.per_set;
        let strips = most.min(m.strips - at).min((set + 1) * m.per_set - at);
        let all = strips * m.runs * bytes;
        if room.len() < all {
            room.resize(all, 0);
        }
        expand(isa, &m, at..at + strips, trellis, room);
        let levels = Codes {
            bits: 8,
            codes: &room[..all],
            next: &[],
            strips,
            stride: m.runs * bytes,
            run_stride: bytes,
            per_set: strips,
            lanes: m.lanes.map(|(scale, zero)| (&scale[at * LANES..], &zero[at * LANES..])),
            trellis: None,
            ..m
        };
        let k = set * w.rows;
        let w = Digits { digits: &w.digits[k * padded..], factors: &w.factors[k..], ..w };
        super::codes(isa, levels, w, Sums { y: &mut out.y[at * LANES..], stride: out.stride });
        at += strips;
    }
}

/// Levels of some strips, written to `out` as codes of eight bits are.
fn expand(isa: Isa, m: &Codes, strips: Range<usize>, trellis: Trellis<'_>, out: &mut [u8]) {
    if m.width < LANES {
        return narrow(m, trellis, out);
    }
    match isa.set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the instructions, `super::codes` has checked that the strips are there, and `out` has
        // room for their levels.
        Set::Avx512 if avx512::has() => unsafe { avx512::expand(m, strips, trellis, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction set is active only on machines that have it, and AVX-512 has AVX2.
        Set::Avx512 | Set::Avx2 => unsafe { avx2::expand(m, strips, trellis, out) },
        #[cfg(target_arch = "aarch64")]
        Set::Neon => wide(m, strips, trellis, out, &neon::look_up(trellis.levels)),
        Set::Scalar => {
            wide(m, strips, trellis, out, &|windows| windows.map(|w| trellis.levels[usize::from(w)]))
        }
    }
}

/// A strip of fewer than 16 lanes, code by code.
fn narrow(m: &Codes, trellis: Trellis<'_>, out: &mut [u8]) {
    let bytes = strip_bytes(8, m.steps, m.width);
    let mask = (STATES - 1) as u8;
    // Windows by lane, or by step.
    let mut windows = vec![0_u8; m.steps.max(LANES)];
    for run in 0..m.runs {
        windows.fill(0);
        let codes = &m.codes[run * m.run_stride..];
        let out = &mut out[run * bytes..][..bytes];
        for step in 0..m.steps {
            for lane in 0..m.width {
                let code = get_code(codes, m.bits, (m.steps, m.width), (step, lane));
                let window = &mut windows[if trellis.along_lanes { step } else { lane }];
                *window = (*window << m.bits | code) & mask;
                out[(step / 4 * m.width + lane) * 4 + step % 4] = trellis.levels[usize::from(*window)];
            }
        }
    }
}

/// A byte for each of 16 lanes and four steps, a lane's in a number.
type Four = [u32; LANES];

/// Strips of 16 lanes, with `look_up` giving the levels of 64 windows.
#[inline(always)]
fn wide(
    m: &Codes,
    strips: Range<usize>,
    trellis: Trellis<'_>,
    out: &mut [u8],
    look_up: &impl Fn([u8; 64]) -> [u8; 64],
) {
    match m.bits {
        1 => wide_of::<1>(m, strips, trellis, out, look_up),
        2 => wide_of::<2>(m, strips, trellis, out, look_up),
        4 => wide_of::<4>(m, strips, trellis, out, look_up),
        _ => wide_of::<3>(m, strips, trellis, out, look_up),
    }
}

#[inline(always)]
fn wide_of<const BITS: usize>(
    m: &Codes,
    strips: Range<usize>,
    trellis: Trellis<'_>,
    out: &mut [u8],
    look_up: &impl Fn([u8; 64]) -> [u8; 64],
) {
    let fours = m.steps.div_ceil(4);
    let bytes = strip_bytes(8, m.steps, LANES);
    for (i, strip) in strips.enumerate() {
        for run in 0..m.runs {
            let at = strip * m.stride + run * m.run_stride;
            let before = (strip % m.per_set > 0).then(|| &m.codes[at - m.stride..]);
            let out = out[(i * m.runs + run) * bytes..][..bytes].chunks_exact_mut(64);
            let (mut last, mut second) = ([0; LANES], [0; LANES]);
            for (four, out) in out.enumerate() {
                let own = codes::<BITS>(&m.codes[at..], fours, four);
                let mut window = own;
                // The codes of one step or lane further back each time.
                for back in 1..WINDOW / BITS {
                    let shift = (BITS * back) as u32;
                    if trellis.along_lanes {
                        let old = before.map_or([0; LANES], |x| codes::<BITS>(x, fours, four));
                        for lane in 0..LANES {
                            let code = if lane < back { old[LANES + lane - back] } else { own[lane - back] };
                            window[lane] |= code << shift;
                        }
                    } else {
                        let bits = 8 * (back % 4) as u32;
                        let (new, old) = if back < 4 { (&own, &last) } else { (&last, &second) };
                        for lane in 0..LANES {
                            let carried = if bits > 0 { old[lane] >> (32 - bits) } else { 0 };
                            window[lane] |= (new[lane] << bits | carried) << shift;
                        }
                    }
                }
                (last, second) = (own, last);
                let mut windows = [0; 64];
                for (bytes, window) in windows.chunks_exact_mut(4).zip(window) {
                    bytes.copy_from_slice(&window.to_le_bytes());
                }
                out.copy_from_slice(&look_up(windows));
            }
        }
    }
}

/// Four `four` of a strip.
#[inline(always)]
fn codes<const BITS: usize>(strip: &[u8], fours: usize, four: usize) -> Four {
    let plane = |first: usize, per: usize, bits: usize| -> Four {
        let bytes = &strip[(first + four / per) * 64..][..64];
        let mask = ((1_u32 << bits) - 1) * 0x0101_0101;
        std::array::from_fn(|lane| {
            let byte = |i: usize| bytes[4 * lane + i];
            u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]) >> (four % per * bits) & mask
        })
    };
    match BITS {
        1 => plane(0, 8, 1),
        2 => plane(0, 4, 2),
        4 => plane(0, 2, 4),
        _ => {
            let (low, third) = (plane(0, 4, 2), plane(fours.div_ceil(4), 8, 1));
            std::array::from_fn(|lane| low[lane] | third[lane] << 2)
        }
    }
}

/// With byte shuffles within 16 bytes: four of them, of which two bits of the window choose.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use std::ops::Range;

    use super::{Codes, STATES, Trellis, wide};

    /// See [`super::expand`].
    #[target_feature(enable = "avx2")]
    pub(super) fn expand(m: &Codes, strips: Range<usize>, trellis: Trellis<'_>, out: &mut [u8]) {
        wide(m, strips, trellis, out, &|windows| look_up(trellis.levels, windows));
    }

    #[target_feature(enable = "avx2")]
    fn look_up(levels: &[u8; STATES], windows: [u8; 64]) -> [u8; 64] {
        let table = |i: usize| {
            // SAFETY: sixteen of the 64 bytes.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(levels.as_ptr().add(16 * i).cast()) })
        };
        let mut out = [0; 64];
        for half in 0..2 {
            // SAFETY: half of the 64 bytes.
            let w = unsafe { _mm256_loadu_si256(windows.as_ptr().add(32 * half).cast()) };
            // The bit that chooses goes to the top of its byte, where blends look for it.
            let (fifth, sixth) = (_mm256_slli_epi16::<3>(w), _mm256_slli_epi16::<2>(w));
            let place = _mm256_and_si256(w, _mm256_set1_epi8(15));
            let of = |i: usize| _mm256_shuffle_epi8(table(i), place);
            let low = _mm256_blendv_epi8(of(0), of(1), fifth);
            let high = _mm256_blendv_epi8(of(2), of(3), fifth);
            let level = _mm256_blendv_epi8(low, high, sixth);
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(32 * half).cast(), level) };
        }
        out
    }
}

/// With a look-up in 64 bytes, sixteen at a time.
#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::STATES;

    /// The levels of windows.
    pub(super) fn look_up(levels: &[u8; STATES]) -> impl Fn([u8; 64]) -> [u8; 64] {
        |windows| {
            let mut out = [0; 64];
            // SAFETY: NEON is part of the architecture; 64 bytes are read from each array and written.
            unsafe {
                let table = vld1q_u8_x4(levels.as_ptr());
                for part in (0..64).step_by(16) {
                    let level = vqtbl4q_u8(table, vld1q_u8(windows.as_ptr().add(part)));
                    vst1q_u8(out.as_mut_ptr().add(part), level);
                }
            }
            out
        }
    }
}

/// With vectors of a byte for each of 16 lanes and four steps: windows are put together from vectors shifted by steps
/// or by lanes, and a level is one permutation of the 64 bytes of the table.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::ops::Range;
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
    pub(super) unsafe fn expand(m: &Codes, range: Range<usize>, trellis: Trellis<'_>, out: &mut [u8]) {
        // SAFETY: the caller's promises.
        unsafe {
            match m.bits {
                1 => strips::<1>(m, range, trellis, out),
                2 => strips::<2>(m, range, trellis, out),
                4 => strips::<4>(m, range, trellis, out),
                _ => strips::<3>(m, range, trellis, out),
            }
        }
    }

    /// Fours of one step of the loop: as many as the widest plane has in a vector.
    const FOURS: usize = 8;

    /// Codes of four `FOURS * u + q` of a strip of `fours`.
    ///
    /// # Safety
    /// The strip lies at `x` and has that four.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn codes<const BITS: usize>(x: *const u8, fours: usize, u: usize, q: usize) -> __m512i {
        // SAFETY: vector v of a plane lies within the strip.
        let load = |v: usize| unsafe { _mm512_loadu_si512(x.add(v * VECTOR).cast()) };
        // A constant where the loop over q is unrolled.
        let right = |x: __m512i, by: usize| _mm512_srl_epi16(x, _mm_cvtsi32_si128(by as i32));
        match BITS {
            1 => _mm512_and_si512(right(load(u), q), _mm512_set1_epi8(1)),
            2 => _mm512_and_si512(right(load(2 * u + q / 4), q % 4 * 2), _mm512_set1_epi8(3)),
            4 => _mm512_and_si512(right(load(4 * u + q / 2), q % 2 * 4), _mm512_set1_epi8(15)),
            _ => {
                // Two bits, and the third of each code in a plane of its own.
                let low = _mm512_and_si512(right(load(2 * u + q / 4), q % 4 * 2), _mm512_set1_epi8(3));
                let third = _mm512_and_si512(right(load(fours.div_ceil(4) + u), q), _mm512_set1_epi8(1));
                _mm512_or_si512(low, _mm512_slli_epi16::<2>(third))
            }
        }
    }

    /// # Safety
    /// As [`expand`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn strips<const BITS: usize>(
        m: &Codes,
        range: Range<usize>,
        trellis: Trellis<'_>,
        out: &mut [u8],
    ) {
        // SAFETY: 64 bytes.
        let table = unsafe { _mm512_loadu_si512(trellis.levels.as_ptr().cast()) };
        let fours = m.steps.div_ceil(4);
        let bytes = strip_bytes(8, m.steps, LANES);
        let zero = _mm512_setzero_si512();
        for (i, strip) in range.enumerate() {
            let first = strip % m.per_set == 0;
            for run in 0..m.runs {
                let at = strip * m.stride + run * m.run_stride;
                if m.next.len() == m.codes.len() {
                    let own = &m.next[at..][..strip_bytes(BITS as u8, m.steps, LANES)];
                    own.chunks(VECTOR).for_each(|line| prefetch_line(line.as_ptr()));
                }
                // SAFETY: the strip and the one before it are there.
                let (x, before) = unsafe {
                    let x = m.codes.as_ptr().add(at);
                    (x, if first { x } else { x.sub(m.stride) })
                };
                // SAFETY: `out` has room for the levels of all strips and runs.
                let to = unsafe { out.as_mut_ptr().add((i * m.runs + run) * bytes) };
                let (mut last, mut second) = (zero, zero);
                let mut write = |u: usize, q: usize| {
                    // SAFETY: a four of the strip, or of the one before, whose levels have room in `out`.
                    unsafe {
                        let code = codes::<BITS>(x, fours, u, q);
                        let window = if trellis.along_lanes {
                            let old = if first { zero } else { codes::<BITS>(before, fours, u, q) };
                            along_lanes::<BITS>(code, old)
                        } else {
                            let window = along_steps::<BITS>(code, last, second);
                            (last, second) = (code, last);
                            window
                        };
                        let level = _mm512_permutexvar_epi8(window, table);
                        _mm512_storeu_si512(to.add((FOURS * u + q) * VECTOR).cast(), level);
                    }
                };
                for u in 0..fours / FOURS {
                    (0..FOURS).for_each(|q| write(u, q));
                }
                (0..fours % FOURS).for_each(|q| write(fours / FOURS, q));
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
            4 => x,
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
            4 => x,
            _ => joined::<3>(x, one, _mm512_setzero_si512()),
        }
    }
}
