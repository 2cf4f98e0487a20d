//! Trellis codes to levels: a byte for every code, in the layout of codes of eight bits.
//!
//! The level of a code is `levels[w]`, w being its [`WINDOW`] low bits after the codes before it: `code | before << b |
//! the one before that << 2b ...` for codes of b bits. Codes before the first are 0. Whatever a kernel reads it can
//! decode from the codes that lie beside it; see the page of mathematics on why that is worth it. A table that repeats
//! itself every 2^b levels makes codes stand for levels of their own, whatever came before; so do codes of four bits,
//! of which a window has room for no second one.

use std::cell::RefCell;
use std::ops::Range;

use super::lines::{Line, prefetch_line, view, view_mut};
use super::{Codes, Digits, Isa, LANES, Set, Sums, get_code, padded, strip_bytes};

#[cfg(target_arch = "x86_64")]
mod avx512;

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

thread_local! {
    /// Levels, a byte each; vectors of them do not cross lines.
    static LEVELS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// [`super::codes`] over levels.
pub(super) fn products(isa: Isa, m: Codes, trellis: Trellis<'_>, w: Digits, out: Sums) {
    #[cfg(target_arch = "x86_64")]
    if isa.set() == Set::Avx512 && m.width == LANES && avx512::has() {
        let levels = &by_fields(m.bits, trellis.levels);
        // SAFETY: the machine has the instructions, and [`super::codes`] has checked what is asked for.
        return unsafe { avx512::products(m, Trellis { levels, ..trellis }, w, out) };
    }
    // Taken out while in use, as all working memory of a thread.
    let mut room = LEVELS.take();
    expanded(isa, m, trellis, w, out, &mut room);
    LEVELS.set(room);
}

/// [`super::codes`] over levels of a few strips at a time, which are expanded to `room`.
fn expanded(isa: Isa, m: Codes, trellis: Trellis<'_>, w: Digits, out: Sums, room: &mut Vec<Line>) {
    let bytes = strip_bytes(8, m.steps, m.width);
    let most = (AT_ONCE / (m.runs * bytes)).max(1);
    let padded = padded(m.steps * m.runs);
    let mut at = 0;
    while at < m.strips {
        let set = at / m.per_set;
        let strips = most.min(m.strips - at).min((set + 1) * m.per_set - at);
        let all = strips * m.runs * bytes;
        if room.len() < Line::count(all) {
            room.resize(Line::count(all), Line::ZERO);
        }
        expand(isa, &m, at..at + strips, trellis, view_mut(room));
        let levels = Codes {
            bits: 8,
            codes: &view(room)[..all],
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
    let levels = &by_fields(m.bits, trellis.levels);
    let trellis = Trellis { levels, ..trellis };
    match isa.set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction set is active only on machines that have it, and AVX-512 has AVX2.
        Set::Avx512 | Set::Avx2 => unsafe { avx2::expand(m, strips, trellis, out) },
        #[cfg(target_arch = "aarch64")]
        Set::Neon => wide(m, strips, trellis, out, &neon::look_up(levels)),
        Set::Scalar => wide(m, strips, trellis, out, &|windows: Four| {
            windows.map(|four| u32::from_le_bytes(four.to_le_bytes().map(|w| levels[usize::from(w & 63)])))
        }),
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

/// The levels by the windows of [`window`], which of codes of three bits have the two low bits of both before their third.
fn by_fields(bits: u8, levels: &[u8; STATES]) -> [u8; STATES] {
    match bits {
        3 => std::array::from_fn(|i| levels[i & 3 | i >> 2 & 4 | i << 1 & 24 | i & 32]),
        _ => *levels,
    }
}

/// A vector of a strip: bytes, four for each of 16 lanes. Shifts are of whole bytes' fields: what crosses from one byte to
/// another is masked afterwards.
trait Vector: Copy {
    fn load(bytes: &[u8; VECTOR]) -> Self;
    fn zero() -> Self;
    fn left<const N: u32>(self) -> Self;
    fn right<const N: u32>(self) -> Self;
    /// Of each byte the bits of `mask` of `a`, the others of `b`.
    fn select(mask: u8, a: Self, b: Self) -> Self;
    /// Lanes shifted left by N bits, with the high bits of the lanes of `before` coming in.
    fn lanes_left<const N: i32>(self, before: Self) -> Self;
    /// Lanes 16 - N higher, with the last ones of `before` coming in.
    fn later<const N: i32>(self, before: Self) -> Self;
}

/// Bytes of a vector.
const VECTOR: usize = 64;

/// Strips of 16 lanes, with `look_up` giving the levels of the six low bits of each byte.
#[inline(always)]
fn wide(
    m: &Codes,
    strips: Range<usize>,
    trellis: Trellis<'_>,
    out: &mut [u8],
    look_up: &impl Fn(Four) -> Four,
) {
    match (m.bits, trellis.along_lanes) {
        (1, false) => wide_of::<1, false>(m, strips, out, look_up),
        (1, true) => wide_of::<1, true>(m, strips, out, look_up),
        (2, false) => wide_of::<2, false>(m, strips, out, look_up),
        (2, true) => wide_of::<2, true>(m, strips, out, look_up),
        (3, false) => wide_of::<3, false>(m, strips, out, look_up),
        (3, true) => wide_of::<3, true>(m, strips, out, look_up),
        _ => wide_of::<4, false>(m, strips, out, look_up),
    }
}

#[inline(always)]
fn wide_of<const BITS: usize, const LANEWISE: bool>(
    m: &Codes,
    strips: Range<usize>,
    out: &mut [u8],
    look_up: &impl Fn(Four) -> Four,
) {
    let bytes = strip_bytes(8, m.steps, LANES);
    for (i, strip) in strips.enumerate() {
        for run in 0..m.runs {
            let out = &mut out[(i * m.runs + run) * bytes..][..bytes];
            each_window::<Four, BITS, LANEWISE>(m, strip, run, |four, windows| {
                if let Some(bytes) = out.get_mut(four * VECTOR..).and_then(<[u8]>::first_chunk_mut) {
                    store(look_up(windows), bytes);
                }
            });
        }
    }
}

/// The windows of a run of a strip, four steps at a time: their low bits, and anything above those. Fours beyond the last
/// come too, up to the end of a vector: loops of one length are unrolled, and shifts constants.
///
/// A byte of a plane holds codes of one lane and one step of several fours. Windows are put together while they lie so:
/// planes are shifted by steps or lanes and woven into pairs and nibbles, of which each four takes its own.
#[inline(always)]
fn each_window<V: Vector, const BITS: usize, const LANEWISE: bool>(
    m: &Codes,
    strip: usize,
    run: usize,
    mut give: impl FnMut(usize, V),
) {
    let fours = m.steps.div_ceil(4);
    let first = strip.is_multiple_of(m.per_set);
    let at = strip * m.stride + run * m.run_stride;
    let held = strip_bytes(BITS as u8, m.steps, LANES);
    if m.next.len() == m.codes.len() {
        m.next[at..at + held].chunks(VECTOR).for_each(|line| prefetch_line(line.as_ptr()));
    }
    let own = &m.codes[at..at + held];
    let before = if first { own } else { &m.codes[at - m.stride..][..held] };
    let vector = |x: &[u8], v: usize| match x[v * VECTOR..].first_chunk() {
        Some(bytes) => V::load(bytes),
        None => V::zero(),
    };
    // Vector v, of the plane that begins with vector `plane`, and where its first codes have those before them: in the
    // strip before, or at the end of the plane's vector before.
    let load = |v: usize, plane: usize| {
        let other = match LANEWISE {
            true if !first => vector(before, v),
            false if v > plane => vector(own, v - 1),
            _ => V::zero(),
        };
        (vector(own, v), other)
    };
    match BITS {
        1 => {
            for u in 0..fours.div_ceil(8) {
                let x = load(u, 0);
                let [one, two, three, four, five] = back::<V, 1, LANEWISE>(x);
                let (low, high) = (woven::<V, 1>(x.0, one), woven::<V, 1>(two, three));
                let (even, odd) = (woven::<V, 2>(low[0], high[0]), woven::<V, 2>(low[1], high[1]));
                let nibbles = [even[0], odd[0], even[1], odd[1]];
                let pairs = woven::<V, 1>(four, five);
                for q in 0..8 {
                    give(8 * u + q, window((nibbles[q % 4], q / 4), (pairs[q % 2], q / 2)));
                }
            }
        }
        2 => {
            for v in 0..fours.div_ceil(4) {
                let x = load(v, 0);
                let [one, two, ..] = back::<V, 2, LANEWISE>(x);
                let nibbles = woven::<V, 2>(x.0, one);
                for q in 0..4 {
                    give(4 * v + q, window((nibbles[q % 2], q / 2), (two, q)));
                }
            }
        }
        3 => {
            let third = fours.div_ceil(4);
            for u in 0..fours.div_ceil(8) {
                let x = load(third + u, third);
                let pairs = woven::<V, 1>(x.0, back::<V, 1, LANEWISE>(x)[0]);
                for half in 0..2 {
                    let v = 2 * u + half;
                    let x = load(v.min(third - 1), 0);
                    let nibbles = woven::<V, 2>(x.0, back::<V, 2, LANEWISE>(x)[0]);
                    for q in 0..4 {
                        let pair = (pairs[q % 2], 2 * half + q / 2);
                        give(4 * v + q, window((nibbles[q % 2], q / 2), pair));
                    }
                }
            }
        }
        _ => (0..fours).for_each(|four| {
            give(four, window((load(four / 2, 0).0, four % 2), (V::zero(), 0)));
        }),
    }
}

/// Of each byte a nibble, and above it one of four pairs of bits. The two bits above those are anything.
#[inline(always)]
fn window<V: Vector>((nibbles, nibble): (V, usize), (pairs, pair): (V, usize)) -> V {
    let low = if nibble == 0 { nibbles } else { nibbles.right::<4>() };
    let high = match pair {
        0 => pairs.left::<4>(),
        1 => pairs.left::<2>(),
        2 => pairs,
        _ => pairs.right::<2>(),
    };
    V::select(0x0f, low, high)
}

/// Fields of `B` bits of `a`, each with that of `b` above it: the even ones, and the odd ones.
#[inline(always)]
fn woven<V: Vector, const B: u32>(a: V, b: V) -> [V; 2] {
    let mask = if B == 1 { 0x55 } else { 0x33 };
    [V::select(mask, a, b.left::<B>()), V::select(mask, a.right::<B>(), b)]
}

/// A plane of codes of `B` bits, one to five codes further back each time.
#[inline(always)]
fn back<V: Vector, const B: u32, const LANEWISE: bool>((x, before): (V, V)) -> [V; 5] {
    if LANEWISE {
        return [
            x.later::<15>(before),
            x.later::<14>(before),
            x.later::<13>(before),
            x.later::<12>(before),
            x.later::<11>(before),
        ];
    }
    // A step back is one byte lower in the lane; before the lowest byte comes the highest, of the four before.
    let (four, eight) = match B {
        1 => {
            let two = V::select(3, before.right::<6>(), x.left::<2>());
            (V::select(1, before.right::<7>(), x.left::<1>()), two)
        }
        _ => (V::select(3, before.right::<6>(), x.left::<2>()), x),
    };
    [
        x.lanes_left::<8>(four),
        x.lanes_left::<16>(four),
        x.lanes_left::<24>(four),
        four,
        four.lanes_left::<8>(eight),
    ]
}

/// A lane's four bytes in a number.
type Four = [u32; LANES];

#[inline(always)]
fn store(four: Four, bytes: &mut [u8; VECTOR]) {
    for (bytes, lane) in bytes.chunks_exact_mut(4).zip(four) {
        bytes.copy_from_slice(&lane.to_le_bytes());
    }
}

impl Vector for Four {
    #[inline(always)]
    fn load(bytes: &[u8; VECTOR]) -> Self {
        std::array::from_fn(|lane| {
            let byte = |i: usize| bytes[4 * lane + i];
            u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
        })
    }

    #[inline(always)]
    fn zero() -> Self {
        [0; LANES]
    }

    #[inline(always)]
    fn left<const N: u32>(self) -> Self {
        self.map(|x| x << N)
    }

    #[inline(always)]
    fn right<const N: u32>(self) -> Self {
        self.map(|x| x >> N)
    }

    #[inline(always)]
    fn select(mask: u8, a: Self, b: Self) -> Self {
        let mask = u32::from_le_bytes([mask; 4]);
        std::array::from_fn(|i| a[i] & mask | b[i] & !mask)
    }

    #[inline(always)]
    fn lanes_left<const N: i32>(self, before: Self) -> Self {
        std::array::from_fn(|i| self[i] << N | before[i] >> (32 - N))
    }

    #[inline(always)]
    fn later<const N: i32>(self, before: Self) -> Self {
        let n = N as usize;
        std::array::from_fn(|i| if i + n < LANES { before[i + n] } else { self[i + n - LANES] })
    }
}

/// With byte shuffles within 16 bytes: four of them, of which two bits of the window choose.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::{Codes, Four, STATES, Trellis, VECTOR, Vector, store, wide};

    /// See [`super::expand`].
    #[target_feature(enable = "avx2")]
    pub(super) fn expand(m: &Codes, strips: Range<usize>, trellis: Trellis<'_>, out: &mut [u8]) {
        wide(m, strips, trellis, out, &|windows| look_up(trellis.levels, windows));
    }

    #[target_feature(enable = "avx2")]
    fn look_up(levels: &[u8; STATES], four: Four) -> Four {
        let table = |i: usize| {
            // SAFETY: sixteen of the 64 bytes.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(levels.as_ptr().add(16 * i).cast()) })
        };
        let (mut windows, mut out) = ([0; VECTOR], [0; VECTOR]);
        store(four, &mut windows);
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
        Four::load(&out)
    }
}

/// With a look-up in 64 bytes, sixteen at a time.
#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{Four, STATES, VECTOR, Vector, store};

    /// The levels of windows.
    pub(super) fn look_up(levels: &[u8; STATES]) -> impl Fn(Four) -> Four {
        |four| {
            let (mut windows, mut out) = ([0; VECTOR], [0; VECTOR]);
            store(four, &mut windows);
            // SAFETY: NEON is part of the architecture; 64 bytes are read from each array and written.
            unsafe {
                let table = vld1q_u8_x4(levels.as_ptr());
                for part in (0..VECTOR).step_by(16) {
                    let window = vandq_u8(vld1q_u8(windows.as_ptr().add(part)), vdupq_n_u8(63));
                    vst1q_u8(out.as_mut_ptr().add(part), vqtbl4q_u8(table, window));
                }
            }
            Four::load(&out)
        }
    }
}
