//! The weights of a model on a GPU: read from where they are stored, or random.

use candle_core::DType;
use minicache_config::WeightMode;
use minicache_device::driver::{Act, Acts, Address, Memory};
use minicache_device::{Arithmetic, Device, Ops};

use crate::families::{LayerNames, Role};
use crate::linear::{Loader, Piece};
use crate::{ModelConfig, Result};

/// Weights as they are rounded, and what rounding left where that counts.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) high: Memory,
    pub(super) low: Option<Memory>,
}

impl Matrix {
    pub(super) fn acts(&self) -> Acts {
        Acts { high: self.high.address(), low: self.low.as_ref().map_or(0, Memory::address) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.high.bytes() + self.low.as_ref().map_or(0, Memory::bytes)
    }
}

#[derive(Debug)]
pub(super) struct Linear {
    pub(super) w: Matrix,
    pub(super) bias: Option<Memory>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Memory,
    pub(super) qkv: Linear,
    /// Weights of the norms of query and key heads.
    pub(super) head_norms: Option<[Memory; 2]>,
    pub(super) output: Linear,
    pub(super) mlp_norm: Memory,
    pub(super) mlp: Mlp,
}

#[derive(Debug)]
pub(super) enum Mlp {
    Dense(SwiGlu),
    Sparse { router: Linear, experts: Vec<SwiGlu> },
}

#[derive(Debug)]
pub(super) struct SwiGlu {
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl Linear {
    pub(super) fn bytes(&self) -> usize {
        self.w.bytes() + self.bias.as_ref().map_or(0, Memory::bytes)
    }

    pub(super) fn bias(&self) -> Address {
        self.bias.as_ref().map_or(0, Memory::address)
    }

    /// y = x w^T, or y += x w^T; the bias is left to whoever reads y.
    pub(super) fn apply(&self, ops: &Ops, x: Acts, y: Address, rows: usize, add: bool) -> Result<()> {
        Ok(ops.product(self.w.acts(), x, y, (rows, self.inputs, self.outputs), add)?)
    }
}

/// Where weights come from.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a> {
    Stored(&'a Loader<'a>),
    /// Numbers of a likely size, made on the device: for measurements of models that are not at hand.
    Random,
}

impl Weights<'_> {
    /// How a model of these weights is computed.
    pub(super) fn arithmetic(self, config: &ModelConfig) -> Result<Arithmetic> {
        Ok(match self {
            Weights::Random => Arithmetic { act: Act::F16, precise: false },
            Weights::Stored(loader) => {
                let first = LayerNames::new(config, 0).modules(&[Role::Output]);
                let name = format!("{}.weight", first[0].0);
                let stored = loader.source.stored(&name, &[config.hidden, config.q_dim()])?;
                let act = if stored.dtype() == DType::BF16 { Act::Bf16 } else { Act::F16 };
                Arithmetic { act, precise: loader.mode == WeightMode::F32 }
            }
        })
    }

    pub(super) fn matrix(
        self,
        pieces: &[(String, usize)],
        inputs: usize,
        device: &Device,
        arithmetic: Arithmetic,
    ) -> Result<Matrix> {
        match self {
            Weights::Stored(loader) => {
                let [high, low] = loader.rows(pieces, inputs, arithmetic)?;
                let low = if arithmetic.precise { Some(Memory::of(&device.driver, &low)?) } else { None };
                Ok(Matrix { high: Memory::of(&device.driver, &high)?, low })
            }
            Weights::Random => {
                let outputs: usize = pieces.iter().map(|(_, outputs)| outputs).sum();
                let high = Memory::new(&device.driver, outputs * inputs * 2)?;
                let seed = pieces
                    .iter()
                    .flat_map(|(name, _)| name.bytes())
                    .fold(7, |h: u32, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
                // Of unit variance in, as much out.
                Ops::new(device, arithmetic.act)?.noise(&high, seed, (3.0 / inputs as f32).sqrt(), false)?;
                Ok(Matrix { high, low: None })
            }
        }
    }

    pub(super) fn vector(self, name: &str, length: usize) -> Result<Vec<f32>> {
        match self {
            Weights::Stored(loader) => loader.vector(name, length),
            Weights::Random => Ok(vec![1.0; length]),
        }
    }

    pub(super) fn bias(self, pieces: &[Piece]) -> Result<Vec<f32>> {
        match self {
            Weights::Stored(loader) => loader.bias(pieces),
            Weights::Random => Ok(vec![0.0; pieces.iter().map(|(_, outputs)| outputs).sum()]),
        }
    }
}

impl Layer {
    pub(super) fn load(
        source: Weights<'_>,
        config: &ModelConfig,
        index: usize,
        device: &Device,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let names = LayerNames::new(config, index);
        let (hidden, inner) = (config.hidden, config.intermediate);
        let vector = |role, length| -> Result<Memory> {
            let numbers = source.vector(&names.weight(role)?, length)?;
            Ok(Memory::of(&device.driver, &as_bytes(&numbers))?)
        };
        let linear = |pieces: &[Piece], inputs: usize, bias: bool| -> Result<Linear> {
            let weights: Vec<_> = pieces.iter().map(|(name, n)| (format!("{name}.weight"), *n)).collect();
            let w = source.matrix(&weights, inputs, device, arithmetic)?;
            let bias = match bias {
                true => Some(Memory::of(&device.driver, &as_bytes(&source.bias(pieces)?))?),
                false => None,
            };
            Ok(Linear { w, bias, inputs, outputs: pieces.iter().map(|(_, outputs)| outputs).sum() })
        };
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
        let head_norms = match config.qk_norm {
            true => {
                Some([vector(Role::QueryNorm, config.head_dim)?, vector(Role::KeyNorm, config.head_dim)?])
            }
            false => None,
        };
        Ok(Self {
            input_norm: vector(Role::InputNorm, hidden)?,
            qkv: linear(&names.modules(&Role::ATTENTION_INPUTS), hidden, config.qkv_bias)?,
            head_norms,
            output: linear(&names.modules(&[Role::Output]), config.q_dim(), config.out_bias)?,
            mlp_norm: vector(Role::MlpNorm, hidden)?,
            mlp,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let swiglu = |m: &SwiGlu| m.gate_up.bytes() + m.down.bytes();
        let mlp = match &self.mlp {
            Mlp::Dense(m) => swiglu(m),
            Mlp::Sparse { router, experts } => router.bytes() + experts.iter().map(swiglu).sum::<usize>(),
        };
        let norms = self.input_norm.bytes() + self.mlp_norm.bytes();
        norms
            + self.head_norms.iter().flatten().map(Memory::bytes).sum::<usize>()
            + self.qkv.bytes()
            + self.output.bytes()
            + mlp
    }
}

impl Layer {
    /// The bias of the feed-forward block, which whoever reads the stream next adds; 0: none.
    pub(super) fn last_bias(&self) -> Address {
        match &self.mlp {
            Mlp::Dense(swiglu) => swiglu.down.bias(),
            Mlp::Sparse { .. } => 0,
        }
    }
}

pub(super) fn as_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}
