//! The inner products of a few rows of activations with a few panels of weights, one file per instruction set.

// Index loops over constant ranges, which unroll into registers, say what iterators over several arrays would hide.
#![allow(clippy::needless_range_loop)]

use std::sync::OnceLock;

use minicache_core::kernels::{Isa, Set};

use super::activations::ActivationBlock;
use super::layout::{Layout, Line, PANEL, Scales};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
pub(super) use scalar::Scalar;

/// The instructions that a product uses. All give the same integer sums; they differ in the rounding of the f32
/// additions between blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// Portable Rust.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C: 8-bit products summed in 16 bits.
    Avx2,
    /// x86-64 with AVX-512 and its 8-bit dot products (VNNI).
    Avx512Vnni,
    /// AArch64: 8-bit products summed in 16 bits.
    Neon,
}

impl InstructionSet {
    /// What this machine can run, the fastest last.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<InstructionSet>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            #[allow(unused_mut)]
            let mut sets = vec![Self::Scalar];
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                {
                    sets.push(Self::Avx2);
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    sets.push(Self::Avx512Vnni);
                }
            }
            // NEON is part of the base architecture.
            #[cfg(target_arch = "aarch64")]
            sets.push(Self::Neon);
            sets
        })
    }

    /// The one in force on this thread, see [`Isa::active`].
    pub fn active() -> Self {
        match Isa::active().set() {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => Self::Avx512Vnni,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Self::Avx2,
            #[cfg(target_arch = "aarch64")]
            Set::Neon => Self::Neon,
            // These kernels do without the dot products that the caches' need: only who asks for plain code gets it.
            #[cfg(target_arch = "aarch64")]
            Set::Scalar if !matches!(Isa::named(), Ok(Some(Isa::SCALAR))) => Self::Neon,
            Set::Scalar => Self::Scalar,
        }
    }
}

/// The weights of [`PANEL`] output rows: `blocks` times [`Layout::LINES`] lines and [`Layout::SCALES`] scales.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) lines: &'a [Line],
    pub(super) scales: &'a [Scales],
}

/// The products of `R` rows of activations with `P` panels.
pub(super) type Tile<const R: usize, const P: usize> = [[[f32; PANEL]; P]; R];

/// One implementation of the inner loop.
pub(super) trait Kernel {
    /// Panels that are worth working on at once: 1 or 2.
    const PANELS: usize;

    /// The inner products of every row of `x` with every output row of `panels`. All of them have `blocks` blocks.
    ///
    /// # Safety
    /// The machine has the instructions of the implementation.
    ///
    /// # Panics
    /// If a panel or row is shorter than `blocks`.
    unsafe fn tile<L: Layout, const R: usize, const P: usize>(
        panels: [Panel<'_>; P],
        x: [&[ActivationBlock]; R],
        blocks: usize,
    ) -> Tile<R, P>;
}
