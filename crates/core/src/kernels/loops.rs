//! Elementwise loops, sums and the softmax over slices, compiled for several instruction sets and chosen at run time.
//!
//! Each loop is one plain function of fixed-width lanes that the compiler vectorises; `dispatch!` compiles it again
//! under wider instruction sets. All variants do the same operations, but for fused multiply-adds.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::{Isa, Set};

/// Accumulators per dot product: enough independent chains to hide the latency of additions.
const LANES: usize = 32;

/// Whether a multiply-add is one instruction in the baseline; elsewhere `mul_add` would be a library call.
const BASELINE_FMA: bool = cfg!(target_arch = "aarch64");

macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident ($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                match Isa::active().set() {
                    // SAFETY: an instruction set is active only on machines that have it.
                    Set::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Set::Avx2 => return unsafe { avx2($($arg),*) },
                    Set::Scalar => {}
                }
            }
            $body::<BASELINE_FMA>($($arg),*)
        }
    };
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn dot_body<const FMA: bool>(w: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let ((w, w_tail), (x, x_tail)) = (w.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    for (w, x) in w.iter().zip(x) {
        for i in 0..LANES {
            lanes[i] = fma::<FMA>(w[i], x[i], lanes[i]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + w_tail.iter().zip(x_tail).map(|(w, x)| w * x).sum::<f32>()
}

dispatch! {
    /// Dot product of two vectors of one length.
    pub fn dot(w: &[f32], x: &[f32]) -> f32 = dot_body
}

#[inline(always)]
fn widen_bf16_body<const FMA: bool>(x: &[bf16], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

dispatch! {
    /// bf16 to f32.
    pub fn widen_bf16(x: &[bf16], out: &mut [f32]) = widen_bf16_body
}

/// f16 to f32.
pub fn widen_f16(x: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    #[cfg(target_arch = "x86_64")]
    if Isa::active().set() != Set::Scalar {
        // SAFETY: both instruction sets come with these conversions.
        return unsafe { widen_f16_f16c(x, out) };
    }
    x.convert_to_f32_slice(out);
}

/// The `half` crate calls a function for every eight numbers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_f16_f16c(x: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let ((x, x_tail), (out, out_tail)) = (x.as_chunks::<8>(), out.as_chunks_mut::<8>());
    for (x, out) in x.iter().zip(out) {
        // SAFETY: eight halves, eight floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()))) };
    }
    x_tail.iter().zip(out_tail).for_each(|(x, out)| *out = x.to_f32());
}

#[inline(always)]
fn sum_squares_body<const FMA: bool>(x: &[f32]) -> f32 {
    dot_body::<FMA>(x, x)
}

dispatch! {
    /// Sum of squares.
    pub fn sum_squares(x: &[f32]) -> f32 = sum_squares_body
}

/// e^x, within 2 units in the last place (Cephes' `expf`: 2^n times a polynomial on [-ln2/2, ln2/2]), without branches;
/// of numbers from -87 to 88, beyond which it stays.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, x));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p * r, r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[inline(always)]
fn silu_mul_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((g, u), out) in gate.iter().zip(up).zip(out) {
        *out = g / (1.0 + exp::<FMA>(-g)) * u;
    }
}

dispatch! {
    /// SwiGLU's inner part: gate * sigmoid(gate) * up.
    pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_body
}

#[inline(always)]
fn largest_body<const FMA: bool>(scores: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut most = [f32::NEG_INFINITY; LANES];
    let chunks = scores.chunks_exact(LANES);
    for (most, &x) in most.iter_mut().zip(chunks.remainder()) {
        *most = x;
    }
    for chunk in chunks {
        for (most, &x) in most.iter_mut().zip(chunk) {
            *most = if x > *most { x } else { *most };
        }
    }
    most.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

dispatch! {
    /// The largest score; minus infinity where there is none. NaN is not expected.
    pub fn largest(scores: &[f32]) -> f32 = largest_body
}

#[inline(always)]
fn exp_sum_body<const FMA: bool>(scores: &mut [f32], max: f32) -> f32 {
    const LANES: usize = 16;
    let weight = |score: f32| if score - max < -87.0 { 0.0 } else { exp::<FMA>(score - max) };
    let mut sums = [0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = weight(*s);
            *sum += *s;
        }
    }
    let mut tail = 0.0;
    for s in chunks.into_remainder() {
        *s = weight(*s);
        tail += *s;
    }
    sums.iter().sum::<f32>() + tail
}

dispatch! {
    /// Replaces each score s by exp(s - max), of which none is above 1, and gives their sum. Scores of minus infinity
    /// become 0.
    pub fn exp_sum(scores: &mut [f32], max: f32) -> f32 = exp_sum_body
}

#[inline(always)]
fn scale_mul_body<const FMA: bool>(x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) {
    for ((x, w), out) in x.iter().zip(weight).zip(out) {
        *out = x * scale * w;
    }
}

dispatch! {
    /// x * scale * weight, number by number.
    pub fn scale_mul(x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) = scale_mul_body
}

#[inline(always)]
fn add_body<const FMA: bool>(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out += x;
    }
}

dispatch! {
    /// out += x.
    pub fn add(x: &[f32], out: &mut [f32]) = add_body
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(x: &[f32], scale: f32, out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = fma::<FMA>(*x, scale, *out);
    }
}

dispatch! {
    /// out += scale * x.
    pub fn add_scaled(x: &[f32], scale: f32, out: &mut [f32]) = add_scaled_body
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, with_isa};
    use super::*;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 3.0).collect()
    }

    #[test]
    fn silu_everywhere() {
        let gate: Vec<f32> = (-2000..2000).map(|i| i as f32 * 0.05).collect();
        let up = vec![2.0; gate.len()];
        let mut out = vec![0.0; gate.len()];
        silu_mul(&gate, &up, &mut out);
        let mut scalar = vec![0.0; gate.len()];
        silu_mul_body::<false>(&gate, &up, &mut scalar);
        for ((g, got), scalar) in gate.iter().zip(&out).zip(&scalar) {
            let g = f64::from(*g);
            let want = 2.0 * g / (1.0 + (-g).exp());
            for got in [got, scalar] {
                assert!((f64::from(*got) - want).abs() <= 5e-7 * want.abs() + 1e-30, "{g}: {got} {want}");
            }
        }
        let mut out = [0.0];
        silu_mul(&[f32::NAN], &[1.0], &mut out);
        assert!(out[0].is_nan());
    }

    #[test]
    fn widening_is_exact() {
        let x = wave(70, 0.37);
        let (b, h): (Vec<bf16>, Vec<f16>) = x.iter().map(|x| (bf16::from_f32(*x), f16::from_f32(*x))).unzip();
        let mut out = vec![0.0; 70];
        widen_bf16(&b, &mut out);
        assert!(b.iter().zip(&out).all(|(b, o)| b.to_f32() == *o));
        widen_f16(&h, &mut out);
        assert!(h.iter().zip(&out).all(|(h, o)| h.to_f32() == *o));
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp::<false>(x)) - want) / want).abs() < 3e-7, "{x}");
        }
        assert_eq!(exp_sum(&mut [f32::NEG_INFINITY], 0.0), 0.0);
        assert_eq!(exp::<false>(0.0), 1.0);
    }

    #[test]
    fn every_instruction_set_sums_what_it_writes() {
        let mut s: Vec<f32> = (0..37).map(|i| -(i as f32) * 0.3).collect();
        s[5] = f32::NEG_INFINITY;
        for isa in Isa::available() {
            with_isa(isa, || {
                let mut own = s.clone();
                let sum = exp_sum(&mut own, 0.0);
                assert!((sum - own.iter().sum::<f32>()).abs() < 1e-4);
                for (e, x) in own.iter().zip(&s) {
                    assert!((e - x.exp()).abs() <= 3e-7 * e, "{isa:?}: exp({x}) is not {e}");
                }
                assert_eq!((largest(&s), largest(&s[1..3]), largest(&[])), (0.0, -0.3, f32::NEG_INFINITY));
            });
        }
    }

    #[test]
    fn small_loops() {
        let x = wave(45, 0.2);
        let mut out = vec![1.0; 45];
        add(&x, &mut out);
        add_scaled(&x, 0.5, &mut out);
        assert!(x.iter().zip(&out).all(|(x, o)| (1.0 + 1.5 * x - o).abs() < 1e-6));
        scale_mul(&x, 2.0, &[0.5; 45], &mut out);
        assert_eq!(x, out);
        assert!((sum_squares(&x) - x.iter().map(|x| x * x).sum::<f32>()).abs() < 1e-3);
    }
}
