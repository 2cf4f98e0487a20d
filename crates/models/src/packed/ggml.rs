//! From the blocks of a GGUF file.
//!
//! Block formats: ggml-common.h and ggml-quants.c of ggml (MIT).

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result};
use half::f16;

use super::layout::{BLOCK, Format};
use super::matrix::{PackedMatrix, WeightBlock};

impl PackedMatrix {
    /// Packs a quantised tensor of shape (out_features, in_features).
    ///
    /// Q4_0, Q4_1 and Q8_0 keep their codes and scales exactly. Q4_K keeps its 4-bit codes; its two-level scales
    /// are multiplied out to one f16 scale and minimum per 32 weights (relative rounding 2^-11). Other quantised
    /// types are requantised to [`Format::Q8_0`]. `None` for types that are not quantised (F32, F16, BF16) and if
    /// `in_features` is not a multiple of 32.
    ///
    /// # Errors
    /// If the tensor is not a matrix or its data cannot be read.
    pub fn from_qtensor(q: &QTensor) -> Result<Option<Self>> {
        let (out_features, in_features) = q.shape().dims2()?;
        let dtype = q.dtype();
        if matches!(dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
            || !in_features.is_multiple_of(BLOCK)
        {
            return Ok(None);
        }
        let blocks = in_features / BLOCK;
        let decode: Decode = match dtype {
            GgmlDType::Q4_0 => Decode { format: Format::Q4_0, read: read_q4_0, bytes: 18, blocks: 1 },
            GgmlDType::Q4_1 => Decode { format: Format::Q4_1, read: read_q4_1, bytes: 20, blocks: 1 },
            GgmlDType::Q8_0 => Decode { format: Format::Q8_0, read: read_q8_0, bytes: 34, blocks: 1 },
            GgmlDType::Q4K => Decode { format: Format::Q4_1, read: read_q4_k, bytes: 144, blocks: 8 },
            _ => {
                let dense = q.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                return Ok(Self::quantize_q8(&dense, out_features, in_features));
            }
        };
        let data = q.data()?;
        let needed = out_features * blocks / decode.blocks * decode.bytes;
        if data.len() < needed {
            candle_core::bail!(
                "a {dtype:?} tensor of {out_features} x {in_features} has {} bytes, not {needed}",
                data.len()
            );
        }
        Ok(Some(Self::build(decode.format, out_features, in_features, |row, block| {
            let index = row * blocks + block;
            let start = index / decode.blocks * decode.bytes;
            (decode.read)(&data[start..start + decode.bytes], index % decode.blocks)
        })))
    }
}

/// How a block type of the file is read.
struct Decode {
    format: Format,
    /// From the bytes of one file block and the number of the 32 weights within it.
    read: fn(&[u8], usize) -> WeightBlock,
    /// Length of a file block.
    bytes: usize,
    /// Blocks of 32 weights in a file block.
    blocks: usize,
}

fn read_f16(bytes: &[u8], offset: usize) -> f16 {
    f16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

/// Sixteen bytes: low nibbles are weights 0..16, high nibbles 16..32.
fn read_nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 0xf } else { bytes[i - 16] >> 4 })
}

fn read_q4_0(bytes: &[u8], _: usize) -> WeightBlock {
    WeightBlock { codes: read_nibbles(&bytes[2..]), scale: read_f16(bytes, 0), minimum: f16::ZERO }
}

fn read_q4_1(bytes: &[u8], _: usize) -> WeightBlock {
    WeightBlock { codes: read_nibbles(&bytes[4..]), scale: read_f16(bytes, 0), minimum: read_f16(bytes, 2) }
}

fn read_q8_0(bytes: &[u8], _: usize) -> WeightBlock {
    // Signed to unsigned with an offset of 128: the top bit flips.
    WeightBlock {
        codes: std::array::from_fn(|i| bytes[2 + i] ^ 0x80),
        scale: read_f16(bytes, 0),
        minimum: f16::ZERO,
    }
}

/// A super-block of 256: f16 scales of the scales and of the minima, eight 6-bit scales and minima in 12 bytes,
/// then the nibbles, 64 weights to 32 bytes. Weight = d sc q - dmin m.
fn read_q4_k(bytes: &[u8], sub: usize) -> WeightBlock {
    let (d, d_min) = (read_f16(bytes, 0).to_f32(), read_f16(bytes, 2).to_f32());
    let six = &bytes[4..16];
    let (scale, minimum) = if sub < 4 {
        (six[sub] & 63, six[sub + 4] & 63)
    } else {
        ((six[sub + 4] & 0xf) | (six[sub - 4] >> 6 << 4), (six[sub + 4] >> 4) | (six[sub] >> 6 << 4))
    };
    let nibbles = &bytes[16 + 32 * (sub / 2)..][..32];
    WeightBlock {
        codes: std::array::from_fn(
            |i| if sub.is_multiple_of(2) { nibbles[i] & 0xf } else { nibbles[i] >> 4 },
        ),
        scale: f16::from_f32(d * f32::from(scale)),
        minimum: f16::from_f32(-d_min * f32::from(minimum)),
    }
}
