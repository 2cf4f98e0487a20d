//! Floats of eight bits: e4m3 as the field's runtimes have it (Micikevicius et al. 2022, arXiv 2209.05433, "FN": no
//! infinities). A sign, four bits of exponent with a bias of 7, three of mantissa: up to 448, in steps of 2^-9 near zero.

use half::f16;

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{Dense, Float, Isa, Plain, Set, Sums, Weights, scalar};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// The largest number.
pub(crate) const LARGEST: f32 = 448.0;

/// What a number is times the f16 of the same exponent and mantissa bits, by the difference of the two biases.
pub(super) const OF_HALF: f32 = 256.0;

/// One number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct F8(pub(crate) u8);

// SAFETY: `repr(transparent)` over a byte, of which every pattern is read as a number.
unsafe impl Plain for F8 {}

impl F8 {
    /// The nearest, ties to even; what is too large becomes the largest.
    pub(crate) fn from_f32(x: f32) -> Self {
        const LEAST_NORMAL: f32 = 1.0 / 64.0;
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let size = x.abs().min(LARGEST);
        let code = if size < LEAST_NORMAL {
            // Steps of 2^-9; the eighth of them is the least normal number.
            (size * 512.0).round_ties_even() as u32
        } else {
            let bits = size.to_bits();
            let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
            (rounded >> 20) - ((127 - 7) << 3)
        };
        Self(sign | code.min(0x7e) as u8)
    }
}

impl Float for F8 {
    fn get(self) -> f32 {
        let bits = u16::from(self.0);
        f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7).to_f32() * OF_HALF
    }
    fn widen(x: &[Self], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x.get());
    }
    fn round(x: &[f32], out: &mut [Self]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = Self::from_f32(*x));
    }
    fn sum(isa: Isa, m: Dense<Self>, w: Weights, out: Sums) {
        match isa.set() {
            Set::Scalar => scalar::dense(m, w, out),
            // SAFETY: an [`Isa`] is proof that the machine has it.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::dense_f8(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::dense_f8(m, w, out) },
            // SAFETY: likewise.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { neon::dense_f8(m, w, out) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition, bit by bit.
    fn defined(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = match exponent {
            0 => mantissa * 2f64.powi(-9),
            e => (1.0 + mantissa / 8.0) * 2f64.powi(e - 7),
        };
        if code & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn numbers_are_those_of_the_format_and_the_nearest_is_taken() {
        // 0x7f and 0xff are the format's NaNs, which rounding never gives.
        let codes: Vec<u8> = (0..=255).filter(|c| c & 0x7f != 0x7f).collect();
        for &code in &codes {
            assert_eq!(f64::from(F8(code).get()), defined(code), "{code:#x}");
            assert_eq!(F8::from_f32(F8(code).get()), F8(code), "{code:#x}");
        }
        let mut x = 1e-4f32;
        while x < 600.0 {
            let got = f64::from(F8::from_f32(-x).get());
            let off = |code: u8| (defined(code) + f64::from(x)).abs();
            let nearest = codes.iter().map(|&c| off(c)).fold(f64::INFINITY, f64::min);
            assert_eq!((got + f64::from(x)).abs(), nearest, "{x}");
            x *= 1.003;
        }
        // Halfway to the even one, and beyond the largest.
        assert_eq!(F8::from_f32(1.0625).get(), 1.0);
        assert_eq!(F8::from_f32(1.1875).get(), 1.25);
        assert_eq!(F8::from_f32(-1e9).get(), -LARGEST);
    }
}
