//! A layer on an accelerator: candle operations. Attention runs in the cache, which works on the CPU's memory.

use candle_core::{Device, Tensor};
use candle_nn::ops;

use super::Step;
use super::attention::{self, Buffers, Positions};
use super::host::{LayerNames, pieces};
use crate::linear::{DeviceLinear, Loader};
use crate::moe::Routing;
use crate::{ModelConfig, Result};

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    device: Device,
    input_norm: Tensor,
    qkv: DeviceLinear,
    output: DeviceLinear,
    mlp_norm: Tensor,
    mlp: Mlp,
}

/// The feed-forward block.
#[derive(Debug)]
enum Mlp {
    Dense(SwiGlu),
    Sparse { router: DeviceLinear, experts: Vec<SwiGlu> },
}

/// down(silu(gate(x)) * up(x)).
#[derive(Debug)]
struct SwiGlu {
    gate_up: DeviceLinear,
    down: DeviceLinear,
}

impl SwiGlu {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = self.gate_up.forward(x)?;
        let inner = wide.dim(1)? / 2;
        let (gate, up) = (wide.narrow(1, 0, inner)?.contiguous()?, wide.narrow(1, inner, inner)?);
        self.down.forward(&(gate.silu()? * up)?)
    }
}

impl Layer {
    pub(crate) fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        index: usize,
        device: &Device,
    ) -> Result<Self> {
        let names = LayerNames::new(config, index);
        let (hidden, inner) = (config.hidden, config.intermediate);
        let norm = |name: &str| -> Result<Tensor> {
            Ok(Tensor::from_vec(loader.vector(name, hidden)?, hidden, device)?)
        };
        let swiglu = |gate_up: &[(String, usize)], down: &str| -> Result<SwiGlu> {
            Ok(SwiGlu {
                gate_up: loader.device_linear(&pieces(gate_up), hidden, config.mlp_bias, device)?,
                down: loader.device_linear(&[(down, hidden)], inner, config.mlp_bias, device)?,
            })
        };
        let mlp = match config.experts {
            None => Mlp::Dense(swiglu(&names.gate_up, &names.down)?),
            Some(experts) => Mlp::Sparse {
                router: loader.device_linear(&[(&names.router, experts.count)], hidden, false, device)?,
                experts: (0..experts.count)
                    .map(|e| {
                        let (gate_up, down) = names.expert(config, e);
                        swiglu(&gate_up, &down)
                    })
                    .collect::<Result<_>>()?,
            },
        };
        Ok(Self {
            device: device.clone(),
            input_norm: norm(&names.input_norm)?,
            qkv: loader.device_linear(&pieces(&names.qkv), hidden, config.qkv_bias, device)?,
            output: loader.device_linear(
                &[(&names.output, hidden)],
                config.q_dim(),
                config.out_bias,
                device,
            )?,
            mlp_norm: norm(&names.mlp_norm)?,
            mlp,
        })
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        let swiglu = |m: &SwiGlu| m.gate_up.bytes() + m.down.bytes();
        let mlp = match &self.mlp {
            Mlp::Dense(m) => swiglu(m),
            Mlp::Sparse { router, experts } => router.bytes() + experts.iter().map(swiglu).sum::<usize>(),
        };
        let norms = (self.input_norm.elem_count() + self.mlp_norm.elem_count()) * 4;
        norms + self.qkv.bytes() + self.output.bytes() + mlp
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Takes the residual stream `x` (tokens, hidden) through the layer.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        index: usize,
        x: &Tensor,
        steps: &mut [Step<'_>],
        positions: &Positions,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let normed = ops::rms_norm(x, &self.input_norm, config.rms_eps)?;
        let qkv = self.qkv.forward(&normed)?;
        let mut qkv: Vec<f32> = qkv.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let mut attended = vec![0.0; rows * config.q_dim()];
        let mut buffers = Buffers::default();
        attention::attend(config, index, &mut qkv, steps, positions, &mut buffers, &mut attended)?;
        let attended = Tensor::from_vec(attended, (rows, config.q_dim()), &self.device)?;
        let x = (x + self.output.forward(&attended)?)?;

        let normed = ops::rms_norm(&x, &self.mlp_norm, config.rms_eps)?;
        let mlp = match &self.mlp {
            Mlp::Dense(swiglu) => swiglu.forward(&normed)?,
            Mlp::Sparse { router, experts } => {
                let scores: Vec<f32> =
                    router.forward(&normed)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                let mut sum = normed.zeros_like()?;
                let numbers = config.experts.map(|e| Routing::new(&scores, e));
                for (expert, tokens) in numbers.iter().flat_map(|routing| &routing.chosen) {
                    let (rows, weights): (Vec<u32>, Vec<f32>) =
                        tokens.iter().map(|(token, weight)| (*token as u32, *weight)).unzip();
                    let n = rows.len();
                    let rows = Tensor::from_vec(rows, n, &self.device)?;
                    let weights = Tensor::from_vec(weights, (n, 1), &self.device)?;
                    let out = experts[*expert].forward(&normed.index_select(&rows, 0)?)?;
                    sum = sum.index_add(&rows, &out.broadcast_mul(&weights)?, 0)?;
                }
                sum
            }
        };
        Ok((x + mlp)?)
    }
}
