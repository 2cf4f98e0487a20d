//! Asymmetric round-to-nearest: the grid of one group.

use half::f16;

use crate::kernels::half;

/// The numbers `zero + scale * code`, code = 0 ..= 2^bits - 1, with scale and zero as they are stored (f16):
/// zero = min, scale = (max - min) / (2^bits - 1). KIVI (Liu et al. 2024, arXiv 2402.02750), eq. 1, without its
/// unstored f32 scale.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) scale: f16,
    pub(super) zero: f16,
    inverse: f32,
    top: f32,
}

impl Grid {
    /// The grid of a group whose numbers lie within `low..=high`, as far as f16 reaches.
    pub(super) fn fit(low: f32, high: f32, bits: u8) -> Self {
        let top = ((1_u32 << bits) - 1) as f32;
        let [low, high] = [low, high].map(|x| x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
        let scale = half((high - low) / top);
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        Self { scale, zero: half(low), inverse, top }
    }

    /// The grid of `x`.
    pub(super) fn of(x: &[f32], bits: u8) -> Self {
        // Eight at a time, so that the comparisons become vector instructions.
        let (mut low, mut high) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
        for x in x.chunks(8) {
            for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(x) {
                *low = if x < *low { x } else { *low };
                *high = if x > *high { x } else { *high };
            }
        }
        let least = low.into_iter().fold(f32::INFINITY, f32::min);
        Self::fit(least, high.into_iter().fold(f32::NEG_INFINITY, f32::max), bits)
    }

    /// The codes of the nearest numbers of the grid.
    pub(super) fn codes(&self, x: &[f32], codes: &mut [u8]) {
        let zero = self.zero.to_f32();
        for (code, &x) in codes.iter_mut().zip(x) {
            let steps = (x - zero) * self.inverse + 0.5;
            *code = steps.clamp(0.0, self.top) as i32 as u8;
        }
    }
}

/// What a code stands for.
pub(super) fn decode(code: u8, scale: f16, zero: f32) -> f32 {
    scale.to_f32() * f32::from(code) + zero
}
