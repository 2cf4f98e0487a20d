//! Which instruction set the kernels use.

use std::cell::Cell;
use std::sync::OnceLock;

use crate::Result;
use crate::settings::{SettingError, shown};

/// The environment variable that names an instruction set.
const VARIABLE: &str = "MINICACHE_SIMD";

/// The instruction sets that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// Plain Rust; every machine, and what the others are tested against.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON with the dot product extension.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// An instruction set that this machine has: there is no other way to one of these than to have been checked, so that
/// whoever holds one may run its kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Set);

impl Isa {
    /// Plain Rust.
    pub const SCALAR: Isa = Isa(Set::Scalar);

    /// Which one it is.
    #[inline(always)]
    pub fn set(self) -> Set {
        self.0
    }

    /// The name in `MINICACHE_SIMD`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Set::Neon => "neon",
        }
    }

    /// The instruction sets that this machine has, the fastest last.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            found.extend(avx2.then_some(Isa(Set::Avx2)));
            found.extend((avx2 && avx512).then_some(Isa(Set::Avx512)));
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected as has;
            found.extend((has!("neon") && has!("dotprod")).then_some(Isa(Set::Neon)));
        }
        found
    }

    /// The one that the environment variable `MINICACHE_SIMD` names; nothing where it is not set, or empty.
    ///
    /// # Errors
    /// Names of no instruction set, and of one that this machine does not have.
    pub fn named() -> Result<Option<Isa>> {
        let Some(named) = std::env::var_os(VARIABLE).filter(|n| !n.is_empty()) else { return Ok(None) };
        let available = Isa::available();
        if let Some(isa) = available.iter().find(|isa| named == isa.name()) {
            return Ok(Some(*isa));
        }
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        let message = format!(
            "`{}` is no instruction set that this machine has; one of {}, or leave it unset for the fastest",
            shown(&named.to_string_lossy()),
            names.join(", ")
        );
        Err(SettingError::new(VARIABLE, message).into())
    }

    /// The instruction set in force on this thread, for every kernel of the workspace: [`with_isa`]'s, else the one that
    /// [`Isa::named`] gives, else the fastest. A name that is wrong counts as none here: whoever reads the environment
    /// for a user checks it first.
    pub fn active() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        FORCED.get().unwrap_or_else(|| {
            *CHOSEN.get_or_init(|| {
                let named = Isa::named().unwrap_or_default();
                named.or(Isa::available().last().copied()).unwrap_or(Isa::SCALAR)
            })
        })
    }
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Runs `f` with the kernels of `isa` on this thread.
pub fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(isa)));
    f()
}
