//! The exponentials of a softmax, in a form that compiles to SIMD.

/// Replaces each score s by exp(s - max) and gives their sum. Scores of minus infinity become 0.
pub(crate) fn exp_sum(scores: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = exp(*s - max);
            *sum += *s;
        }
    }
    let tail: f32 = chunks
        .into_remainder()
        .iter_mut()
        .map(|s| {
            *s = exp(*s - max);
            *s
        })
        .sum();
    sums.iter().sum::<f32>() + tail
}

/// e^x for x <= 0 to 2 ulp: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes `expf`). Below -87 gives 0.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    // Adding 1.5 * 2^23 rounds to the nearest integer in the low mantissa bits, without a conversion instruction.
    let magic = 12_582_912.0f32;
    let shifted = clamped * std::f32::consts::LOG2_E + magic;
    let n = shifted - magic;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { y * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - want) / want).abs() < 3e-7, "{x}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exp_sum_sums_what_it_writes() {
        let mut s: Vec<f32> = (0..37).map(|i| -(i as f32) * 0.3).collect();
        s[5] = f32::NEG_INFINITY;
        let sum = exp_sum(&mut s, 0.0);
        assert!((sum - s.iter().sum::<f32>()).abs() < 1e-4);
        assert_eq!(s[5], 0.0);
    }
}
