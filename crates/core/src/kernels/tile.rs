//! Dot products of rows of weights with vectors, several of each at a time.

use super::loops::dot;
#[cfg(target_arch = "x86_64")]
use super::{Isa, Set};

/// Dot products of each of `W` weight rows with each of `M` vectors, all of one length. A dot product is the same to the
/// last bit in tiles of any size.
///
/// With AVX-512 and AVX2 the sums of a tile stay in registers, so that every number loaded is used several times;
/// elsewhere it is [`dot`] by [`dot`].
pub fn tile<const W: usize, const M: usize>(w: [&[f32]; W], x: [&[f32]; M]) -> [[f32; M]; W] {
    #[cfg(target_arch = "x86_64")]
    match Isa::active().set() {
        // SAFETY: an instruction set is active only on machines that have it.
        Set::Avx512 => return unsafe { avx512::tile(w, x) },
        Set::Avx2 => {
            // Two rows at a time: sixteen registers hold no more.
            let mut out = [[0.0; M]; W];
            for (out, w) in out.chunks_mut(2).zip(w.chunks(2)) {
                match (w, out) {
                    // SAFETY: as above.
                    (&[a, b], [of_a, of_b]) => [*of_a, *of_b] = unsafe { avx2::tile([a, b], x) },
                    // SAFETY: as above.
                    (&[a], [of_a]) => [*of_a] = unsafe { avx2::tile([a], x) },
                    _ => unreachable!("chunks of one or two"),
                }
            }
            return out;
        }
        Set::Scalar => {}
    }
    w.map(|w| x.map(|x| dot(w, x)))
}

/// `tile` in registers of one instruction set: each sum has the lanes of one register, added up at the end.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_in_registers {
    ($name:ident, $features:literal, $lanes:literal, $zero:ident, $load:path, $fma:ident, $total:path) => {
        mod $name {
            use std::arch::x86_64::*;

            #[target_feature(enable = $features)]
            pub(super) fn tile<const W: usize, const M: usize>(
                w: [&[f32]; W],
                x: [&[f32]; M],
            ) -> [[f32; M]; W] {
                let length = w[0].len();
                assert!(w.iter().chain(&x).all(|row| row.len() == length), "rows of unequal length");
                let mut sums = [[$zero(); M]; W];
                for at in (0..length).step_by($lanes) {
                    let left = length - at;
                    let mut rows = [$zero(); W];
                    for (row, w) in rows.iter_mut().zip(&w) {
                        // SAFETY: at least `left` numbers of the row lie from `at` on.
                        *row = unsafe { $load(w.as_ptr().add(at), left) };
                    }
                    for m in 0..M {
                        // SAFETY: as above.
                        let x = unsafe { $load(x[m].as_ptr().add(at), left) };
                        for i in 0..W {
                            sums[i][m] = $fma(rows[i], x, sums[i][m]);
                        }
                    }
                }
                let mut out = [[0f32; M]; W];
                for (out, sums) in out.iter_mut().zip(&sums) {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = $total(*sum);
                    }
                }
                out
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
tile_in_registers!(
    avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    super::load16,
    _mm512_fmadd_ps,
    _mm512_reduce_add_ps
);

#[cfg(target_arch = "x86_64")]
tile_in_registers!(avx2, "avx2,fma", 8, _mm256_setzero_ps, super::load8, _mm256_fmadd_ps, super::total8);

/// Sixteen numbers, or the `left` that there are and zeros.
///
/// # Safety
/// As many numbers can be read.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load16(from: *const f32, left: usize) -> std::arch::x86_64::__m512 {
    let mask = if left >= 16 { u16::MAX } else { (1 << left) - 1 };
    // SAFETY: the mask keeps what lies past the end from being read.
    unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask, from) }
}

/// Eight numbers, or the `left` that there are and zeros.
///
/// # Safety
/// As many numbers can be read.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load8(from: *const f32, left: usize) -> std::arch::x86_64::__m256 {
    use std::arch::x86_64::*;
    if left >= 8 {
        // SAFETY: the caller's.
        return unsafe { _mm256_loadu_ps(from) };
    }
    let lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left as i32), lanes);
    // SAFETY: the mask keeps what lies past the end from being read.
    unsafe { _mm256_maskload_ps(from, mask) }
}

/// The sum of eight lanes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn total8(x: std::arch::x86_64::__m256) -> f32 {
    use std::arch::x86_64::*;
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, with_isa};
    use super::*;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 3.0).collect()
    }

    #[test]
    fn dots_of_every_length() {
        for n in [1, 7, 15, 16, 17, 31, 32, 33, 64, 100, 577] {
            let rows = [0.3, 0.5, 0.9].map(|f| wave(n, f));
            let x = [0.7, 1.1].map(|f| wave(n, f));
            let (rows, x) = (rows.each_ref().map(Vec::as_slice), x.each_ref().map(Vec::as_slice));
            for isa in Isa::available() {
                with_isa(isa, || {
                    for (w, tiles) in rows.iter().zip(tile(rows, x)) {
                        for (x, of_tile) in x.iter().zip(tiles) {
                            let want: f64 =
                                w.iter().zip(*x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                            for got in [of_tile, dot(w, x)] {
                                let tolerance = 1e-5 * (n as f64 + 1.0);
                                assert!((f64::from(got) - want).abs() < tolerance, "{n}: {got} {want}");
                            }
                            assert_eq!(tile([w], [x]), [[of_tile]], "{isa:?}, {n}: in a tile and alone");
                        }
                    }
                });
            }
        }
    }
}
