//! A model on the CPU: slices, fused elementwise loops, no tensor operations.

use std::ops::Range;

use minicache_core::Batch;
use minicache_core::kernels::loops;
use rayon::prelude::*;

use super::attention::{Attention, Buffers, Positions};
use super::{Observer, Step};
use crate::families::{LayerNames, Role};
use crate::linear::{Embedding, Linear, Loader, Piece};
use crate::moe::Routing;
use crate::{ModelConfig, Result};

/// Rows below which spreading elementwise loops over threads does not pay.
const SERIAL_ROWS: usize = 16;

/// Rows that go through the feed-forward block at a time: bounds the memory of long prefills, whose inner activations
/// are several times as wide as the residual stream.
const MLP_ROWS: usize = 1024;

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Linear,
}

impl Body {
    /// Runs the new tokens of all steps, and gives the logits `(rows, vocab)` of the rows `wanted`.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        steps: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
        mut observer: Option<Observer<'_>>,
    ) -> Result<Vec<f32>> {
        let ids: Vec<u32> = steps.iter().flat_map(|s| s.tokens).copied().collect();
        let mut stream = vec![0.0; ids.len() * config.hidden];
        self.embedding.rows_into(&ids, &mut stream)?;
        let mut batch = Batch::begin(steps.iter_mut().map(|s| (&mut *s.sequence, s.tokens.len())))?;
        let mut scratch = Scratch::default();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(observer) = &mut observer {
                observer(index, &stream);
            }
            layer.forward(config, &mut stream, &mut batch, positions, &mut scratch)?;
        }
        batch.finish()?;
        self.logits(config, &stream, wanted)
    }

    /// Final norm and output projection of the rows that are asked for.
    fn logits(&self, config: &ModelConfig, stream: &[f32], wanted: &[Range<usize>]) -> Result<Vec<f32>> {
        let (hidden, vocab) = (config.hidden, config.vocab);
        let rows: usize = wanted.iter().map(Range::len).sum();
        if rows == 0 {
            return Ok(Vec::new());
        }
        let mut normed = vec![0.0; rows * hidden];
        let sources = wanted.iter().cloned().flatten();
        for (row, out) in sources.zip(normed.chunks_exact_mut(hidden)) {
            rms_norm_row(&stream[row * hidden..(row + 1) * hidden], &self.norm, config.rms_eps, out);
        }
        let mut logits = vec![0.0; rows * vocab];
        self.head.apply(&normed, rows, &mut logits)?;
        Ok(logits)
    }
}

/// Buffers of one forward pass, shared by all layers.
#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    projected: Vec<f32>,
    mlp: MlpScratch,
    buffers: Buffers,
}

/// Buffers of the feed-forward block.
#[derive(Default)]
struct MlpScratch {
    /// Gate and up side by side.
    wide: Vec<f32>,
    inner: Vec<f32>,
    scores: Vec<f32>,
}

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    input_norm: Vec<f32>,
    qkv: Linear,
    attention: Attention,
    output: Linear,
    mlp_norm: Vec<f32>,
    mlp: Mlp,
}

/// The feed-forward block.
#[derive(Debug)]
enum Mlp {
    Dense(SwiGlu),
    Sparse { router: Linear, experts: Vec<SwiGlu> },
}

/// down(silu(gate(x)) * up(x)).
#[derive(Debug)]
struct SwiGlu {
    gate_up: Linear,
    down: Linear,
}

impl Layer {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig, index: usize) -> Result<Self> {
        let names = LayerNames::new(config, index);
        let (hidden, inner) = (config.hidden, config.intermediate);
        let swiglu = |gate_up: &[Piece], down: &[Piece]| -> Result<SwiGlu> {
            Ok(SwiGlu {
                gate_up: loader.linear(gate_up, hidden, config.mlp_bias)?,
                down: loader.linear(down, inner, config.mlp_bias)?,
            })
        };
        let mlp = match config.experts {
            None => Mlp::Dense(swiglu(&names.modules(&Role::MLP_INPUTS), &names.modules(&[Role::Down]))?),
            Some(experts) => Mlp::Sparse {
                router: loader.linear(&names.modules(&[Role::Router]), hidden, false)?,
                experts: (0..experts.count)
                    .map(|e| {
                        let down = names.expert(e, &[Role::ExpertDown]);
                        swiglu(&names.expert(e, &Role::EXPERT_INPUTS), &down)
                    })
                    .collect::<Result<_>>()?,
            },
        };
        let qkv = names.modules(&Role::ATTENTION_INPUTS);
        Ok(Self {
            input_norm: loader.vector(&names.weight(Role::InputNorm)?, hidden)?,
            qkv: loader.linear(&qkv, hidden, config.qkv_bias)?,
            attention: Attention::load(loader, config, index)?,
            output: loader.linear(&names.modules(&[Role::Output]), config.q_dim(), config.out_bias)?,
            mlp_norm: loader.vector(&names.weight(Role::MlpNorm)?, hidden)?,
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
        let norms = (self.input_norm.len() + self.mlp_norm.len()) * 4 + self.attention.bytes();
        norms + self.qkv.bytes() + self.output.bytes() + mlp
    }

    /// Takes the residual stream `x` (tokens, hidden) through the layer, in place.
    fn forward(
        &self,
        config: &ModelConfig,
        x: &mut [f32],
        batch: &mut Batch<'_>,
        positions: &Positions,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let hidden = config.hidden;
        let rows = x.len() / hidden;
        let Scratch { normed, qkv, attended, projected, mlp, buffers } = scratch;
        normed.resize(rows * hidden, 0.0);
        qkv.resize(rows * self.qkv.outputs(), 0.0);
        attended.resize(rows * config.q_dim(), 0.0);
        projected.resize(rows * hidden, 0.0);

        rms_norm(x, &self.input_norm, config.rms_eps, normed);
        self.qkv.apply(normed, rows, qkv)?;
        self.attention.attend(config, qkv, batch, positions, buffers, attended)?;
        self.output.apply(attended, rows, projected)?;
        add_rows(projected, x, hidden);

        rms_norm(x, &self.mlp_norm, config.rms_eps, normed);
        match &self.mlp {
            Mlp::Dense(swiglu) => swiglu.apply(normed, rows, hidden, projected, mlp)?,
            Mlp::Sparse { router, experts } => {
                let mut scores = std::mem::take(&mut mlp.scores);
                scores.resize(rows * experts.len(), 0.0);
                router.apply(normed, rows, &mut scores)?;
                projected.fill(0.0);
                if let Some(numbers) = config.experts {
                    Routing::new(&scores, numbers).apply(normed, hidden, projected, |e, x, n, out| {
                        experts[e].apply(x, n, hidden, out, mlp)
                    })?;
                }
                mlp.scores = scores;
            }
        }
        add_rows(projected, x, hidden);
        Ok(())
    }
}

impl SwiGlu {
    /// `out` (n, hidden) = the block applied to `x` (n, hidden).
    fn apply(
        &self,
        x: &[f32],
        n: usize,
        hidden: usize,
        out: &mut [f32],
        scratch: &mut MlpScratch,
    ) -> Result<()> {
        let width = self.gate_up.outputs();
        let inner = width / 2;
        let most = n.min(MLP_ROWS);
        scratch.wide.resize(most * width, 0.0);
        scratch.inner.resize(most * inner, 0.0);
        for (x, out) in x.chunks(MLP_ROWS * hidden).zip(out.chunks_mut(MLP_ROWS * hidden)) {
            let n = x.len() / hidden;
            let (wide, act) = (&mut scratch.wide[..n * width], &mut scratch.inner[..n * inner]);
            self.gate_up.apply(x, n, wide)?;
            let row =
                |(wide, act): (&[f32], &mut [f32])| loops::silu_mul(&wide[..inner], &wide[inner..], act);
            if n < SERIAL_ROWS {
                wide.chunks_exact(width).zip(act.chunks_exact_mut(inner)).for_each(row);
            } else {
                wide.par_chunks_exact(width).zip(act.par_chunks_exact_mut(inner)).for_each(row);
            }
            self.down.apply(act, n, out)?;
        }
        Ok(())
    }
}

/// x / sqrt(mean(x^2) + eps) * weight for one row.
pub(crate) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = loops::sum_squares(x) / x.len() as f32;
    loops::scale_mul(x, 1.0 / (mean + eps).sqrt(), weight, out);
}

/// [`rms_norm_row`] of every row.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let row = |(x, out): (&[f32], &mut [f32])| rms_norm_row(x, weight, eps, out);
    if x.len() < SERIAL_ROWS * width {
        x.chunks_exact(width).zip(out.chunks_exact_mut(width)).for_each(row);
    } else {
        x.par_chunks_exact(width).zip(out.par_chunks_exact_mut(width)).for_each(row);
    }
}

/// `out` += `x`, both `(tokens, width)`.
fn add_rows(x: &[f32], out: &mut [f32], width: usize) {
    if x.len() < SERIAL_ROWS * width {
        loops::add(x, out);
    } else {
        x.par_chunks(width).zip(out.par_chunks_mut(width)).for_each(|(x, out)| loops::add(x, out));
    }
}
