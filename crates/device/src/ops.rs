//! What a decoder does on a device beside attention: linear layers, and what is between them.

use std::sync::Arc;

use crate::device::Device;
use crate::driver::{Act, Acts, Address, Driver, Kernel, Memory, Plain, Product};
use crate::kernels::{File, Source};
use crate::params::{
    BestParams, EmbedParams, GatherParams, NoiseParams, NormParams, RotateParams, ScatterParams, ScoreParams,
    SwiGluParams, launch,
};
use crate::{Error, Result};

/// Threads of a block.
const THREADS: u32 = 256;

/// Blocks that share a row of a feed-forward block.
const ROW_BLOCKS: u32 = 4;

/// The kernels between linear layers, for one type of these. Addresses are those of matrices as each method says; whoever
/// calls sees to their sizes.
#[derive(Debug)]
pub struct Ops {
    driver: Arc<dyn Driver>,
    act: Act,
    embed: Kernel,
    rms_norm: Kernel,
    rotate: Kernel,
    swiglu: Kernel,
    gather: Kernel,
    scatter_add: Kernel,
    noise: Kernel,
    best: Kernel,
    score: Kernel,
}

/// What [`Ops::rotate`] reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct Rotation {
    /// f32 `(rows, (heads + 2 kv_heads) head_dim)`.
    pub qkv: Address,
    /// f32, as wide, or 0.
    pub bias: Address,
    /// f32 `(rows, rotary)`: cosines, then sines.
    pub angles: Address,
    /// Weights of the norms of query heads and key heads, f32 `(head_dim)`, or 0.
    pub norms: [Address; 2],
    /// Queries, keys and values, f32.
    pub out: [Address; 3],
    /// New tokens.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Numbers of a head that are rotated.
    pub rotary: usize,
    /// Epsilon of the norms.
    pub eps: f32,
}

/// What [`Ops::rms_norm`] reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// f32 `(any, width)`.
    pub x: Address,
    /// f32 `(width)`, added to x for good; or 0.
    pub bias: Address,
    /// f32 `(width)`.
    pub weight: Address,
    /// `(rows, width)` in the type of linear layers.
    pub out: Acts,
    /// u32 `(rows)`: rows of x; or 0, for the first ones.
    pub index: Address,
    /// Rows of `out`.
    pub rows: usize,
    /// Columns.
    pub width: usize,
    /// Epsilon.
    pub eps: f32,
}

/// The specialisation of the kernels between linear layers.
pub(crate) fn source(act: Act) -> Source {
    Source { file: File::Layers, macros: vec![("BFLOAT", i64::from(act == Act::Bf16))], threads: THREADS }
}

impl Ops {
    /// Compiles the kernels, or finds them compiled.
    ///
    /// # Errors
    /// Of the compiler.
    pub fn new(device: &Device, act: Act) -> Result<Self> {
        let mut kernels = device.driver.compile(&source(act))?.into_iter();
        let mut next = || kernels.next().ok_or_else(|| Error::Missing("a kernel is missing".into()));
        Ok(Self {
            driver: device.driver.clone(),
            act,
            embed: next()?,
            rms_norm: next()?,
            rotate: next()?,
            swiglu: next()?,
            gather: next()?,
            scatter_add: next()?,
            noise: next()?,
            best: next()?,
            score: next()?,
        })
    }

    /// The type of linear layers.
    pub fn act(&self) -> Act {
        self.act
    }

    fn launch<T: Plain>(&self, kernel: &Kernel, grid: [usize; 3], params: &T) -> Result<()> {
        // SAFETY: the methods below give each kernel its structure; the sizes are the caller's to see to, as the type says.
        unsafe { launch(&*self.driver, kernel, grid.map(|n| n as u32), params) }
    }

    /// `out (rows, width)` f32: the rows `ids` (u32) of `table (any, width)`.
    ///
    /// # Errors
    /// Of the device.
    pub fn embed(&self, ids: Address, table: Acts, out: Address, rows: usize, width: usize) -> Result<()> {
        let params = EmbedParams {
            ids,
            table: table.high,
            low: table.low,
            out,
            rows: rows as i32,
            width: width as i32,
        };
        self.launch(&self.embed, [rows, 1, 1], &params)
    }

    /// x / sqrt(mean(x^2) + eps) * weight, row by row.
    ///
    /// # Errors
    /// Of the device.
    pub fn rms_norm(&self, n: &Norm) -> Result<()> {
        let params = NormParams {
            x: n.x,
            bias: n.bias,
            weight: n.weight,
            out: n.out.high,
            low: n.out.low,
            index: n.index,
            rows: n.rows as i32,
            width: n.width as i32,
            eps: n.eps,
            pad: 0,
        };
        self.launch(&self.rms_norm, [n.rows, 1, 1], &params)
    }

    /// Takes queries, keys and values apart, biases, norms and rotates them.
    ///
    /// # Errors
    /// Of the device.
    pub fn rotate(&self, r: &Rotation) -> Result<()> {
        let params = RotateParams {
            qkv: r.qkv,
            bias: r.bias,
            angles: r.angles,
            query_norm: r.norms[0],
            key_norm: r.norms[1],
            q: r.out[0],
            k: r.out[1],
            v: r.out[2],
            rows: r.rows as i32,
            heads: r.heads as i32,
            kv_heads: r.kv_heads as i32,
            dim: r.head_dim as i32,
            rotary: r.rotary as i32,
            eps: r.eps,
        };
        let heads = r.heads + 2 * r.kv_heads;
        self.launch(&self.rotate, [r.rows, heads.div_ceil(THREADS as usize / 32), 1], &params)
    }

    /// `out (rows, inner)` = silu(gate) * up of `wide (rows, 2 inner)` f32, after `bias` (f32, or 0).
    ///
    /// # Errors
    /// Of the device.
    pub fn swiglu(&self, wide: Address, bias: Address, out: Acts, rows: usize, inner: usize) -> Result<()> {
        let params =
            SwiGluParams { wide, bias, out: out.high, low: out.low, rows: rows as i32, inner: inner as i32 };
        self.launch(&self.swiglu, [rows, ROW_BLOCKS as usize, 1], &params)
    }

    /// `out (rows, width)`: the rows `index` (u32) of x, both in the type of linear layers.
    ///
    /// # Errors
    /// Of the device.
    pub fn gather(&self, x: Acts, index: Address, out: Acts, rows: usize, width: usize) -> Result<()> {
        for (x, out) in [(x.high, out.high), (x.low, out.low)].into_iter().filter(|(x, _)| *x != 0) {
            let params = GatherParams { x, index, out, rows: rows as i32, width: width as i32 };
            self.launch(&self.gather, [rows, 1, 1], &params)?;
        }
        Ok(())
    }

    /// `out[index[row]] += weights[row] x[row]`, f32; no index comes twice.
    ///
    /// # Errors
    /// Of the device.
    pub fn scatter_add(
        &self,
        x: Address,
        (index, weights): (Address, Address),
        out: Address,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let params = ScatterParams { x, index, weights, out, rows: rows as i32, width: width as i32 };
        self.launch(&self.scatter_add, [rows, 1, 1], &params)
    }

    /// The column of the largest number of each row of x `(rows, width)` f32: `out (rows)` u32, all ones where a number of
    /// the row is none.
    ///
    /// # Errors
    /// Of the device.
    pub fn best(&self, x: Address, out: Address, rows: usize, width: usize) -> Result<()> {
        let params = BestParams { x, out, rows: rows as i32, width: width as i32 };
        self.launch(&self.best, [rows, 1, 1], &params)
    }

    /// Of each row of the logits `x (rows, width)` f32, with `pairs (rows, 2)` u32, the row that it is compared with and a
    /// column: `out (rows, 3)` f32, -log of the column's probability, KL(other row || this one), both in nats, and 1 where
    /// both have the same largest column, else 0. Not a number where a logit is none.
    ///
    /// # Errors
    /// Of the device.
    pub fn score(&self, x: Address, pairs: Address, out: Address, rows: usize, width: usize) -> Result<()> {
        let params = ScoreParams { x, pairs, out, rows: rows as i32, width: width as i32 };
        self.launch(&self.score, [rows, 1, 1], &params)
    }

    /// Fills `memory` with numbers spread evenly over `-size..size`: f32 if `wide`, else in the type of linear layers.
    ///
    /// # Errors
    /// Of the device.
    pub fn noise(&self, memory: &Memory, seed: u32, size: f32, wide: bool) -> Result<()> {
        let count = (memory.bytes() / if wide { 4 } else { 2 }) as u64;
        let params = NoiseParams { out: memory.address(), count, seed, size, wide: i32::from(wide), pad: 0 };
        self.launch(
            &self.noise,
            [count.div_ceil(u64::from(THREADS) * 8).clamp(1, 65_535) as usize, 1, 1],
            &params,
        )
    }

    /// `y (rows, outputs) = x (rows, inputs) w (outputs, inputs)^T`, added to y where `add` is set.
    ///
    /// # Errors
    /// Of the device.
    pub fn product(
        &self,
        w: Acts,
        x: Acts,
        y: Address,
        (rows, inputs, outputs): (usize, usize, usize),
        add: bool,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        // The product of what is left on both sides is beyond f32.
        let parts = [(w.high, x.high, add), (w.low, x.high, true), (w.high, x.low, true)];
        for (w, x, add) in parts.into_iter().filter(|(w, x, _)| *w != 0 && *x != 0) {
            // SAFETY: the sizes are the caller's to see to, as the type says.
            unsafe { self.driver.product(&Product { w, x, y, rows, inputs, outputs, act: self.act, add })? };
        }
        Ok(())
    }
}
