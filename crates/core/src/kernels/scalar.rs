//! The kernels in plain Rust.

use super::{
    Codes, Dense, Digits, Factor, Float, LANES, Precision, StepScales, Sums, Weights, get_code, padded,
    strip_bytes,
};

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
    let padded = padded(m.runs * m.steps);
    for strip in 0..m.strips {
        for row in 0..w.rows {
            let k = strip / m.per_set * w.rows + row;
            let (digits, factor) = (&w.digits[k * padded..][..padded], w.factors[k]);
            let mut sums = [[0_i32; LANES]; 3];
            for at in 0..m.runs * m.steps {
                let four = &digits[at / 4 * 4..][..w.precision.digits()];
                let (run, step) = (at / m.steps, at % m.steps);
                let packed = &m.codes[strip * m.stride + run * m.run_stride..][..bytes];
                for lane in 0..m.width {
                    let code = i32::from(get_code(packed, m.bits, shape, (step, lane)));
                    for (sums, digits) in sums.iter_mut().zip(four) {
                        sums[lane] += code * i32::from(digits.to_le_bytes()[step % 4] as i8);
                    }
                }
            }
            for lane in 0..m.width {
                let parts = sums[..w.precision.digits()].iter().rev();
                let sum = parts.fold(0.0, |sum, part| sum * 256.0 + part[lane] as f32) * factor.step;
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

/// See [`super::digits`].
pub(super) fn digits(
    precision: Precision,
    w: Weights,
    bounds: &[f32],
    steps: usize,
    scales: Option<StepScales>,
    digits: &mut [i32],
    factors: &mut [Factor],
) {
    let padded = padded(steps);
    let (units, offset) = precision.units();
    let stored = scales.is_some_and(|s| s.has_zeros());
    for set in 0..scales.map_or(1, |s| s.sets) {
        let pair = scales.map(|s| s.set(set, steps));
        let most = pair.map_or(1.0, |(scale, _)| scale.iter().fold(0.0, |m: f32, s| m.max(s.to_f32())));
        for (row, &bound) in bounds[..w.rows].iter().enumerate() {
            let k = set * w.rows + row;
            let w = &w.w[row * w.stride..][..steps];
            let digits = &mut digits[k * padded..][..padded];
            let (units, step) = Factor::units(bound, most, units);
            digits.fill(0);
            let mut bias = 0.0;
            for (i, &w) in w.iter().enumerate() {
                let scaled = pair.map_or(w, |(scale, _)| w * scale[i].to_f32());
                let whole = (scaled * units).round_ties_even() as i32;
                bias += match pair {
                    Some((_, zero)) if stored => w * zero[i].to_f32(),
                    _ => whole as f32 * step,
                };
                let bytes = (whole + offset).to_le_bytes();
                let zero = offset.to_le_bytes();
                for (place, digit) in digits[i / 4 * 4..][..3].iter_mut().enumerate() {
                    *digit |= i32::from(bytes[place].wrapping_sub(zero[place])) << (8 * (i % 4));
                }
            }
            factors[k] = Factor { step, bias };
        }
    }
}
