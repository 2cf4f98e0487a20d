//! A layer on an accelerator: candle operations. Attention runs in the cache, which works on the CPU's memory.

use candle_core::{Device, Tensor};
use candle_nn::ops;
use minicache_core::Batch;

use super::attention::{Attention, Buffers, Positions};
use crate::families::{LayerNames, Role};
use crate::linear::{DeviceLinear, Loader, Piece};
use crate::moe::Routing;
use crate::{ModelConfig, Result};

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    device: Device,
    input_norm: Tensor,
    qkv: DeviceLinear,
    attention: Attention,
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
        let norm = |role| -> Result<Tensor> {
            Ok(Tensor::from_vec(loader.vector(&names.weight(role)?, hidden)?, hidden, device)?)
        };
        let linear =
            |pieces: &[Piece], inputs: usize, bias: bool| loader.device_linear(pieces, inputs, bias, device);
        let swiglu = |gate_up: &[Piece], down: &[Piece]| -> Result<SwiGlu> {
            Ok(SwiGlu {
                gate_up: linear(gate_up, hidden, config.mlp_bias)?,
                down: linear(down, inner, config.mlp_bias)?,
            })
        };
        let mlp = match config.experts {
            None => Mlp::Dense(swiglu(&names.modules(&Role::MLP_INPUTS), &names.modules(&[Role::Down]))?),
            Some(experts) => Mlp::Sparse {
                router: linear(&names.modules(&[Role::Router]), hidden, false)?,
                experts: (0..experts.count)
                    .map(|e| {
                        let down = names.expert(e, &[Role::ExpertDown]);
                        swiglu(&names.expert(e, &Role::EXPERT_INPUTS), &down)
                    })
                    .collect::<Result<_>>()?,
            },
        };
        Ok(Self {
            device: device.clone(),
            input_norm: norm(Role::InputNorm)?,
            qkv: linear(&names.modules(&Role::ATTENTION_INPUTS), hidden, config.qkv_bias)?,
            attention: Attention::load(loader, config, index)?,
            output: linear(&names.modules(&[Role::Output]), config.q_dim(), config.out_bias)?,
            mlp_norm: norm(Role::MlpNorm)?,
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
        norms + self.attention.bytes() + self.qkv.bytes() + self.output.bytes() + mlp
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Takes the residual stream `x` (tokens, hidden) through the layer.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        batch: &mut Batch<'_>,
        positions: &Positions,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let normed = ops::rms_norm(x, &self.input_norm, config.rms_eps)?;
        let qkv = self.qkv.forward(&normed)?;
        let mut qkv: Vec<f32> = qkv.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let mut attended = vec![0.0; rows * config.q_dim()];
        let mut buffers = Buffers::default();
        self.attention.attend(config, &mut qkv, batch, positions, &mut buffers, &mut attended)?;
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
