//! Matrices of block-quantised weights on the CPU, in either of two ways of computing with them.

use std::fmt;
use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{Device, Module, Storage, Tensor};
use minicache_config::WeightMode;

use crate::Result;
use crate::packed::PackedMatrix;

/// A matrix `(outputs, inputs)` of block-quantised weights; shared, not copied, when cloned.
#[derive(Clone)]
pub(crate) enum QuantizedMatrix {
    /// Repacked for this machine's integer dot products ([`WeightMode::Auto`]).
    Packed(Arc<PackedMatrix>),
    /// The file's blocks, multiplied by candle.
    AsStored { tensor: Arc<QTensor>, outputs: usize, inputs: usize },
}

impl fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packed(matrix) => matrix.fmt(f),
            Self::AsStored { tensor, .. } => tensor.fmt(f),
        }
    }
}

impl QuantizedMatrix {
    pub(crate) fn new(tensor: QTensor, mode: WeightMode) -> Result<Self> {
        if mode == WeightMode::Auto
            && let Some(packed) = PackedMatrix::from_qtensor(&tensor)?
        {
            return Ok(Self::Packed(Arc::new(packed)));
        }
        let (outputs, inputs) = tensor.shape().dims2()?;
        Ok(Self::AsStored { tensor: Arc::new(tensor), outputs, inputs })
    }

    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Packed(matrix) => matrix.out_features(),
            Self::AsStored { outputs, .. } => *outputs,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(matrix) => matrix.bytes(),
            Self::AsStored { tensor, .. } => tensor.storage_size_in_bytes(),
        }
    }

    /// `out` (n, outputs) = `x` (n, inputs) times this matrix, transposed.
    pub(crate) fn matmul(&self, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Packed(matrix) => {
                matrix.matmul(x, n, out);
                Ok(())
            }
            Self::AsStored { tensor, inputs, .. } => {
                let x = Tensor::from_slice(x, (n, *inputs), &Device::Cpu)?;
                copy_f32(&QMatMul::QTensor(tensor.clone()).forward(&x)?, out)
            }
        }
    }

    /// Writes the rows `ids`, dequantised, to `out` (ids, inputs).
    pub(crate) fn rows_into(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        match self {
            Self::Packed(matrix) => {
                for (id, out) in ids.iter().zip(out.chunks_exact_mut(matrix.in_features())) {
                    matrix.row(*id as usize, out);
                }
                Ok(())
            }
            Self::AsStored { tensor, .. } => {
                copy_f32(&tensor.embedding(&Tensor::new(ids, &Device::Cpu)?)?, out)
            }
        }
    }
}

/// Copies a contiguous f32 tensor on the CPU to a slice.
fn copy_f32(tensor: &Tensor, out: &mut [f32]) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        return Err(candle_core::Error::Msg("expected a tensor on the CPU".into()).into());
    };
    let start = layout.start_offset();
    out.copy_from_slice(&cpu.as_slice::<f32>()?[start..start + out.len()]);
    Ok(())
}
