//! Tensors of a GGUF file by their Hugging Face names.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use super::{Gguf, Place};
use crate::{Result, WeightSource};

/// Tensors that are rotary factors, not weights.
const IN_CONFIG: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The bytes of one Hugging Face tensor, in its row order.
struct Found<'a> {
    bytes: Cow<'a, [u8]>,
    dtype: GgmlDType,
    dims: Vec<usize>,
}

impl WeightSource for Gguf {
    fn origin(&self) -> String {
        self.path().display().to_string()
    }

    /// Tensors without a Hugging Face name keep their own; those that the configuration holds are left out.
    fn names(&self) -> Vec<String> {
        self.places.keys().filter(|name| !IN_CONFIG.contains(&name.as_str())).cloned().collect()
    }

    fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        let place = self.places.get(name)?;
        let dims = &self.tensors.get(&place.tensor)?.dims;
        Some(if place.expert.is_some() { dims[1..].to_vec() } else { dims.clone() })
    }

    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.stored(name, shape)?.to_dtype(DType::F32)?)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.find(name, shape)?;
        let dtype = match found.dtype {
            GgmlDType::F32 => DType::F32,
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            _ => return Ok(found.into_quantized()?.dequantize(&Device::Cpu)?),
        };
        Ok(Tensor::from_raw_buffer(&found.bytes, dtype, shape, &Device::Cpu)?)
    }

    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        let found = self.find(name, shape)?;
        if matches!(found.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
            return Ok(None);
        }
        Ok(Some(found.into_quantized()?))
    }
}

impl Gguf {
    fn find(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let missing =
            || self.error(format!("tensor {name} is missing; the file does not hold a whole model"));
        let place = self.places.get(name).ok_or_else(missing)?;
        let stored = self.tensors.get(&place.tensor).ok_or_else(missing)?;
        let dims = self.shape_of(name).ok_or_else(missing)?;
        if dims != shape {
            let message =
                format!("tensor {name} ({}) has shape {dims:?}, its metadata says {shape:?}", place.tensor);
            return Err(self.error(message));
        }
        let mut bytes = self.bytes(stored);
        if let Some(expert) = place.expert {
            let size = bytes.len() / stored.dims[0].max(1);
            bytes = &bytes[expert * size..(expert + 1) * size];
        }
        if !finite(bytes, stored.dtype) {
            return Err(
                self.error(format!("{name} ({}) holds NaN or infinity; the file is broken", place.tensor))
            );
        }
        let bytes = halves_apart(bytes, &dims, place)
            .ok_or_else(|| self.error(format!("tensor {name}: {} rows do not divide into heads", dims[0])))?;
        Ok(Found { bytes, dtype: stored.dtype, dims })
    }
}

impl Found<'_> {
    fn into_quantized(self) -> Result<QTensor> {
        // candle reads blocks in place and insists on their alignment; a copy on the heap has it.
        let misaligned = self.bytes.as_ptr().align_offset(8) != 0;
        let bytes = if misaligned { Cow::Owned(self.bytes.into_owned()) } else { self.bytes };
        let storage = QStorage::from_data(bytes, &Device::Cpu, self.dtype)?;
        Ok(QTensor::new(storage, self.dims)?)
    }
}

/// Whether all numbers are finite: of quantised weights the f16 scales of each block, whose codes always are.
fn finite(bytes: &[u8], dtype: GgmlDType) -> bool {
    let f16 = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 != 0x7c00;
    let scales: &[usize] = match dtype {
        GgmlDType::F32 => return bytes.as_chunks().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
        GgmlDType::F16 => return bytes.chunks_exact(2).all(f16),
        GgmlDType::BF16 => return bytes.chunks_exact(2).all(|b| b[1] & 0x7f != 0x7f || b[0] & 0x80 == 0),
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        GgmlDType::Q8_1 | GgmlDType::Q8K => &[],
    };
    bytes.chunks_exact(dtype.type_size()).all(|block| scales.iter().all(|&at| f16(&block[at..])))
}

/// Undoes the permutation of llama.cpp's converter (`LlamaModel.permute`): row 2i + j of a head goes back to row
/// j * head_dim/2 + i. Whole rows move, so blocks of quantised ones stay intact. `None` if rows are not whole heads.
fn halves_apart<'a>(bytes: &'a [u8], dims: &[usize], place: &Place) -> Option<Cow<'a, [u8]>> {
    let Some(heads) = place.interleaved_heads else { return Some(Cow::Borrowed(bytes)) };
    let rows = *dims.first()?;
    if heads == 0 || rows == 0 || rows % (2 * heads) != 0 {
        return None;
    }
    let (half, row) = (rows / heads / 2, bytes.len() / rows);
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(2 * half * row) {
        for j in 0..2 {
            for i in 0..half {
                out.extend_from_slice(&head[(2 * i + j) * row..(2 * i + j + 1) * row]);
            }
        }
    }
    Some(Cow::Owned(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_scales_are_seen() {
        for (dtype, at) in
            [(GgmlDType::Q8_0, 0), (GgmlDType::Q4_1, 2), (GgmlDType::Q2K, 82), (GgmlDType::Q6K, 208)]
        {
            let mut bytes = vec![0xffu8; 3 * dtype.type_size()];
            // Codes may be any bits; scales of one.
            for block in bytes.chunks_exact_mut(dtype.type_size()) {
                let last = block.len() - 2;
                for scale in [0, 2, 80, 82, 108, 208].into_iter().filter(|&s| s <= last) {
                    block[scale..scale + 2].copy_from_slice(&[0, 0x3c]);
                }
            }
            assert!(finite(&bytes, dtype), "{dtype:?}");
            let block = dtype.type_size();
            bytes[2 * block + at..2 * block + at + 2].copy_from_slice(&[1, 0x7c]);
            assert!(!finite(&bytes, dtype), "{dtype:?}");
        }
        assert!(!finite(&f32::INFINITY.to_le_bytes(), GgmlDType::F32));
        assert!(finite(&[0x7f, 0x7f], GgmlDType::BF16) && !finite(&[0x80, 0x7f], GgmlDType::BF16));
    }

    #[test]
    fn rows_go_back_to_half_split_order() {
        // Two heads of six rows, one byte a row; the stored order is 0 3 1 4 2 5 within a head.
        let place = Place { tensor: String::new(), expert: None, interleaved_heads: Some(2) };
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let rows = halves_apart(&stored, &[12, 1], &place);
        assert_eq!(rows.as_deref(), Some(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11][..]));
        assert_eq!(halves_apart(&stored, &[12, 1], &Place { interleaved_heads: Some(5), ..place }), None);
    }
}
