//! The matrix: construction, concatenation, rows read back.

use half::f16;
use rayon::prelude::*;

use super::kernels::Panel;
use super::layout::{BLOCK, Format, Line, PANEL, Scales, get_codes, put_codes};

/// A quantised weight matrix of shape (out_features, in_features) for products y = x Wᵀ on the CPU.
///
/// Weights stay in the low-bit form of their file and are read once per call, so that decoding one token is bound
/// by memory bandwidth; activations are quantised to int8 in blocks of 32 (as GGML's `Q8_0`/`Q8_1` dot products
/// do), products are summed as integers within a block and as f32 between blocks.
///
/// ```
/// use minicache_models::packed::PackedMatrix;
///
/// // Two outputs, 32 inputs.
/// let weights: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
/// let matrix = PackedMatrix::quantize_q8(&weights, 2, 32).expect("32 is a multiple of the block");
/// let mut y = [0.0; 2];
/// matrix.matmul(&[1.0; 32], 1, &mut y);
/// let exact: f32 = weights[..32].iter().sum();
/// assert!((y[0] / exact - 1.0).abs() < 0.01);
/// ```
#[derive(Clone)]
pub struct PackedMatrix {
    pub(super) format: Format,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    /// Panel by panel, block by block.
    lines: Vec<Line>,
    /// Panel by panel, block by block.
    scales: Vec<Scales>,
}

/// 32 weights of one row.
#[derive(Clone, Copy)]
pub(super) struct WeightBlock {
    /// Unsigned, as [`Format`] defines them.
    pub(super) codes: [u8; BLOCK],
    pub(super) scale: f16,
    /// Zero where the format has none.
    pub(super) minimum: f16,
}

impl WeightBlock {
    /// Absolute-maximum scaling to -127..=127, as [`Format::Q8_0`]. A maximum beyond 127 times the largest f16
    /// saturates.
    pub(super) fn quantize_q8(weights: &[f32; BLOCK]) -> Self {
        let max = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        let scale = f16::from_f32((max / 127.0).min(f16::MAX.to_f32()));
        // With the rounded scale, so that its error does not add to that of the codes.
        let inverse = if scale == f16::ZERO { 0.0 } else { scale.to_f32().recip() };
        let codes = weights.map(|w| ((w * inverse).round().clamp(-127.0, 127.0) as i32 + 128) as u8);
        Self { codes, scale, minimum: f16::ZERO }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?}, {} x {})", self.format, self.out_features, self.in_features)
    }
}

impl PackedMatrix {
    /// Quantises dense weights `w` of shape (`out_features`, `in_features`) to [`Format::Q8_0`]. `None` if
    /// `in_features` is not a multiple of 32, which no kernel supports: multiply densely instead.
    ///
    /// # Panics
    /// If the length of `w` is not `out_features * in_features`.
    pub fn quantize_q8(w: &[f32], out_features: usize, in_features: usize) -> Option<Self> {
        assert_eq!(w.len(), out_features * in_features, "weights are not ({out_features}, {in_features})");
        if !in_features.is_multiple_of(BLOCK) {
            return None;
        }
        let (weights, _) = w.as_chunks::<BLOCK>();
        let blocks = in_features / BLOCK;
        Some(Self::build(Format::Q8_0, out_features, in_features, |row, block| {
            WeightBlock::quantize_q8(&weights[row * blocks + block])
        }))
    }

    /// Packs what `weight(row, block)` gives. `in_features` is a multiple of [`BLOCK`].
    pub(super) fn build(
        format: Format,
        out_features: usize,
        in_features: usize,
        weight: impl Fn(usize, usize) -> WeightBlock + Sync,
    ) -> Self {
        let blocks = in_features / BLOCK;
        let panels = out_features.div_ceil(PANEL);
        let (lines_per_block, scales_per_block) = (format.lines(), format.scales());
        let mut lines = vec![Line::ZERO; panels * blocks * lines_per_block];
        let mut scales = vec![Scales::ZERO; panels * blocks * scales_per_block];
        lines
            .par_chunks_mut((blocks * lines_per_block).max(1))
            .zip(scales.par_chunks_mut((blocks * scales_per_block).max(1)))
            .enumerate()
            .for_each(|(panel, (lines, scales))| {
                let rows = PANEL.min(out_features - panel * PANEL);
                for (b, (lines, scales)) in lines
                    .chunks_exact_mut(lines_per_block)
                    .zip(scales.chunks_exact_mut(scales_per_block))
                    .enumerate()
                {
                    for lane in 0..rows {
                        let block = weight(panel * PANEL + lane, b);
                        put_codes(lines, lane, &block.codes);
                        scales[0].0[lane] = block.scale;
                        if let Some(minimum) = scales.get_mut(1) {
                            minimum.0[lane] = block.minimum;
                        }
                    }
                }
            });
        Self { format, out_features, in_features, lines, scales }
    }

    /// The rows of all parts, one part after the other, as one matrix: fuses q, k and v, or gate and up, into one
    /// product. `None` if there is no part or the parts differ in format or `in_features`.
    pub fn concat(parts: &[Self]) -> Option<Self> {
        let first = parts.first()?;
        let (format, in_features) = (first.format, first.in_features);
        if parts.iter().any(|part| part.format != format || part.in_features != in_features) {
            return None;
        }
        // Row r of the whole is row r - start of the part that starts last before it.
        let starts: Vec<usize> = parts
            .iter()
            .scan(0, |end, part| {
                *end += part.out_features;
                Some(*end - part.out_features)
            })
            .collect();
        let out_features = parts.iter().map(|part| part.out_features).sum();
        Some(Self::build(format, out_features, in_features, |row, block| {
            let part = starts.partition_point(|&start| start <= row) - 1;
            parts[part].block(row - starts[part], block)
        }))
    }

    fn block(&self, row: usize, block: usize) -> WeightBlock {
        let Panel { lines, scales } = self.panel(row / PANEL);
        let (lane, n) = (row % PANEL, self.format.lines());
        let scales = &scales[block * self.format.scales()..(block + 1) * self.format.scales()];
        WeightBlock {
            codes: get_codes(&lines[block * n..(block + 1) * n], lane),
            scale: scales[0].0[lane],
            minimum: scales.get(1).map_or(f16::ZERO, |minimum| minimum.0[lane]),
        }
    }

    /// Writes one weight row, dequantised, to `out` (an embedding look-up).
    ///
    /// # Panics
    /// If `index` is not below `out_features`, or `out` has not `in_features` elements.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.out_features, "row {index} of a matrix of {} rows", self.out_features);
        assert_eq!(out.len(), self.in_features, "a row has {} elements", self.in_features);
        let zero = self.format.zero();
        let (out, _) = out.as_chunks_mut::<BLOCK>();
        for (b, out) in out.iter_mut().enumerate() {
            let block = self.block(index, b);
            let (scale, minimum) = (block.scale.to_f32(), block.minimum.to_f32());
            for (out, code) in out.iter_mut().zip(block.codes) {
                *out = scale * (i32::from(code) - zero) as f32 + minimum;
            }
        }
    }

    /// Bytes held, padding included.
    pub fn bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>() + self.scales.capacity() * size_of::<Scales>()
    }

    /// Rows of W: length of an output row.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of W: length of an input row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The number format of the weights.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Blocks per row.
    pub(super) fn blocks(&self) -> usize {
        self.in_features / BLOCK
    }

    /// Number of panels, the last of which may have unused rows.
    pub(super) fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        let lines = self.blocks() * self.format.lines();
        let scales = self.blocks() * self.format.scales();
        Panel {
            lines: &self.lines[index * lines..(index + 1) * lines],
            scales: &self.scales[index * scales..(index + 1) * scales],
        }
    }
}
