//! The kernels in plain Rust.

use half::f16;

use super::{Codes, Dense, Digits, Factor, Float, LANES, Sums, Weights, get_code, strip_bytes};

/// See [`super::dense`].
pub(super) fn dense<T: Float>(m: Dense<T>, w: Weights, out: Sums) {
    for strip in 0..m.strips {
        let x = &m.x[strip * m.stride..][..m.steps * m.width];
        for row in 0..w.rows {
            let weights = &w.w[row * w.stride..][..m.steps];
            let mut sums = [0.0; LANES];
            for (x, &w) in x.chunks_exact(m.width).zip(weights) {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum += w * x.get();
                }
            }
            let y = &mut out.y[row * out.stride + strip * LANES..][..m.width];
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
        }
    }
}

/// See [`super::codes`].
pub(super) fn codes(m: Codes, w: Digits, out: Sums) {
    let bytes = strip_bytes(m.bits, m.steps, m.width);
    let shape = (m.steps, m.width);
    for strip in 0..m.strips {
        let packed = &m.codes[strip * bytes..][..bytes];
        for (row, factor) in w.factors.iter().enumerate() {
            let digits = &w.digits[row * w.stride..];
            let mut sums = [[0_i32; LANES]; 3];
            for step in 0..m.steps {
                let four = &digits[step / 4 * 4..][..3];
                for lane in 0..m.width {
                    let code = i32::from(get_code(packed, m.bits, shape, (step, lane)));
                    for (sums, digits) in sums.iter_mut().zip(four) {
                        sums[lane] += code * i32::from(digits.to_le_bytes()[step % 4] as i8);
                    }
                }
            }
            for lane in 0..m.width {
                let [low, mid, high] = sums.map(|s| s[lane] as f32);
                let sum = ((high * 256.0 + mid) * 256.0 + low) * factor.step;
                out.y[row * out.stride + strip * LANES + lane] += match m.lanes {
                    None => sum + factor.bias,
                    Some((scale, zero)) => {
                        let lane = strip * LANES + lane;
                        sum * scale[lane].to_f32() + factor.bias * zero[lane].to_f32()
                    }
                };
            }
        }
    }
}

/// The largest integer weight; three signed bytes reach 2^23 - 2^15.
pub(super) const UNITS: f32 = 4_194_303.0;
/// Weights that are all smaller than this count as zero: their reciprocal would not be finite.
pub(super) const TINY: f32 = 1e-30;
/// Added to an integer, it makes its bytes the signed digits plus 128.
pub(super) const OFFSET: i32 = 0x0080_8080;

/// See [`super::digits`].
pub(super) fn digits(w: &[f32], steps: Option<(&[f16], &[f16])>, digits: &mut [i32]) -> Factor {
    let scaled = |i: usize, w: f32| steps.map_or(w, |(scale, _)| w * scale[i].to_f32());
    let largest = w.iter().enumerate().fold(0.0_f32, |most, (i, &w)| most.max(scaled(i, w).abs()));
    let units = if largest > TINY { UNITS / largest } else { 0.0 };
    digits.fill(0);
    let mut bias = 0.0;
    for (i, &w) in w.iter().enumerate() {
        bias += steps.map_or(w, |(_, zero)| w * zero[i].to_f32());
        let whole = (scaled(i, w) * units).round_ties_even() as i32;
        let bytes = ((whole + OFFSET) ^ OFFSET).to_le_bytes();
        for (digit, byte) in digits[i / 4 * 4..][..3].iter_mut().zip(bytes) {
            *digit |= i32::from(byte) << (8 * (i % 4));
        }
    }
    Factor { step: if units > 0.0 { largest / UNITS } else { 0.0 }, bias }
}
