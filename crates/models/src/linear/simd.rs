//! Inner loops over slices, compiled for several instruction sets and chosen at run time.
//!
//! Each loop is one plain function of fixed-width lanes that the compiler vectorises; `dispatch!` compiles it again
//! under wider instruction sets. All variants do the same operations, but for fused multiply-adds.

use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use minicache_core::kernels::{Isa, Set};

/// Accumulators per dot product: enough independent chains to hide the latency of additions.
const LANES: usize = 32;

/// Whether a multiply-add is one instruction in the baseline; elsewhere `mul_add` would be a library call.
const BASELINE_FMA: bool = cfg!(target_arch = "aarch64");

macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident ($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $out)? {
                    $body::<true>($($arg),*)
                }
                match Isa::active().set() {
                    // SAFETY: an instruction set is active only on machines that have it.
                    Set::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Set::Avx2 => return unsafe { avx2($($arg),*) },
                    Set::Scalar => {}
                }
            }
            $body::<BASELINE_FMA>($($arg),*)
        }
    };
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn dot_body<const FMA: bool>(w: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let ((w, w_tail), (x, x_tail)) = (w.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    for (w, x) in w.iter().zip(x) {
        for i in 0..LANES {
            lanes[i] = fma::<FMA>(w[i], x[i], lanes[i]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + w_tail.iter().zip(x_tail).map(|(w, x)| w * x).sum::<f32>()
}

dispatch! {
    /// Dot product of two vectors of one length.
    pub(super) fn dot(w: &[f32], x: &[f32]) -> f32 = dot_body
}

/// Dot products of each of `W` weight rows with each of `M` vectors, all of one length. A dot product is the same to the
/// last bit in tiles of any size.
///
/// With AVX-512 and AVX2 the sums of a tile stay in registers, so that every number loaded is used several times;
/// elsewhere it is [`dot`] by [`dot`].
pub(super) fn tile<const W: usize, const M: usize>(w: [&[f32]; W], x: [&[f32]; M]) -> [[f32; M]; W] {
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

#[inline(always)]
fn widen_bf16_body<const FMA: bool>(x: &[bf16], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

dispatch! {
    /// bf16 to f32.
    pub(super) fn widen_bf16(x: &[bf16], out: &mut [f32]) = widen_bf16_body
}

/// f16 to f32 (the `half` crate chooses the instruction).
pub(super) fn widen_f16(x: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    x.convert_to_f32_slice(out);
}

#[inline(always)]
fn sum_squares_body<const FMA: bool>(x: &[f32]) -> f32 {
    dot_body::<FMA>(x, x)
}

dispatch! {
    /// Sum of squares.
    pub(crate) fn sum_squares(x: &[f32]) -> f32 = sum_squares_body
}

/// e^x, within 2 units in the last place (Cephes' `expf` polynomial), without branches.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, x));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p * r, r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[inline(always)]
fn silu_mul_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((g, u), out) in gate.iter().zip(up).zip(out) {
        *out = g / (1.0 + exp::<FMA>(-g)) * u;
    }
}

dispatch! {
    /// SwiGLU's inner part: gate * sigmoid(gate) * up.
    pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_body
}

#[inline(always)]
fn scale_mul_body<const FMA: bool>(x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) {
    for ((x, w), out) in x.iter().zip(weight).zip(out) {
        *out = x * scale * w;
    }
}

dispatch! {
    /// x * scale * weight, number by number.
    pub(crate) fn scale_mul(x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) = scale_mul_body
}

#[inline(always)]
fn add_body<const FMA: bool>(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out += x;
    }
}

dispatch! {
    /// out += x.
    pub(crate) fn add(x: &[f32], out: &mut [f32]) = add_body
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(x: &[f32], scale: f32, out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = fma::<FMA>(*x, scale, *out);
    }
}

dispatch! {
    /// out += scale * x.
    pub(crate) fn add_scaled(x: &[f32], scale: f32, out: &mut [f32]) = add_scaled_body
}

#[cfg(test)]
mod tests {
    use minicache_core::kernels::{Isa, with_isa};

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
                            for got in [of_tile, dot(w, x), dot_body::<false>(w, x)] {
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

    #[test]
    fn silu_everywhere() {
        let gate: Vec<f32> = (-2000..2000).map(|i| i as f32 * 0.05).collect();
        let up = vec![2.0; gate.len()];
        let mut out = vec![0.0; gate.len()];
        silu_mul(&gate, &up, &mut out);
        let mut scalar = vec![0.0; gate.len()];
        silu_mul_body::<false>(&gate, &up, &mut scalar);
        for ((g, got), scalar) in gate.iter().zip(&out).zip(&scalar) {
            let g = f64::from(*g);
            let want = 2.0 * g / (1.0 + (-g).exp());
            for got in [got, scalar] {
                assert!((f64::from(*got) - want).abs() <= 5e-7 * want.abs() + 1e-30, "{g}: {got} {want}");
            }
        }
        let mut out = [0.0];
        silu_mul(&[f32::NAN], &[1.0], &mut out);
        assert!(out[0].is_nan());
    }

    #[test]
    fn widening_is_exact() {
        let x = wave(70, 0.37);
        let (b, h): (Vec<bf16>, Vec<f16>) = x.iter().map(|x| (bf16::from_f32(*x), f16::from_f32(*x))).unzip();
        let mut out = vec![0.0; 70];
        widen_bf16(&b, &mut out);
        assert!(b.iter().zip(&out).all(|(b, o)| b.to_f32() == *o));
        widen_f16(&h, &mut out);
        assert!(h.iter().zip(&out).all(|(h, o)| h.to_f32() == *o));
    }

    #[test]
    fn small_loops() {
        let x = wave(45, 0.2);
        let mut out = vec![1.0; 45];
        add(&x, &mut out);
        add_scaled(&x, 0.5, &mut out);
        assert!(x.iter().zip(&out).all(|(x, o)| (1.0 + 1.5 * x - o).abs() < 1e-6));
        scale_mul(&x, 2.0, &[0.5; 45], &mut out);
        assert_eq!(x, out);
        assert!((sum_squares(&x) - x.iter().map(|x| x * x).sum::<f32>()).abs() < 1e-3);
    }
}
