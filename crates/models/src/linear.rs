//! Linear layers over weights in whatever form they are kept.
//!
//! On the CPU a layer works on slices ([`Linear`]); on an accelerator it is candle's matrix product
//! ([`DeviceLinear`]). Several weights that read the same input (queries, keys and values; gate and up) become one
//! layer, and one matrix where their forms allow it.

mod float;
mod quantized;

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use minicache_config::WeightMode;
use minicache_core::kernels::loops::add;

pub(crate) use float::{FloatMatrix, product};
use quantized::QuantizedMatrix;

use crate::{Result, WeightSource};

/// One matrix on the CPU; shared, not copied, when cloned.
#[derive(Debug, Clone)]
enum Matrix {
    Float(FloatMatrix),
    Quantized(QuantizedMatrix),
}

impl Matrix {
    fn outputs(&self) -> usize {
        match self {
            Matrix::Float(m) => m.rows(),
            Matrix::Quantized(m) => m.outputs(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Matrix::Float(m) => m.bytes(),
            Matrix::Quantized(m) => m.bytes(),
        }
    }

    fn matmul(&self, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Matrix::Float(m) => {
                m.matmul(x, n, out);
                Ok(())
            }
            Matrix::Quantized(m) => m.matmul(x, n, out),
        }
    }
}

/// A linear layer on the CPU.
#[derive(Debug)]
pub(crate) struct Linear {
    /// Matrices whose outputs lie side by side.
    parts: Vec<Matrix>,
    bias: Option<Vec<f32>>,
    outputs: usize,
}

impl Linear {
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(Matrix::bytes).sum()
    }

    /// `out` (n, outputs) = `x` (n, inputs) through the layer.
    pub(crate) fn apply(&self, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        if let [one] = &self.parts[..] {
            one.matmul(x, n, out)?;
        } else {
            let mut first = 0;
            let mut scratch = Vec::new();
            for part in &self.parts {
                let width = part.outputs();
                if n == 1 {
                    part.matmul(x, n, &mut out[first..first + width])?;
                } else {
                    scratch.resize(n * width, 0.0);
                    part.matmul(x, n, &mut scratch)?;
                    for (row, out) in scratch.chunks_exact(width).zip(out.chunks_exact_mut(self.outputs)) {
                        out[first..first + width].copy_from_slice(row);
                    }
                }
                first += width;
            }
        }
        if let Some(bias) = &self.bias {
            out.chunks_exact_mut(self.outputs).for_each(|row| add(bias, row));
        }
        Ok(())
    }
}

/// One matrix on an accelerator.
#[derive(Debug)]
enum DeviceMatrix {
    /// (outputs, inputs)
    Float(Tensor),
    Quantized(QMatMul),
}

/// A linear layer of candle operations. Activations are f32 outside, the weights' type within.
#[derive(Debug)]
pub(crate) struct DeviceLinear {
    parts: Vec<DeviceMatrix>,
    bias: Option<Tensor>,
}

impl DeviceLinear {
    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        let part = |part: &DeviceMatrix| match part {
            DeviceMatrix::Float(w) => w.elem_count() * w.dtype().size_in_bytes(),
            DeviceMatrix::Quantized(QMatMul::QTensor(w)) => w.storage_size_in_bytes(),
            DeviceMatrix::Quantized(QMatMul::Tensor(w) | QMatMul::TensorF16(w)) => {
                w.elem_count() * w.dtype().size_in_bytes()
            }
        };
        self.parts.iter().map(part).sum()
    }

    /// (n, inputs) to (n, outputs), both f32.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut outs = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            outs.push(match part {
                DeviceMatrix::Float(w) => x.to_dtype(w.dtype())?.matmul(&w.t()?)?.to_dtype(DType::F32)?,
                DeviceMatrix::Quantized(w) => w.forward(x)?,
            });
        }
        let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::cat(&outs, 1)? };
        match &self.bias {
            Some(bias) => Ok(out.broadcast_add(bias)?),
            None => Ok(out),
        }
    }
}

/// One weight of a layer: the tensor's name without `.weight`, and its outputs.
pub(crate) type Piece = (String, usize);

/// Weights in the form in which a source gives them.
enum Form {
    Float(Tensor),
    Quantized(QTensor),
}

/// Reads layers from a source.
pub(crate) struct Loader<'a> {
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) mode: WeightMode,
    /// Type that float weights are turned into; `None`: as stored.
    pub(crate) dtype: Option<DType>,
}

impl Loader<'_> {
    /// A vector of f32.
    pub(crate) fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        Ok(self.source.dense(name, &[length])?.to_vec1()?)
    }

    /// A matrix of floats in the type that the mode asks for.
    fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = match self.mode {
            WeightMode::F32 => self.source.dense(name, shape)?,
            WeightMode::Auto | WeightMode::Quantized => self.source.stored(name, shape)?,
        };
        match self.dtype {
            Some(dtype) if self.mode != WeightMode::F32 => Ok(tensor.to_dtype(dtype)?),
            _ => Ok(tensor),
        }
    }

    fn form(&self, name: &str, shape: &[usize]) -> Result<Form> {
        if self.mode != WeightMode::F32
            && let Some(tensor) = self.source.quantized(name, shape)?
        {
            let float = matches!(tensor.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
            if !float {
                return Ok(Form::Quantized(tensor));
            }
        }
        Ok(Form::Float(self.float(name, shape)?))
    }

    /// The weights of `pieces`, neighbours of the same form joined, in order.
    fn forms(&self, pieces: &[Piece], inputs: usize) -> Result<Vec<Form>> {
        let mut forms: Vec<Form> = Vec::new();
        for (name, outputs) in pieces {
            let next = self.form(&format!("{name}.weight"), &[*outputs, inputs])?;
            match (forms.pop(), next) {
                (Some(Form::Float(a)), Form::Float(b)) if a.dtype() == b.dtype() => {
                    forms.push(Form::Float(Tensor::cat(&[a, b], 0)?));
                }
                (Some(Form::Quantized(a)), Form::Quantized(b)) if a.dtype() == b.dtype() => {
                    forms.push(Form::Quantized(stack(&a, &b)?));
                }
                (last, next) => {
                    forms.extend(last);
                    forms.push(next);
                }
            }
        }
        Ok(forms)
    }

    fn bias(&self, pieces: &[Piece]) -> Result<Vec<f32>> {
        let mut bias = Vec::new();
        for (name, outputs) in pieces {
            bias.extend(self.vector(&format!("{name}.bias"), *outputs)?);
        }
        Ok(bias)
    }

    /// A layer on the CPU.
    pub(crate) fn linear(&self, pieces: &[Piece], inputs: usize, bias: bool) -> Result<Linear> {
        let parts = self.forms(pieces, inputs)?.into_iter().map(|form| match form {
            Form::Float(tensor) => Ok(Matrix::Float(FloatMatrix::new(&tensor)?)),
            Form::Quantized(tensor) => Ok(Matrix::Quantized(QuantizedMatrix::new(tensor, self.mode)?)),
        });
        Ok(Linear {
            parts: parts.collect::<Result<_>>()?,
            bias: if bias { Some(self.bias(pieces)?) } else { None },
            outputs: pieces.iter().map(|(_, outputs)| outputs).sum(),
        })
    }

    /// A layer on `device`.
    pub(crate) fn device_linear(
        &self,
        pieces: &[Piece],
        inputs: usize,
        bias: bool,
        device: &Device,
    ) -> Result<DeviceLinear> {
        let parts = self.forms(pieces, inputs)?.into_iter().map(|form| match form {
            Form::Float(tensor) => Ok(DeviceMatrix::Float(tensor.to_device(device)?)),
            Form::Quantized(tensor) => {
                let storage = QStorage::from_data(tensor.data()?, device, tensor.dtype())?;
                let moved = QTensor::new(storage, tensor.shape().clone())?;
                Ok(DeviceMatrix::Quantized(QMatMul::from_qtensor(moved)?))
            }
        });
        let parts = parts.collect::<Result<_>>()?;
        let bias = match bias {
            true => {
                let bias = self.bias(pieces)?;
                Some(Tensor::from_slice(&bias, bias.len(), device)?)
            }
            false => None,
        };
        Ok(DeviceLinear { parts, bias })
    }

    /// The token embedding.
    pub(crate) fn embedding(&self, name: &str, rows: usize, columns: usize) -> Result<Embedding> {
        Ok(Embedding(match self.form(name, &[rows, columns])? {
            Form::Float(tensor) => Matrix::Float(FloatMatrix::new(&tensor)?),
            Form::Quantized(tensor) => Matrix::Quantized(QuantizedMatrix::new(tensor, self.mode)?),
        }))
    }
}

/// Two quantised matrices of one type, the rows of `b` below those of `a`.
fn stack(a: &QTensor, b: &QTensor) -> Result<QTensor> {
    let ((rows_a, columns), (rows_b, _)) = (a.shape().dims2()?, b.shape().dims2()?);
    let mut data = a.data()?.into_owned();
    data.extend_from_slice(&b.data()?);
    let storage = QStorage::from_data(Cow::Owned(data), &Device::Cpu, a.dtype())?;
    Ok(QTensor::new(storage, (rows_a + rows_b, columns))?)
}

/// The token embedding, on the CPU.
#[derive(Debug)]
pub(crate) struct Embedding(Matrix);

impl Embedding {
    /// Writes the rows of `ids`, which the caller has checked, to `out` (ids, hidden).
    pub(crate) fn rows_into(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        match &self.0 {
            Matrix::Float(matrix) => {
                for (id, out) in ids.iter().zip(out.chunks_exact_mut(matrix.columns())) {
                    matrix.row_into(*id as usize, out);
                }
                Ok(())
            }
            Matrix::Quantized(matrix) => matrix.rows_into(ids, out),
        }
    }

    /// The output projection that shares these weights.
    pub(crate) fn tied(&self) -> Linear {
        Linear { parts: vec![self.0.clone()], bias: None, outputs: self.0.outputs() }
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}
