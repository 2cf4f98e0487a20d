//! Cache lines: the unit in which the store allocates, so that every strip of codes starts on a line.

use half::f16;

/// One cache line of storage, zeroed or filled through the views below.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; Line::BYTES]);

impl Line {
    /// Bytes of a line.
    pub(crate) const BYTES: usize = 64;
    /// A line of zero bytes.
    pub(crate) const ZERO: Line = Line([0; Line::BYTES]);

    /// Lines that hold `bytes`.
    pub(crate) fn count(bytes: usize) -> usize {
        bytes.div_ceil(Self::BYTES)
    }
}

/// A number that lines can hold: plain data of which every bit pattern is a value.
///
/// # Safety
/// `Self` has no padding and no invalid bit patterns, its size divides a line and its alignment is at most a line's.
#[allow(clippy::missing_safety_doc)] // Stated above; the trait is private to the crate.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: a byte.
unsafe impl Plain for u8 {}
// SAFETY: `repr(transparent)` over u16.
unsafe impl Plain for f16 {}
// SAFETY: every pattern of 32 bits is an f32.
unsafe impl Plain for f32 {}

/// Lines seen as numbers.
pub(crate) fn view<T: Plain>(lines: &[Line]) -> &[T] {
    let n = size_of_val(lines) / size_of::<T>();
    // SAFETY: lines are initialised, without padding, aligned to 64 bytes; `Plain` promises that any bytes are a T,
    // that T divides a line and is aligned no stricter. The length covers exactly the lines' bytes.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), n) }
}

/// Lines seen as numbers, to be written.
pub(crate) fn view_mut<T: Plain>(lines: &mut [Line]) -> &mut [T] {
    let n = size_of_val(lines) / size_of::<T>();
    // SAFETY: as `view`; the borrow is exclusive, and every T written leaves valid bytes in the lines.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), n) }
}

/// Asks for lines that are read soon: hardware prefetchers lose their place where a head's part of a block ends.
#[inline]
pub(crate) fn prefetch(lines: &[Line]) {
    lines.iter().for_each(|line| prefetch_line(std::ptr::from_ref(line).cast()));
}

/// Asks for the line at an address, which need not be readable, into the second-level cache: hints for the first
/// level wait for one of its few miss buffers and come to half the bandwidth.
#[inline(always)]
pub(super) fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, without effect on what is not readable; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, without effect on what is not readable.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) address, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}
