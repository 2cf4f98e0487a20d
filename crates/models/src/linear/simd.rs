//! Inner loops over slices, compiled for several instruction sets and chosen at run time.
//!
//! Each loop is one plain function of fixed-width lanes that the compiler vectorises; `dispatch!` compiles it again
//! under wider instruction sets. All variants do the same operations, but for fused multiply-adds.

use std::sync::OnceLock;

use half::{bf16, f16};

/// Accumulators per dot product: enough independent chains to hide the latency of additions.
const LANES: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Scalar
    })
}

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
                match level() {
                    // SAFETY: `level` has found the features on this machine.
                    Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    Level::Scalar => {}
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

/// Dot products of each of `W` weight rows with each of `M` vectors, all of one length.
///
/// With AVX-512 all W * M sums stay in registers, so that every number loaded is used several times; elsewhere it is
/// [`dot`] by [`dot`].
pub(super) fn tile<const W: usize, const M: usize>(w: [&[f32]; W], x: [&[f32]; M]) -> [[f32; M]; W] {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        // SAFETY: `level` has found the features on this machine.
        return unsafe { tile_avx512(w, x) };
    }
    w.map(|w| x.map(|x| dot(w, x)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn tile_avx512<const W: usize, const M: usize>(w: [&[f32]; W], x: [&[f32]; M]) -> [[f32; M]; W] {
    use std::arch::x86_64::{
        _mm512_fmadd_ps, _mm512_maskz_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
    };
    let length = w[0].len();
    assert!(w.iter().chain(&x).all(|row| row.len() == length), "rows of unequal length");
    let mut sums = [[_mm512_setzero_ps(); M]; W];
    for at in (0..length).step_by(16) {
        let mask = if length - at >= 16 { u16::MAX } else { (1 << (length - at)) - 1 };
        let mut rows = [_mm512_setzero_ps(); W];
        for (row, w) in rows.iter_mut().zip(&w) {
            // SAFETY: `at` lies within the row; the mask keeps what lies past its end from being read.
            *row = unsafe { _mm512_maskz_loadu_ps(mask, w.as_ptr().add(at)) };
        }
        for m in 0..M {
            // SAFETY: as above.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x[m].as_ptr().add(at)) };
            for i in 0..W {
                sums[i][m] = _mm512_fmadd_ps(rows[i], x, sums[i][m]);
            }
        }
    }
    let mut out = [[0f32; M]; W];
    for (out, sums) in out.iter_mut().zip(&sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = _mm512_reduce_add_ps(*sum);
        }
    }
    out
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
    use super::*;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 3.0).collect()
    }

    #[test]
    fn dots_of_every_length() {
        for n in [1, 7, 15, 16, 17, 31, 32, 33, 64, 100, 577] {
            let rows = [0.3, 0.5, 0.9].map(|f| wave(n, f));
            let x = [0.7, 1.1].map(|f| wave(n, f));
            let tiles = tile(rows.each_ref().map(Vec::as_slice), x.each_ref().map(Vec::as_slice));
            for (w, tile) in rows.iter().zip(tiles) {
                for (x, tile) in x.iter().zip(tile) {
                    let want = w.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                    for got in [tile, dot(w, x), dot_body::<false>(w, x)] {
                        assert!((f64::from(got) - want).abs() < 1e-5 * (n as f64 + 1.0), "{n}: {got} {want}");
                    }
                }
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
