//! Weighted sums over strips: the arithmetic under every cache, chosen at run time for the machine.
//!
//! A *strip* is a small matrix of `steps` rows and `LANES` columns; all kernels compute, for several weight rows at
//! once, `y[lane] += sum over steps of w[step] * x[step][lane]`. Attention needs nothing else: for scores the lanes
//! are tokens and the steps are channels (w is the query), for the weighted sum of values the lanes are channels and
//! the steps are tokens (w is the probabilities). Neither needs a horizontal reduction, and an unpacked element serves
//! all weight rows of a tile (the query heads that share a KV head).
//!
//! Numbers are f32, f16 or codes of 2, 3, 4 or 8 bits. Codes are not converted to floats: the weights of a tile (times
//! the scales, where these belong to the steps) become integers, split into two or three signed bytes ([`Precision`]),
//! and byte dot products (`vpdpbusd`, `vpmaddubsw`, `sdot`) of codes and digits are exact. A byte dot product does the work of
//! four float ones.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod codes;
pub(crate) mod f8;
mod isa;
mod lines;
pub mod loops;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
pub mod tile;
mod trellis;

pub(crate) use codes::{get_code, put_lane, put_step, strip_bytes};
pub use isa::{Isa, Set, with_isa};
pub(crate) use lines::{Line, Plain, prefetch, view, view_mut};
pub(crate) use trellis::{STATES, Trellis, WINDOW};

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::settings::StoreType;

/// Columns of a full strip.
pub(crate) const LANES: usize = 16;

/// Weight rows that share one pass over a tile.
pub(crate) const ROWS: usize = 4;

/// Steps whose integer sums fit: codes of up to 255 times digits of at most 128 each.
const MOST_STEPS: usize = i32::MAX as usize / (255 * 128);

/// Weight rows: row i is `w[i * stride..][..steps]`.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) w: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
}

/// Output rows, added to: lane l of strip s of row i is `y[i * stride + s * LANES + l]`.
pub(crate) struct Sums<'a> {
    pub(crate) y: &'a mut [f32],
    pub(crate) stride: usize,
}

/// Strips of floats: element (step, lane) of strip s is `x[s * stride + step * width + lane]`.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) strips: usize,
    pub(crate) stride: usize,
    /// [`LANES`], or fewer in a lone last strip.
    pub(crate) width: usize,
    pub(crate) steps: usize,
    /// What is read next, in the same layout; empty if nothing is. Hardware prefetchers lose their place where a
    /// head's part of a block ends.
    pub(crate) next: &'a [T],
}

/// Strips of codes as [`put_step`] writes them. The steps of a strip may lie in several runs of equal length.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub(crate) bits: u8,
    pub(crate) codes: &'a [u8],
    /// What is read next, in the same layout; empty if nothing is.
    pub(crate) next: &'a [u8],
    pub(crate) strips: usize,
    /// Bytes from a strip to the next.
    pub(crate) stride: usize,
    /// [`LANES`], or fewer in a lone last strip.
    pub(crate) width: usize,
    /// Steps of a run; a multiple of 16 if there are several.
    pub(crate) steps: usize,
    pub(crate) runs: usize,
    /// Bytes from a run to the next.
    pub(crate) run_stride: usize,
    /// Strips that share a set of digits: strip s has set `s / per_set`.
    pub(crate) per_set: usize,
    /// Scales and zeros of the lanes, `strips * width` each, where groups run along the steps. A lane's element is
    /// then `scale * code + zero`; without them scale and zero are already in the weights.
    pub(crate) lanes: Option<(&'a [f16], &'a [f16])>,
    /// Codes whose elements are levels of a table.
    pub(crate) trellis: Option<Trellis<'a>>,
}

/// How finely weights (queries, probabilities) are rounded before they meet codes, relative to the largest weight
/// times the largest scale of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// One digit, 8 bits: far finer than codes of up to 4 bits, in half the time.
    Coarse,
    /// Two digits, 16 bits: finer than the f16 in which states and magnitudes are stored.
    Fast,
    /// Three digits, 23 bits: as good as sums in f32.
    #[default]
    Exact,
}

impl Precision {
    /// What `activation_bits` asks for, or else what suits a store beside numbers of type `beside`: f16 ones are rounded more
    /// coarsely than [`Precision::Fast`] rounds, f32 ones are asked for where every digit counts.
    pub(crate) fn of(activation_bits: Option<u8>, beside: StoreType) -> Self {
        match (activation_bits, beside) {
            (Some(8), _) => Precision::Coarse,
            (Some(16), _) | (None, StoreType::F16) => Precision::Fast,
            _ => Precision::Exact,
        }
    }

    /// Digits of a weight.
    pub(crate) fn digits(self) -> usize {
        match self {
            Precision::Coarse => 1,
            Precision::Fast => 2,
            Precision::Exact => 3,
        }
    }

    /// The largest integer weight (three digits: less a margin for rounding), and what makes the bytes of any of them
    /// its digits plus a constant: 128, 128 and 64.
    fn units(self) -> (f32, i32) {
        match self {
            Precision::Coarse => (127.0, 0x80),
            Precision::Fast => (32_639.0, 0x8080),
            Precision::Exact => (4_161_000.0, 0x40_8080),
        }
    }
}

/// Sets of weight rows as digits: row i of `rows` in set j is number `k = j * rows + i`, has the digits
/// `digits[k * padded(steps)..][..padded(steps)]` and the factor `factors[k]`.
#[derive(Clone, Copy)]
pub(crate) struct Digits<'a> {
    pub(crate) digits: &'a [i32],
    pub(crate) factors: &'a [Factor],
    pub(crate) rows: usize,
    pub(crate) precision: Precision,
}

/// Scales and zeros of steps, for one or several sets: set j has the scales `data[j * stride..]`, and its zeros `to_zero`
/// further on (none: the scales themselves).
#[derive(Clone, Copy)]
pub(crate) struct StepScales<'a> {
    pub(crate) data: &'a [f16],
    pub(crate) sets: usize,
    pub(crate) stride: usize,
    pub(crate) to_zero: usize,
}

impl<'a> StepScales<'a> {
    /// Whether zeros are stored, or are multiples of the scales.
    #[inline(always)]
    fn has_zeros(&self) -> bool {
        self.to_zero > 0
    }

    /// Scales and zeros of the first `steps` of a set.
    #[inline(always)]
    fn set(&self, set: usize, steps: usize) -> (&'a [f16], &'a [f16]) {
        let data = &self.data[set * self.stride..];
        (&data[..steps], &data[self.to_zero..self.to_zero + steps])
    }
}

/// What turns a row's integer sums back into numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Factor {
    /// The weight of one unit of the last digit.
    pub(crate) step: f32,
    /// Sum of weights times zeros, or of the weights where zeros belong to the lanes. Of weights as they are rounded,
    /// unless zeros are stored for the steps: what rounding does to codes and to their middle then cancels.
    pub(crate) bias: f32,
}

impl Factor {
    /// Units per weight (times scale) and the weight of a unit, for weights of at most `bound` and scales of at most
    /// `scale`. Where their product is so small that its reciprocal is not finite, weights count as zero.
    #[inline(always)]
    fn units(bound: f32, scale: f32, units: f32) -> (f32, f32) {
        let largest = bound * scale;
        if largest > 1e-30 { (units / largest, largest / units) } else { (0.0, 0.0) }
    }
}

/// The largest magnitude of `w`.
pub(crate) fn largest(isa: Isa, w: &[f32]) -> f32 {
    match isa.set() {
        // SAFETY: an [`Isa`] is proof that the machine has it.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::largest(w) },
        _ => largest_of(w),
    }
}

fn largest_of(w: &[f32]) -> f32 {
    let mut most = [0.0_f32; LANES];
    let chunks = w.chunks_exact(LANES);
    for (most, x) in most.iter_mut().zip(chunks.remainder()) {
        *most = x.abs();
    }
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if x.abs() > *most { x.abs() } else { *most };
        }
    }
    most.into_iter().fold(0.0, f32::max)
}

/// The sum of `w`, in 16 parts: one after the other each addition would wait for the last.
pub(crate) fn total(w: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let chunks = w.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    sums.into_iter().sum::<f32>() + rest
}

/// Digits of a row of `steps` weights: a multiple of 16, so that every plane of a strip ends within it.
pub(crate) fn padded(steps: usize) -> usize {
    steps.next_multiple_of(16)
}

/// The nearest f16 to a finite number; what is too large for it becomes the largest. NaN and infinity are refused where
/// states come in, so neither is ever a number's stored form.
pub(crate) fn half(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// Floats that kernels read.
pub(crate) trait Float: Plain + Default {
    /// As f32.
    fn get(self) -> f32;
    /// Each as f32.
    fn widen(x: &[Self], out: &mut [f32]);
    /// From f32: nearest even; what is too large saturates.
    fn round(x: &[f32], out: &mut [Self]);
    /// The kernel of `isa`.
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums);
}

impl Float for f32 {
    fn get(self) -> f32 {
        self
    }
    fn widen(x: &[Self], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn round(x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums) {
        match isa.set() {
            Set::Scalar => scalar::dense(m, w, out),
            // SAFETY: an [`Isa`] is proof that the machine has it.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::dense_f32(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::dense_f32(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { neon::dense_f32(m, w, out) },
        }
    }
}

impl Float for f16 {
    fn get(self) -> f32 {
        self.to_f32()
    }
    fn widen(x: &[Self], out: &mut [f32]) {
        loops::widen_f16(x, out);
    }
    fn round(x: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(x);
        for out in out {
            // The largest finite number is the one before infinity, on either side.
            let bits = out.to_bits();
            *out = f16::from_bits(if bits & 0x7fff == 0x7c00 { bits - 1 } else { bits });
        }
    }
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums) {
        match isa.set() {
            Set::Scalar => scalar::dense(m, w, out),
            // SAFETY: an [`Isa`] is proof that the machine has it.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::dense_f16(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::dense_f16(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { neon::dense_f16(m, w, out) },
        }
    }
}

/// `y += w x` over strips of floats.
///
/// # Panics
/// Slices too short for the shape.
pub(crate) fn dense<T: Float>(isa: Isa, m: Dense<T>, w: Weights, out: Sums) {
    if m.strips == 0 || m.steps == 0 || w.rows == 0 {
        return;
    }
    // The unchecked loads of the kernels stay within what is checked here.
    assert!(m.width <= LANES && (m.width == LANES || m.strips == 1));
    assert!((m.strips - 1) * m.stride + m.steps * m.width <= m.x.len());
    assert!((w.rows - 1) * w.stride + m.steps <= w.w.len());
    assert!((w.rows - 1) * out.stride + m.strips * m.width <= out.y.len());
    T::sum(isa, m, w, out);
}

/// `y += w x` over strips of codes, for at most [`ROWS`] rows.
///
/// # Panics
/// Slices too short for the shape, or too many rows.
pub(crate) fn codes(isa: Isa, m: Codes, w: Digits, out: Sums) {
    let steps = m.steps * m.runs;
    if m.strips == 0 || steps == 0 || w.rows == 0 {
        return;
    }
    // As in `dense`.
    assert!(w.rows <= ROWS && matches!((m.bits, m.trellis), (2 | 3 | 4 | 8, None) | (1..=4, Some(_))));
    assert!(steps <= MOST_STEPS, "{steps} steps may overflow their integer sums");
    assert!(m.width <= LANES && (m.width == LANES || m.strips == 1));
    assert!(m.runs == 1 || m.steps.is_multiple_of(LANES));
    let last = (m.strips - 1) * m.stride + (m.runs - 1) * m.run_stride;
    assert!(last + strip_bytes(m.bits, m.steps, m.width) <= m.codes.len());
    let sets = m.strips.div_ceil(m.per_set);
    assert!(sets * w.rows <= w.factors.len() && sets * w.rows * padded(steps) <= w.digits.len());
    assert!((w.rows - 1) * out.stride + m.strips * m.width <= out.y.len());
    if let Some((scale, zero)) = m.lanes {
        assert!(m.strips * m.width <= scale.len().min(zero.len()));
    }
    if let Some(trellis) = m.trellis {
        return trellis::products(isa, m, trellis, w, out);
    }
    match isa.set() {
        Set::Scalar => scalar::codes(m, w, out),
        // SAFETY: an [`Isa`] is proof that the machine has it.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { avx2::codes(m, w, out) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::codes(m, w, out) },
        // SAFETY: likewise.
        #[cfg(target_arch = "aarch64")]
        Set::Neon => unsafe { neon::codes(m, w, out) },
    }
}

/// Splits the first `steps` of each weight row, times the scales of the steps if given, into digits: for each four
/// steps four i32, of which i holds digit i (base 256, signed bytes, the least first) of the four; those beyond the
/// precision hold anything. Rows and sets are ordered as in [`Digits`]; digits beyond the steps are zero. No weight of
/// row i is larger than `bounds[i]`.
///
/// # Panics
/// Slices too short.
#[allow(clippy::too_many_arguments)]
pub(crate) fn digits(
    isa: Isa,
    precision: Precision,
    w: Weights,
    bounds: &[f32],
    steps: usize,
    scales: Option<StepScales>,
    digits: &mut [i32],
    factors: &mut [Factor],
) {
    if w.rows == 0 || steps == 0 {
        return;
    }
    assert!((w.rows - 1) * w.stride + steps <= w.w.len() && w.rows <= bounds.len());
    let sets = scales.map_or(1, |s| s.sets);
    assert!(sets * w.rows * padded(steps) <= digits.len() && sets * w.rows <= factors.len());
    if let Some(s) = scales {
        assert!((s.sets - 1) * s.stride + s.to_zero + steps <= s.data.len());
    }
    match isa.set() {
        Set::Scalar => scalar::digits(precision, w, bounds, steps, scales, digits, factors),
        // SAFETY: an [`Isa`] is proof that the machine has it.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { avx2::digits(precision, w, bounds, steps, scales, digits, factors) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::digits(precision, w, bounds, steps, scales, digits, factors) },
        // SAFETY: likewise.
        #[cfg(target_arch = "aarch64")]
        Set::Neon => unsafe { neon::digits(precision, w, bounds, steps, scales, digits, factors) },
    }
}
