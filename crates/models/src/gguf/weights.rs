//! Tensors of a GGUF file by their Hugging Face names.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use minicache_config::shown;

use super::Gguf;
use super::names::{Location, Place};
use super::types::{WeightType, decode_iq4_nl, decode_iq4_xs};
use crate::{Result, WeightSource};

/// Tensors that are rotary factors, not weights.
const IN_CONFIG: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The bytes of one Hugging Face tensor, in its row order.
struct Found<'a> {
    bytes: Cow<'a, [u8]>,
    kind: WeightType,
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
        let place = match self.places.get(name)? {
            Place::Zeros(length) => return Some(vec![*length]),
            Place::Stored(place) => place,
        };
        let dims = &self.tensors.get(&place.tensor)?.dims;
        Some(if place.expert.is_some() { dims[1..].to_vec() } else { dims.clone() })
    }

    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.stored(name, shape)?.to_dtype(DType::F32)?)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.find(name, shape)?;
        let floats = |data| Ok(Tensor::from_vec(data, shape, &Device::Cpu)?);
        let dtype = match found.kind {
            WeightType::Iq4Nl => return floats(decode_iq4_nl(&found.bytes)),
            WeightType::Iq4Xs => return floats(decode_iq4_xs(&found.bytes)),
            WeightType::Ggml(GgmlDType::F32) => DType::F32,
            WeightType::Ggml(GgmlDType::F16) => DType::F16,
            WeightType::Ggml(GgmlDType::BF16) => DType::BF16,
            WeightType::Ggml(kind) => return Ok(found.into_quantized(kind)?.dequantize(&Device::Cpu)?),
        };
        Ok(Tensor::from_raw_buffer(&found.bytes, dtype, shape, &Device::Cpu)?)
    }

    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        let found = self.find(name, shape)?;
        match found.kind {
            WeightType::Ggml(GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) => Ok(None),
            // No kernel computes with these; they are decoded when they are loaded.
            WeightType::Iq4Nl | WeightType::Iq4Xs => Ok(None),
            WeightType::Ggml(kind) => Ok(Some(found.into_quantized(kind)?)),
        }
    }
}

impl Gguf {
    fn find(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let missing =
            || self.error(format!("tensor {} is missing; the file does not hold a whole model", shown(name)));
        let place = self.places.get(name).ok_or_else(missing)?;
        let dims = self.shape_of(name).ok_or_else(missing)?;
        let label = match place {
            Place::Stored(place) => shown(&place.tensor),
            Place::Zeros(_) => "absent".to_string(),
        };
        if dims != shape {
            let message =
                format!("tensor {} ({label}) has shape {dims:?}, its metadata says {shape:?}", shown(name));
            return Err(self.error(message));
        }
        let place = match place {
            Place::Stored(place) => place,
            Place::Zeros(length) => {
                let bytes = Cow::Owned(vec![0; length * size_of::<f32>()]);
                return Ok(Found { bytes, kind: WeightType::Ggml(GgmlDType::F32), dims });
            }
        };
        let stored = self.tensors.get(&place.tensor).ok_or_else(missing)?;
        let mut bytes = self.bytes(stored);
        if let Some(expert) = place.expert {
            let size = bytes.len() / stored.dims[0];
            bytes = &bytes[expert * size..(expert + 1) * size];
        }
        if !stored.kind.is_finite(bytes) {
            let message = format!("{} ({label}) holds NaN or infinity; the file is broken", shown(name));
            return Err(self.error(message));
        }
        let bytes = halves_apart(bytes, &dims, place).ok_or_else(|| {
            self.error(format!("tensor {}: {} rows do not divide into heads", shown(name), dims[0]))
        })?;
        Ok(Found { bytes, kind: stored.kind, dims })
    }
}

impl Found<'_> {
    fn into_quantized(self, kind: GgmlDType) -> Result<QTensor> {
        // candle reads blocks in place and insists on their alignment; a copy on the heap has it.
        let misaligned = self.bytes.as_ptr().align_offset(8) != 0;
        let bytes = if misaligned { Cow::Owned(self.bytes.into_owned()) } else { self.bytes };
        let storage = QStorage::from_data(bytes, &Device::Cpu, kind)?;
        Ok(QTensor::new(storage, self.dims)?)
    }
}

/// Undoes the permutation of llama.cpp's converter (`LlamaModel.permute`): row 2i + j of a head goes back to row
/// j * head_dim/2 + i. Whole rows move, so blocks of quantised ones stay intact. `None` if rows are not whole heads.
fn halves_apart<'a>(bytes: &'a [u8], dims: &[usize], place: &Location) -> Option<Cow<'a, [u8]>> {
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
    fn rows_go_back_to_half_split_order() {
        // Two heads of six rows, one byte a row; the stored order is 0 3 1 4 2 5 within a head.
        let place = Location { tensor: String::new(), expert: None, interleaved_heads: Some(2) };
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let rows = halves_apart(&stored, &[12, 1], &place);
        assert_eq!(rows.as_deref(), Some(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11][..]));
        assert_eq!(halves_apart(&stored, &[12, 1], &Location { interleaved_heads: Some(5), ..place }), None);
    }
}
