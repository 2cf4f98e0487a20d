//! Activations as int8 blocks with f32 scales.

use minicache_core::kernels::Isa;
#[cfg(target_arch = "x86_64")]
use minicache_core::kernels::Set;
use rayon::prelude::*;

use super::layout::BLOCK;

/// Added to a float of at most 22 bits, it leaves the nearest integer (ties to even) in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// Blocks whose values are all smaller are quantised to zero.
const SMALLEST: f32 = 1e-30;

/// 32 activations: x = scale * quant, with what the weight formats need of their sum.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(super) struct ActivationBlock {
    /// Signed bytes, four consecutive inputs to a word in memory order: what one instruction takes.
    fours: [i32; BLOCK / 4],
    pub(super) scale: f32,
    /// scale * sum of quants: what the minimum of an asymmetric weight block multiplies.
    pub(super) weighted_sum: f32,
    /// Minus the sum of quants: what the zero code of a symmetric weight block multiplies.
    pub(super) negative_sum: i32,
}

impl ActivationBlock {
    const ZERO: Self = Self { fours: [0; BLOCK / 4], scale: 0.0, weighted_sum: 0.0, negative_sum: 0 };

    /// Inputs 4 `g` to 4 `g` + 3 as signed bytes in memory order.
    #[inline(always)]
    pub(super) fn four(&self, g: usize) -> i32 {
        self.fours[g]
    }

    /// One by one.
    pub(super) fn quants(&self) -> impl Iterator<Item = i8> {
        self.fours.iter().flat_map(|four| four.to_ne_bytes()).map(|byte| byte as i8)
    }

    /// Absolute-maximum scaling to -127..=127. Inputs that are not finite make the scale, and so every output
    /// that reads the block, not finite.
    #[inline(always)]
    fn quantize(x: &[f32; BLOCK]) -> Self {
        // For non-negative floats the order of the bits is the order of the numbers, NaN above all; integers
        // let the compiler reduce in any order, hence in vector registers.
        let max = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let max = f32::from_bits(max);
        // The inverse of a tiny maximum would be infinite; such a block counts as zero.
        let inverse = if max < SMALLEST { 0.0 } else { 127.0 / max };
        let mut quants = [0i8; BLOCK];
        let mut sum = 0i32;
        for (q, v) in quants.iter_mut().zip(x) {
            *q = (v * inverse + ROUND).to_bits() as i8;
            sum += i32::from(*q);
        }
        let scale = max / 127.0;
        let mut fours = [0; BLOCK / 4];
        for (four, quants) in fours.iter_mut().zip(quants.as_chunks::<4>().0) {
            *four = i32::from_ne_bytes(quants.map(|q| q as u8));
        }
        Self { fours, scale, weighted_sum: scale * sum as f32, negative_sum: -sum }
    }
}

/// Rows of activations, quantised once and multiplied with any number of matrices.
///
/// Each row is cut into blocks of 32 values, each with an f32 scale and signed 8-bit values, as GGML's Q8_1.
/// A value can be used again for other input with [`Activations::assign`], which keeps the allocation.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    blocks: Vec<ActivationBlock>,
    rows: usize,
    in_features: usize,
}

impl Activations {
    /// Quantises `x` of shape (`rows`, `in_features`).
    ///
    /// # Panics
    /// If the length of `x` is not `rows * in_features`, or `in_features` is not a multiple of 32.
    pub fn quantize(x: &[f32], rows: usize, in_features: usize) -> Self {
        let mut activations = Self::default();
        activations.assign(x, rows, in_features);
        activations
    }

    /// [`Activations::quantize`] into memory that is already there.
    ///
    /// # Panics
    /// As [`Activations::quantize`].
    pub fn assign(&mut self, x: &[f32], rows: usize, in_features: usize) {
        assert_eq!(x.len(), rows * in_features, "activations are not of shape ({rows}, {in_features})");
        assert!(in_features.is_multiple_of(BLOCK), "{in_features} inputs are not a multiple of {BLOCK}");
        (self.rows, self.in_features) = (rows, in_features);
        self.blocks.resize(x.len() / BLOCK, ActivationBlock::ZERO);
        let (x, _) = x.as_chunks::<BLOCK>();
        // About 10 ns per block: below this the hand-over to another thread costs more than it saves.
        const SERIAL: usize = 4096;
        if x.len() <= SERIAL {
            quantize_blocks(x, &mut self.blocks);
        } else {
            let piece = x.len().div_ceil(rayon::current_num_threads()).max(SERIAL / 4);
            x.par_chunks(piece)
                .zip(self.blocks.par_chunks_mut(piece))
                .for_each(|(x, blocks)| quantize_blocks(x, blocks));
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The blocks of one row.
    pub(super) fn row(&self, row: usize) -> &[ActivationBlock] {
        let blocks = self.in_features / BLOCK;
        &self.blocks[row * blocks..(row + 1) * blocks]
    }
}

/// Quantises block by block with the vectors of the instruction set in force.
fn quantize_blocks(x: &[[f32; BLOCK]], out: &mut [ActivationBlock]) {
    match Isa::active().set() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction set is active only on machines that have it.
        Set::Avx512 => unsafe { quantize_blocks_avx512(x, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Set::Avx2 => unsafe { quantize_blocks_avx2(x, out) },
        _ => quantize_blocks_portable(x, out),
    }
}

#[inline(always)]
fn quantize_blocks_portable(x: &[[f32; BLOCK]], out: &mut [ActivationBlock]) {
    for (x, out) in x.iter().zip(out) {
        *out = ActivationBlock::quantize(x);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_blocks_avx512(x: &[[f32; BLOCK]], out: &mut [ActivationBlock]) {
    quantize_blocks_portable(x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_blocks_avx2(x: &[[f32; BLOCK]], out: &mut [ActivationBlock]) {
    quantize_blocks_portable(x, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_paths_equal_the_portable_one() {
        let x: Vec<[f32; BLOCK]> = (0..50)
            .map(|b| std::array::from_fn(|i| ((b * 37 + i * 101) % 211) as f32 * 0.01 - 1.0 - b as f32))
            .chain([[0.0; BLOCK], [1e-42; BLOCK]])
            .collect();
        let mut fast = vec![ActivationBlock::ZERO; x.len()];
        let mut portable = fast.clone();
        quantize_blocks(&x, &mut fast);
        quantize_blocks_portable(&x, &mut portable);
        for ((f, p), x) in fast.iter().zip(&portable).zip(&x) {
            assert_eq!(f.fours, p.fours);
            assert_eq!((f.scale, f.weighted_sum, f.negative_sum), (p.scale, p.weighted_sum, p.negative_sum));
            for (q, x) in p.quants().zip(x) {
                assert!(
                    (f32::from(q) * p.scale - x).abs() <= 0.5001 * p.scale + SMALLEST,
                    "{q} {} {x}",
                    p.scale
                );
            }
            assert_eq!(p.negative_sum, -p.quants().map(i32::from).sum::<i32>());
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [0.5; BLOCK];
            x[7] = bad;
            assert!(!ActivationBlock::quantize(&x).scale.is_finite());
        }
    }
}
