//! Weighted sums over strips: the arithmetic under every cache, chosen at run time for the machine.
//!
//! A *strip* is a small matrix of `steps` rows and [`LANES`] columns; all kernels compute, for several weight rows at
//! once, `y[lane] += sum over steps of w[step] * x[step][lane]`. Attention needs nothing else: for scores the lanes
//! are tokens and the steps are channels (w is the query), for the weighted sum of values the lanes are channels and
//! the steps are tokens (w is the probabilities). Neither needs a horizontal reduction, and an unpacked element serves
//! all weight rows of a tile (the query heads that share a KV head).
//!
//! Numbers are f32, f16 or codes of 2, 3, 4 or 8 bits. Codes are not converted to floats: the weights of a tile (times
//! the scales, where these belong to the steps) become 23-bit integers, split into three signed bytes, and byte dot
//! products (`vpdpbusd`, `vpmaddubsw`) of codes and digits are exact. Rounding weights to 2^-22 of their largest
//! costs no more accuracy than f32 sums do, and a byte dot product does the work of four float ones.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bandwidth;
mod codes;
mod lines;
mod scalar;

pub use bandwidth::bandwidth_gb_s;
pub(crate) use codes::{get_code, put_code, strip_bytes};
pub(crate) use lines::{Line, Plain, prefetch, view, view_mut};

use half::f16;
use std::cell::Cell;
use std::sync::OnceLock;

/// Columns of a full strip.
pub(crate) const LANES: usize = 16;

/// Weight rows that share one pass over a tile.
pub(crate) const ROWS: usize = 4;

/// An instruction set that the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust; every machine, and what the others are tested against.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The name in `MINICACHE_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
        }
    }

    /// The instruction sets that this machine has, the fastest last.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            found.extend(avx2.then_some(Isa::Avx2));
            found.extend((avx2 && avx512).then_some(Isa::Avx512));
        }
        found
    }

    /// The instruction set in force on this thread: [`with_isa`]'s, else the one that `MINICACHE_SIMD` names if the
    /// machine has it, else the fastest.
    pub fn active() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        FORCED.get().unwrap_or_else(|| {
            *CHOSEN.get_or_init(|| {
                let available = Isa::available();
                let wanted = std::env::var("MINICACHE_SIMD").unwrap_or_default();
                let named = available.iter().find(|isa| isa.name() == wanted);
                *named.or(available.last()).unwrap_or(&Isa::Scalar)
            })
        })
    }
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Runs `f` with the kernels of `isa` on this thread; [`Isa::Scalar`] where the machine lacks it.
pub fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let isa = if Isa::available().contains(&isa) { isa } else { Isa::Scalar };
    let _restore = Restore(FORCED.replace(Some(isa)));
    f()
}

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

/// Strips of codes, packed one after another as [`put_code`] writes them.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub(crate) bits: u8,
    pub(crate) codes: &'a [u8],
    pub(crate) strips: usize,
    /// [`LANES`], or fewer in a lone last strip.
    pub(crate) width: usize,
    pub(crate) steps: usize,
    /// Scales and zeros of the lanes, `strips * width` each, where groups run along the steps. A lane's element is
    /// then `scale * code + zero`; without them scale and zero are already in the weights.
    pub(crate) lanes: Option<(&'a [f16], &'a [f16])>,
}

/// Weight rows as digits: row i is `digits[i * stride..][..padded(steps)]` with its `factors[i]`.
#[derive(Clone, Copy)]
pub(crate) struct Digits<'a> {
    pub(crate) digits: &'a [i32],
    pub(crate) stride: usize,
    pub(crate) factors: &'a [Factor],
}

/// What turns a row's integer sums back into numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Factor {
    /// The weight of one unit of the last digit.
    pub(crate) step: f32,
    /// Sum of weights times zeros, or of the weights where zeros belong to the lanes.
    pub(crate) bias: f32,
}

/// Digits of a row of `steps` weights: a multiple of 16, so that every plane of a strip ends within it.
pub(crate) fn padded(steps: usize) -> usize {
    steps.next_multiple_of(16)
}

/// Floats that kernels read.
pub(crate) trait Float: Plain {
    /// As f32.
    fn get(self) -> f32;
    /// From f32: nearest even, finite values saturate.
    fn of(x: f32) -> Self;
    /// The kernel of `isa`.
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums);
}

impl Float for f32 {
    fn get(self) -> f32 {
        self
    }
    fn of(x: f32) -> Self {
        x
    }
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums) {
        match isa {
            Isa::Scalar => scalar::dense(m, w, out),
            // SAFETY: [`Isa::available`] offers an instruction set only where the machine has it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::dense_f32(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dense_f32(m, w, out) },
        }
    }
}

impl Float for f16 {
    fn get(self) -> f32 {
        self.to_f32()
    }
    fn of(x: f32) -> Self {
        f16::from_f32(x.clamp(-65504.0, 65504.0))
    }
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums) {
        match isa {
            Isa::Scalar => scalar::dense(m, w, out),
            // SAFETY: [`Isa::available`] offers an instruction set only where the machine has it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::dense_f16(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dense_f16(m, w, out) },
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
    let rows = w.factors.len();
    if m.strips == 0 || m.steps == 0 || rows == 0 {
        return;
    }
    // As in `dense`.
    assert!(rows <= ROWS && matches!(m.bits, 2 | 3 | 4 | 8));
    assert!(m.width <= LANES && (m.width == LANES || m.strips == 1));
    assert!(m.strips * strip_bytes(m.bits, m.steps, m.width) <= m.codes.len());
    assert!((rows - 1) * w.stride + padded(m.steps) <= w.digits.len());
    assert!((rows - 1) * out.stride + m.strips * m.width <= out.y.len());
    if let Some((scale, zero)) = m.lanes {
        assert!(m.strips * m.width <= scale.len().min(zero.len()));
    }
    match isa {
        Isa::Scalar => scalar::codes(m, w, out),
        // SAFETY: [`Isa::available`] offers an instruction set only where the machine has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::codes(m, w, out) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::codes(m, w, out) },
    }
}

/// Splits the weights `w`, times the scales of their steps if given, into digits: for each four steps three i32, of
/// which i holds digit i (base 256, signed bytes, the least first) of the four, and one unused. `digits` has
/// `padded(w.len())`; those beyond the weights become zero.
///
/// # Panics
/// Slices of the wrong length.
pub(crate) fn digits(isa: Isa, w: &[f32], steps: Option<(&[f16], &[f16])>, digits: &mut [i32]) -> Factor {
    assert_eq!(digits.len(), padded(w.len()));
    if let Some((scale, zero)) = steps {
        assert!(w.len() <= scale.len().min(zero.len()));
    }
    match isa {
        Isa::Scalar => scalar::digits(w, steps, digits),
        // SAFETY: [`Isa::available`] offers an instruction set only where the machine has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::digits(w, steps, digits) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::digits(w, steps, digits) },
    }
}
