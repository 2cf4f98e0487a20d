//! Uniform quantisers of normal variables.

use half::f16;

use crate::kernels::half;

/// Step of the best uniform quantiser of a unit normal variable with 2^bits levels, and its mean squared error
/// (Max 1960; Jayant and Noll 1984, table 4.2), by falling error.
pub(crate) const UNIFORM: [(u8, f32, f32); 4] =
    [(2, 0.9957, 0.118_85), (3, 0.5860, 0.037_44), (4, 0.3352, 0.011_543), (8, 0.0308, 0.000_116)];

/// The code between the lowest and the highest, where zero is.
pub(super) fn middle(bits: u8) -> f32 {
    f32::from((1_u16 << bits) - 1) / 2.0
}

/// Codes of numbers that are near normal with mean zero, relative to their root mean square; returns the scale, to be
/// stored by [`scale_byte`]: code c stands for `scale * (c - middle)`.
pub(super) fn quantise(x: &[f32], bits: u8, codes: &mut [u8]) -> f16 {
    let unit = UNIFORM.iter().find(|u| u.0 == bits).map_or(1.0, |u| u.1);
    let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    // Where few numbers fall outside, a step that is too small makes those errors large.
    let scale = round(square.sqrt() * unit, bits == 8);
    let (inverse, middle) = (1.0 / scale.to_f32(), middle(bits));
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + middle + 0.5).clamp(0.0, 2.0 * middle) as i32 as u8;
    }
    scale
}

/// Bits of an f16 that are not stored. Three bits of mantissa are left: codes are relative to the scale as it is stored,
/// so that rounding it costs no more than a step 6 % from the best one does.
const DROPPED: u32 = 7;

/// The nearest scale that can be stored, or the next one `up`; neither zero nor infinite.
fn round(scale: f32, up: bool) -> f16 {
    let unit = 1 << DROPPED;
    let top = f16::INFINITY.to_bits() - unit;
    let more = if up { unit - 1 } else { unit / 2 };
    let bits = half(scale).to_bits().min(top) + more;
    f16::from_bits((bits >> DROPPED << DROPPED).clamp(unit, top))
}

/// The nearest scale that can be stored.
pub(super) fn rounded_scale(scale: f32) -> f16 {
    round(scale, false)
}

/// A scale as it is stored.
pub(super) fn scale_byte(scale: f16) -> u8 {
    (scale.to_bits() >> DROPPED) as u8
}

/// A scale from its byte.
pub(super) fn scale(byte: u8) -> f16 {
    f16::from_bits(u16::from(byte) << DROPPED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_stored_to_a_sixteenth() {
        for x in [1e-3_f32, 0.33, 1.0, 1.06, 7.0, 123.4, 6e4] {
            let rounded = round(x, false);
            assert_eq!(scale(scale_byte(rounded)), rounded);
            assert!((rounded.to_f32() / x - 1.0).abs() <= 1.0 / 16.0, "{x}: {rounded}");
            let up = round(x, true).to_f32() / x;
            assert!((0.999..=1.126).contains(&up), "{x}: {up}");
        }
        for x in [0.0, 1e-30, f32::MAX, f32::INFINITY] {
            assert!(round(x, true).is_finite() && round(x, false) > f16::ZERO, "{x}");
        }
    }
}
