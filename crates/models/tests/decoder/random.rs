//! Models of any shape with weights drawn from their names.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use minicache_models::{ModelConfig, Result, WeightSource};

/// Gives every tensor that a configuration asks for.
pub(crate) struct Random {
    pub(crate) config: ModelConfig,
    /// Block type of a matrix, by its name.
    pub(crate) quantized: fn(&str) -> Option<GgmlDType>,
}

impl Random {
    pub(crate) fn new(config: ModelConfig) -> Self {
        Self { config, quantized: |_| None }
    }

    /// Uniform numbers of variance 1/inputs for matrices, around one for norms.
    fn draw(&self, name: &str, shape: &[usize]) -> Tensor {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let mut state = hasher.finish() | 1;
        let mut uniform = || {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let (centre, width) = match shape {
            [_, inputs] => (0.0, (3.0 / *inputs as f32).sqrt()),
            _ if name.ends_with("bias") => (0.0, 0.1),
            _ => (1.0, 0.2),
        };
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| centre + width * uniform()).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }
}

impl WeightSource for Random {
    fn origin(&self) -> String {
        "random weights".into()
    }

    fn names(&self) -> Vec<String> {
        self.config.tensors().into_iter().map(|(name, _)| name).collect()
    }

    fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        self.config.tensors().into_iter().find(|(n, _)| n == name).map(|(_, shape)| shape)
    }

    fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.quantized(name, shape)? {
            Some(tensor) => Ok(tensor.dequantize(&Device::Cpu)?),
            None => Ok(self.draw(name, shape)),
        }
    }

    fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<QTensor>> {
        match (self.quantized)(name).filter(|_| shape.len() == 2) {
            Some(dtype) => Ok(Some(QTensor::quantize(&self.draw(name, shape), dtype)?)),
            None => Ok(None),
        }
    }
}
