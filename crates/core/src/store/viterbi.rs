//! The codes of a trellis that together come nearest to numbers (Viterbi 1967), see [`super::trellis`].
//!
//! A state is the window without its oldest code, S = 64 / 2^b of them for codes of b bits. The window t + S k leads to the
//! state t from the state `t >> b | k << (6 - 2 b)`. The first codes follow zeros. Of equally near ways the first is taken,
//! and every instruction set computes the same sums, so that all find the same codes.

#[cfg(target_arch = "x86_64")]
use crate::kernels::Set;
use crate::kernels::{Isa, STATES};

/// Numbers after which the least cost is taken off all of them: sums stay small, however long the section, and the
/// numbers between do not wait for it.
const RENEWED: usize = 16;

/// Working memory.
#[derive(Default)]
pub(super) struct Room {
    /// Numbers in units of levels.
    pub(super) x: Vec<f32>,
    /// For each number and each state after it, which of the states that lead there was the best.
    ways: Vec<u8>,
    /// The same in a word a number: bit S b + t is bit b of the state t's.
    #[cfg(target_arch = "x86_64")]
    words: Vec<u32>,
}

/// The codes whose levels come nearest to `room.x`.
pub(super) fn nearest(bits: u8, levels: &[f32; STATES], room: &mut Room, codes: &mut [u8]) {
    match Isa::active().set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction set is active only on machines that have it.
        Set::Avx512 => unsafe { avx512::nearest(bits, levels, room, codes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Set::Avx2 => unsafe { nearest_avx2(bits, levels, room, codes) },
        _ => nearest_of(bits, levels, room, codes),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn nearest_avx2(bits: u8, levels: &[f32; STATES], room: &mut Room, codes: &mut [u8]) {
    nearest_of(bits, levels, room, codes);
}

#[inline(always)]
fn nearest_of(bits: u8, levels: &[f32; STATES], room: &mut Room, codes: &mut [u8]) {
    match bits {
        1 => viterbi::<1, 32>(levels, room, codes),
        2 => viterbi::<2, 16>(levels, room, codes),
        _ => viterbi::<3, 8>(levels, room, codes),
    }
}

/// The state before the state t on its k-th way.
#[inline(always)]
fn from<const BITS: usize>(t: usize, k: usize) -> usize {
    if 2 * BITS < 6 { t >> BITS | k << (6 - 2 * BITS) } else { k }
}

/// All states are worked on in the order in which they lie.
#[inline(always)]
fn viterbi<const BITS: usize, const S: usize>(levels: &[f32; STATES], room: &mut Room, codes: &mut [u8]) {
    let Room { x, ways, .. } = room;
    ways.clear();
    ways.resize(x.len() * S, 0);
    let mut cost = [f32::MAX; S];
    cost[0] = 0.0;
    for (i, (&x, ways)) in x.iter().zip(ways.chunks_exact_mut(S)).enumerate() {
        let mut best = [f32::INFINITY; S];
        let mut choice = [0_i32; S];
        for k in 0..STATES / S {
            for t in 0..S {
                let off = x - levels[t + S * k];
                let new = cost[from::<BITS>(t, k)] + off * off;
                let better = new < best[t];
                best[t] = if better { new } else { best[t] };
                choice[t] = if better { k as i32 } else { choice[t] };
            }
        }
        let least = match (i + 1) % RENEWED {
            0 => best.iter().fold(f32::INFINITY, |least, &cost| if cost < least { cost } else { least }),
            _ => 0.0,
        };
        for t in 0..S {
            cost[t] = best[t] - least;
            ways[t] = choice[t] as u8;
        }
    }
    let mut state = cheapest(&cost);
    for (code, ways) in codes.iter_mut().zip(ways.chunks_exact(S)).rev() {
        *code = (state & ((1 << BITS) - 1)) as u8;
        state = from::<BITS>(state, usize::from(ways[state]));
    }
}

/// The state of the least cost, of equal ones the first.
fn cheapest(cost: &[f32]) -> usize {
    (0..cost.len()).min_by(|&a, &b| cost[a].total_cmp(&cost[b])).unwrap_or(0)
}

/// All states in one vector or two; which way was taken is kept in bits.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{RENEWED, Room, STATES, cheapest, from};

    /// See [`super::nearest`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn nearest(bits: u8, levels: &[f32; STATES], room: &mut Room, codes: &mut [u8]) {
        match bits {
            1 => run::<1, 32, 2>(levels, room, codes, |t, x, cost| one(t, x, cost)),
            2 => run::<2, 16, 1>(levels, room, codes, |t, x, cost| two(t, x, cost)),
            _ => run::<3, 8, 1>(levels, room, codes, |t, x, cost| three(t, x, cost)),
        }
    }

    /// Levels of windows, sixteen at a time.
    type Table = [__m512; 4];

    /// Costs in `V` vectors, `step` taking them past a number. Where there are fewer states than lanes, those beyond are
    /// copies.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn run<const BITS: usize, const S: usize, const V: usize>(
        levels: &[f32; STATES],
        room: &mut Room,
        codes: &mut [u8],
        step: impl Fn(&Table, __m512, [__m512; V]) -> ([__m512; V], u32),
    ) {
        let Room { x, words, .. } = room;
        let table: Table = std::array::from_fn(|i| {
            // SAFETY: sixteen of the 64 levels.
            unsafe { _mm512_loadu_ps(levels.as_ptr().add(16 * i)) }
        });
        let table = if S == 8 { by_halves(table) } else { table };
        let mut cost = [_mm512_set1_ps(f32::MAX); V];
        let first = if S == 8 { 0x0101 } else { 1 };
        cost[0] = _mm512_mask_mov_ps(cost[0], first, _mm512_setzero_ps());
        words.clear();
        for (i, &x) in x.iter().enumerate() {
            let (new, word) = step(&table, _mm512_set1_ps(x), cost);
            words.push(word);
            cost = new;
            if (i + 1).is_multiple_of(RENEWED) {
                let least = cost.iter().map(|&cost| _mm512_reduce_min_ps(cost)).fold(f32::INFINITY, f32::min);
                cost = cost.map(|cost| _mm512_sub_ps(cost, _mm512_set1_ps(least)));
            }
        }
        let mut ends = [0.0; 32];
        for (to, cost) in ends.chunks_exact_mut(16).zip(cost) {
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), cost) };
        }
        let mut state = cheapest(&ends[..S]);
        for (code, word) in codes.iter_mut().zip(words.iter()).rev() {
            *code = (state & ((1 << BITS) - 1)) as u8;
            let way = (0..BITS).fold(0, |way, bit| way | (word >> (S * bit + state) & 1) << bit);
            state = from::<BITS>(state, way as usize);
        }
    }

    /// What a number costs on a way: the cost so far and the square of what its level is off.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn added(cost: __m512, x: __m512, levels: __m512) -> __m512 {
        let off = _mm512_sub_ps(x, levels);
        _mm512_add_ps(cost, _mm512_mul_ps(off, off))
    }

    /// The lesser of two, and where it is the second.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn lesser(a: __m512, b: __m512) -> (__m512, u32) {
        let second = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(b, a);
        (_mm512_mask_mov_ps(a, second, b), second.into())
    }

    /// 32 states in two vectors, of two ways each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn one(table: &Table, x: __m512, [low, high]: [__m512; 2]) -> ([__m512; 2], u32) {
        let first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        let half = |index: __m512i, i: usize| {
            let a = added(_mm512_permutexvar_ps(index, low), x, table[i]);
            let b = added(_mm512_permutexvar_ps(index, high), x, table[i + 2]);
            lesser(a, b)
        };
        let ((low, a), (high, b)) = (half(first, 0), half(second, 1));
        ([low, high], a | b << 16)
    }

    /// 16 states, of four ways each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn two(table: &Table, x: __m512, [cost]: [__m512; 1]) -> ([__m512; 1], u32) {
        let fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        let way = |k: usize| {
            let index = _mm512_add_epi32(fours, _mm512_set1_epi32(4 * k as i32));
            added(_mm512_permutexvar_ps(index, cost), x, table[k])
        };
        let (a, odd_a) = lesser(way(0), way(1));
        let (b, odd_b) = lesser(way(2), way(3));
        let (best, upper) = lesser(a, b);
        ([best], (odd_a & !upper | odd_b & upper) | upper << 16)
    }

    /// 8 states, of eight ways each: the j-th vector has the ways j and j + 4.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn three(table: &Table, x: __m512, [cost]: [__m512; 1]) -> ([__m512; 1], u32) {
        let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
        let ways = |j: usize| {
            let index = _mm512_add_epi32(halves, _mm512_set1_epi32(j as i32));
            added(_mm512_permutexvar_ps(index, cost), x, table[j])
        };
        let (a, odd_a) = lesser(ways(0), ways(1));
        let (b, odd_b) = lesser(ways(2), ways(3));
        let (best, upper) = lesser(a, b);
        let odd = odd_a & !upper | odd_b & upper;
        // The ways from 4 on lie above.
        let above = _mm512_shuffle_f32x4::<0x4e>(best, best);
        let (best, higher) = lesser(best, above);
        let higher = higher & 0xff;
        let of = |bits: u32| bits & 0xff & !higher | bits >> 8 & higher;
        let best = _mm512_shuffle_f32x4::<0x44>(best, best);
        ([best], of(odd) | of(upper) << 8 | higher << 16)
    }

    /// The windows t + 8 k as [`three`] takes them: for each j those of k = j, then those of k = j + 4.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn by_halves([a, b, c, d]: Table) -> Table {
        let pair = |low: __m512, high: __m512| {
            [_mm512_shuffle_f32x4::<0x44>(low, high), _mm512_shuffle_f32x4::<0xee>(low, high)]
        };
        let ([zero, one], [two, three]) = (pair(a, c), pair(b, d));
        [zero, one, two, three]
    }
}
