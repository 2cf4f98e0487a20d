//! Tensors of a GGUF file by their Hugging Face names.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use super::{Gguf, Place};
use crate::Result;

/// The bytes of one Hugging Face tensor, in its row order.
struct Found<'a> {
    bytes: Cow<'a, [u8]>,
    dtype: GgmlDType,
    dims: Vec<usize>,
}

impl Gguf {
    /// Hugging Face names of the tensors that the file holds, sorted; tensors that have none keep their GGUF names.
    pub fn tensor_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.places.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor by its Hugging Face name, outermost dimension first.
    pub fn tensor_shape(&self, name: &str) -> Option<Vec<usize>> {
        let place = self.places.get(name)?;
        let dims = &self.tensors.get(&place.tensor)?.dims;
        Some(if place.expert.is_some() { dims[1..].to_vec() } else { dims.clone() })
    }

    /// A tensor by its Hugging Face name: in its own type if that is F32, F16 or BF16, dequantised to f32 otherwise.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn dense_tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.find(name, shape)?;
        let dtype = match found.dtype {
            GgmlDType::F32 => DType::F32,
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            _ => return Ok(found.into_quantized()?.dequantize(&Device::Cpu)?),
        };
        Ok(Tensor::from_raw_buffer(&found.bytes, dtype, shape, &Device::Cpu)?)
    }

    /// A tensor by its Hugging Face name as stored; `None` where the file holds it in F32, F16 or BF16.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn quantized_tensor(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        let found = self.find(name, shape)?;
        if matches!(found.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
            return Ok(None);
        }
        Ok(Some(found.into_quantized()?))
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let missing =
            || self.error(format!("tensor {name} is missing; the file does not hold a whole model"));
        let place = self.places.get(name).ok_or_else(missing)?;
        let stored = self.tensors.get(&place.tensor).ok_or_else(missing)?;
        let dims = self.tensor_shape(name).ok_or_else(missing)?;
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
    fn rows_go_back_to_half_split_order() {
        // Two heads of six rows, one byte a row; the stored order is 0 3 1 4 2 5 within a head.
        let place = Place { tensor: String::new(), expert: None, interleaved_heads: Some(2) };
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let rows = halves_apart(&stored, &[12, 1], &place);
        assert_eq!(rows.as_deref(), Some(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11][..]));
        assert_eq!(halves_apart(&stored, &[12, 1], &Place { interleaved_heads: Some(5), ..place }), None);
    }
}
