//! The maximum and the exponentials of a softmax, in a form that compiles to SIMD, compiled for each instruction set.

use crate::kernels::{Isa, Set};

const LANES: usize = 16;

/// The largest score; minus infinity where there is none. NaN is not expected.
pub(crate) fn largest(scores: &[f32]) -> f32 {
    match Isa::active().set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is active only on machines that have it.
        Set::Avx512 | Set::Avx2 => unsafe { avx2::largest(scores) },
        _ => largest_of(scores),
    }
}

/// Replaces each score s by exp(s - max) and gives their sum. Scores of minus infinity become 0.
pub(crate) fn exp_sum(scores: &mut [f32], max: f32) -> f32 {
    match Isa::active().set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is active only on machines that have it.
        Set::Avx512 => unsafe { avx512_exp_sum(scores, max) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Set::Avx2 => unsafe { avx2::exp_sum(scores, max) },
        #[cfg(target_arch = "aarch64")]
        Set::Neon => exps::<true>(scores, max),
        Set::Scalar => exps::<false>(scores, max),
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn largest(scores: &[f32]) -> f32 {
        super::largest_of(scores)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn exp_sum(scores: &mut [f32], max: f32) -> f32 {
        super::exps::<true>(scores, max)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn avx512_exp_sum(scores: &mut [f32], max: f32) -> f32 {
    exps::<true>(scores, max)
}

#[inline(always)]
fn largest_of(scores: &[f32]) -> f32 {
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

/// `FMA`: the machine multiplies and adds in one instruction.
#[inline(always)]
fn exps<const FMA: bool>(scores: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = exp::<FMA>(*s - max);
            *sum += *s;
        }
    }
    let tail: f32 = chunks
        .into_remainder()
        .iter_mut()
        .map(|s| {
            *s = exp::<FMA>(*s - max);
            *s
        })
        .sum();
    sums.iter().sum::<f32>() + tail
}

/// e^x for x <= 0 to 2 ulp: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes `expf`). Below -87 gives 0.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let mul_add = |a: f32, b: f32, c: f32| if FMA { a.mul_add(b, c) } else { a * b + c };
    let clamped = if x > -87.0 { x } else { -87.0 };
    // Adding 1.5 * 2^23 rounds to the nearest integer in the low mantissa bits, without a conversion instruction.
    let magic = 12_582_912.0f32;
    let shifted = mul_add(clamped, std::f32::consts::LOG2_E, magic);
    let n = shifted - magic;
    let r = mul_add(-n, LN2_LOW, mul_add(-n, LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = mul_add(p, r, c);
    }
    let y = mul_add(p * r, r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { y * scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::with_isa;

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp::<false>(x)) - want) / want).abs() < 3e-7, "{x}");
        }
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
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
}
