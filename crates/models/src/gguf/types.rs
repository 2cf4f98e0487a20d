//! Types of weights in GGUF files.

use candle_core::quantized::GgmlDType;
use half::f16;

/// A type of weights that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WeightType {
    /// One that candle knows.
    Ggml(GgmlDType),
    /// 4-bit codes of values that are not evenly spaced, 32 with one scale.
    Iq4Nl,
    /// The same, 256 with one scale and eight more within.
    Iq4Xs,
}

/// The names of ggml's types by their numbers.
const NAMES: [&str; 40] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

const READ: &str =
    "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL and IQ4_XS";

impl WeightType {
    /// # Errors
    /// Names a type that is not read.
    pub(super) fn by_number(number: u32) -> Result<Self, String> {
        Ok(Self::Ggml(match number {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            20 => return Ok(Self::Iq4Nl),
            23 => return Ok(Self::Iq4Xs),
            30 => GgmlDType::BF16,
            other => {
                let name = NAMES.get(other as usize).map(|name| (*name).to_string());
                let name = name.unwrap_or_else(|| format!("number {other}"));
                return Err(format!(
                    "has the type {name}, which is a weight type that is not supported; supported are {READ}"
                ));
            }
        }))
    }

    /// Numbers of one block.
    pub(super) fn block(self) -> usize {
        match self {
            Self::Ggml(kind) => kind.block_size(),
            Self::Iq4Nl => 32,
            Self::Iq4Xs => 256,
        }
    }

    /// Bytes of one block.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Ggml(kind) => kind.type_size(),
            Self::Iq4Nl => 18,
            Self::Iq4Xs => 136,
        }
    }

    /// Whether all numbers are finite: of quantised weights the f16 scales of each block, whose codes always are.
    pub(super) fn is_finite(self, bytes: &[u8]) -> bool {
        let f16 = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 != 0x7c00;
        let scales: &[usize] = match self {
            Self::Iq4Nl | Self::Iq4Xs => &[0],
            Self::Ggml(kind) => match kind {
                GgmlDType::F32 => {
                    return bytes.as_chunks().0.iter().all(|b| f32::from_le_bytes(*b).is_finite());
                }
                GgmlDType::F16 => return bytes.chunks_exact(2).all(f16),
                GgmlDType::BF16 => {
                    return bytes.chunks_exact(2).all(|b| b[1] & 0x7f != 0x7f || b[0] & 0x80 == 0);
                }
                GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
                GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
                GgmlDType::Q2K => &[80, 82],
                GgmlDType::Q3K => &[108],
                GgmlDType::Q6K => &[208],
                GgmlDType::Q8_1 | GgmlDType::Q8K => &[],
            },
        };
        bytes.chunks_exact(self.bytes()).all(|block| scales.iter().all(|&at| f16(&block[at..])))
    }
}

/// The values of 4-bit codes (`kvalues_iq4nl` of ggml).
const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

fn scale(block: &[u8]) -> f32 {
    f16::from_le_bytes([block[0], block[1]]).to_f32()
}

/// 32 codes: the low halves of 16 bytes, then the high ones.
fn codes(scale: f32, bytes: &[u8], out: &mut Vec<f32>) {
    out.extend(bytes.iter().map(|b| scale * IQ4[usize::from(b & 15)]));
    out.extend(bytes.iter().map(|b| scale * IQ4[usize::from(b >> 4)]));
}

/// The numbers of IQ4_NL blocks.
pub(super) fn decode_iq4_nl(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 18 * 32);
    bytes.as_chunks::<18>().0.iter().for_each(|block| codes(scale(block), &block[2..], &mut out));
    out
}

/// The numbers of IQ4_XS blocks: behind the scale the upper two bits of eight scales of six, the lower four, the codes.
pub(super) fn decode_iq4_xs(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 136 * 256);
    for block in bytes.as_chunks::<136>().0 {
        let upper = u16::from_le_bytes([block[2], block[3]]);
        for (part, bytes) in block[8..].chunks_exact(16).enumerate() {
            let low = block[4 + part / 2] >> (4 * (part % 2)) & 15;
            let high = (upper >> (2 * part) & 3) as u8;
            codes(scale(block) * f32::from(i16::from(low | high << 4) - 32), bytes, &mut out);
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::excessive_precision)] // the reference's digits, all of them exact
mod tests {
    use super::*;

    /// Blocks of bytes that any formula can make; values of the `gguf` package of llama.cpp, version 0.19.0.
    #[test]
    fn iq4_decodes_as_the_reference() {
        let blocks = |size: usize| {
            let mut bytes: Vec<u8> = (0..3 * size).map(|i| (i * 37 + 11) as u8).collect();
            for (k, high) in [0x2c, 0xb0, 0x1f].into_iter().enumerate() {
                bytes[k * size..k * size + 2].copy_from_slice(&[0x34 + k as u8, high]);
            }
            bytes
        };
        let nl = [
            -2.298583984375,
            -6.830078125,
            -0.65673828125,
            8.5455322265625,
            -11.7008056640625,
            -3.2867431640625,
            -0.73236083984375,
            -0.73236083984375,
        ];
        let xs = [
            4.268798828125,
            17.0751953125,
            -128.06396484375,
            -99.9169921875,
            -4.995849609375,
            104.912841796875,
            -1.830902099609375,
            -1.3731765747070312,
        ];
        let check = |got: Vec<f32>, want: [f32; 8], sum: f64, magnitude: f64| {
            let every: Vec<f32> = got.iter().copied().step_by(got.len() / 8).collect();
            assert_eq!(every, want);
            let got = got.iter().map(|x| f64::from(*x));
            assert!((got.clone().sum::<f64>() - sum).abs() < 1e-9);
            assert!((got.map(f64::abs).sum::<f64>() - magnitude).abs() < 1e-9);
        };
        check(decode_iq4_nl(&blocks(18)), nl, -2.8884353637695312, 371.58483123779297);
        check(decode_iq4_xs(&blocks(136)), xs, -1242.477066040039, 42312.36364746094);
    }

    #[test]
    fn broken_scales_are_seen() {
        for (number, at) in [(8, 0), (3, 2), (10, 82), (14, 208), (20, 0), (23, 0)] {
            let kind = WeightType::by_number(number).expect("is read");
            let mut bytes = vec![0xffu8; 3 * kind.bytes()];
            // Codes may be any bits; scales of one.
            for block in bytes.chunks_exact_mut(kind.bytes()) {
                let last = block.len() - 2;
                for scale in [0, 2, 80, 82, 108, 208].into_iter().filter(|&s| s <= last) {
                    block[scale..scale + 2].copy_from_slice(&[0, 0x3c]);
                }
            }
            assert!(kind.is_finite(&bytes), "{kind:?}");
            let block = kind.bytes();
            bytes[2 * block + at..2 * block + at + 2].copy_from_slice(&[1, 0x7c]);
            assert!(!kind.is_finite(&bytes), "{kind:?}");
        }
        let float = WeightType::Ggml;
        assert!(!float(GgmlDType::F32).is_finite(&f32::INFINITY.to_le_bytes()));
        assert!(float(GgmlDType::BF16).is_finite(&[0x7f, 0x7f]));
        assert!(!float(GgmlDType::BF16).is_finite(&[0x80, 0x7f]));
    }

    #[test]
    fn types_that_are_not_read_are_named() {
        for (number, name) in
            [(16, "IQ2_XXS"), (29, "IQ1_M"), (34, "TQ1_0"), (39, "MXFP4"), (99, "number 99")]
        {
            let message = WeightType::by_number(number).err().unwrap_or_default();
            assert!(message.contains(name), "{message}");
        }
    }
}
