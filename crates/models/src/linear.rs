//! Linear layers over weights in whatever form they are kept.
//!
//! A layer of the host works on slices ([`Linear`]). Several weights that read the same input (queries, keys and values;
//! gate and up) become one layer, and one matrix where their forms allow it.

mod float;
mod quantized;

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use minicache_config::WeightMode;
use minicache_core::kernels::loops::add;
use minicache_device::Arithmetic;
use minicache_device::driver::Act;
use rayon::prelude::*;

pub(crate) use float::{FloatMatrix, product};
use quantized::QuantizedMatrix;

use crate::{Error, Result, WeightSource};

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

    pub(crate) fn bias(&self, pieces: &[Piece]) -> Result<Vec<f32>> {
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

    /// The rows of tensors, one below the other, in the type of a device's linear layers, and what rounding to it leaves.
    pub(crate) fn rows(
        &self,
        names: &[(String, usize)],
        inputs: usize,
        arithmetic: Arithmetic,
    ) -> Result<[Vec<u8>; 2]> {
        let [mut high, mut low] = [Vec::new(), Vec::new()];
        for (name, outputs) in names {
            let numbers: Vec<f32> = self.source.dense(name, &[*outputs, inputs])?.flatten_all()?.to_vec1()?;
            if arithmetic.act == Act::F16 && numbers.par_iter().any(|x| !f16::from_f32(*x).is_finite()) {
                let message = format!("{name} has numbers beyond those of f16, which a device computes in");
                return Err(Error::Weights(message));
            }
            let half = |out: &mut Vec<u8>, which: fn(Halves) -> [u8; 2]| {
                let from = out.len();
                out.resize(from + 2 * numbers.len(), 0);
                let places = out[from..].as_chunks_mut().0.par_iter_mut();
                places.zip(&numbers).for_each(|(place, x)| *place = which(halves(*x, arithmetic.act)));
            };
            half(&mut high, |both| both.0);
            if arithmetic.precise {
                half(&mut low, |both| both.1);
            }
        }
        Ok([high, low])
    }

    /// The token embedding.
    pub(crate) fn embedding(&self, name: &str, rows: usize, columns: usize) -> Result<Embedding> {
        Ok(Embedding(match self.form(name, &[rows, columns])? {
            Form::Float(tensor) => Matrix::Float(FloatMatrix::new(&tensor)?),
            Form::Quantized(tensor) => Matrix::Quantized(QuantizedMatrix::new(tensor, self.mode)?),
        }))
    }
}

/// A number as a device's linear layers have it, and what rounding leaves of it.
type Halves = ([u8; 2], [u8; 2]);

/// As [`Halves`].
pub(crate) fn halves(x: f32, act: Act) -> Halves {
    match act {
        Act::F16 => {
            let high = f16::from_f32(x);
            (high.to_le_bytes(), f16::from_f32(x - high.to_f32()).to_le_bytes())
        }
        Act::Bf16 => {
            let high = bf16::from_f32(x);
            (high.to_le_bytes(), bf16::from_f32(x - high.to_f32()).to_le_bytes())
        }
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
