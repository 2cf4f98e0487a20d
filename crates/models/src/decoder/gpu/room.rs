//! The working memory of a device's part of a model.

use minicache_device::Device;
use minicache_device::driver::{Acts, Address, Memory};

use crate::{ModelConfig, Result};

/// Rows that go through the feed-forward block at a time.
pub(super) const MLP_ROWS: usize = 2048;

/// Working memory of a part, kept from pass to pass.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) precise: bool,
    /// Ids, rows that logits are asked of, rows and weights of an expert.
    pub(super) small: Memory,
    pub(super) angles: Memory,
    pub(super) x: Memory,
    pub(super) normed: Memory,
    pub(super) qkv: Memory,
    pub(super) q: Memory,
    /// Of layers with even and with odd numbers: a pair needs those of both.
    pub(super) k: [Memory; 2],
    pub(super) v: [Memory; 2],
    pub(super) attended: Memory,
    pub(super) wide: Memory,
    pub(super) inner: Memory,
    /// An expert's rows, and what becomes of them.
    pub(super) rows: Memory,
    pub(super) result: Memory,
    pub(super) logits: Memory,
}

impl Room {
    pub(super) fn new(device: &Device, precise: bool) -> Result<Self> {
        let one = || Memory::new(&device.driver, 256);
        Ok(Self {
            precise,
            small: one()?,
            angles: one()?,
            x: one()?,
            normed: one()?,
            qkv: one()?,
            q: one()?,
            k: [one()?, one()?],
            v: [one()?, one()?],
            attended: one()?,
            wide: one()?,
            inner: one()?,
            rows: one()?,
            result: one()?,
            logits: one()?,
        })
    }

    pub(super) fn reserve(&mut self, config: &ModelConfig, rows: usize) -> Result<()> {
        let (hidden, q_dim, kv_dim) = (config.hidden, config.q_dim(), config.kv_dim());
        let mlp = rows.min(MLP_ROWS);
        let act = if self.precise { 4 } else { 2 };
        self.angles.reserve(rows * config.rope.rotary_dim * 4)?;
        self.x.reserve(rows * hidden * 4)?;
        self.normed.reserve(rows * hidden * act)?;
        self.qkv.reserve(rows * (q_dim + 2 * kv_dim) * 4)?;
        self.q.reserve(rows * q_dim * 4)?;
        for i in 0..2 {
            self.k[i].reserve(rows * kv_dim * 4)?;
            self.v[i].reserve(rows * kv_dim * 4)?;
        }
        self.attended.reserve(rows * q_dim * act)?;
        self.wide.reserve(mlp * 2 * config.intermediate * 4)?;
        self.inner.reserve(mlp * config.intermediate * act)?;
        if config.experts.is_some() {
            self.rows.reserve(rows * hidden * act)?;
            self.result.reserve(rows * hidden * 4)?;
        }
        Ok(())
    }

    /// Activations `(rows, width)` in `memory`: half of it, or both halves.
    pub(super) fn acts(&self, memory: &Memory, numbers: usize) -> Acts {
        let high = memory.address();
        Acts { high, low: if self.precise { high + (numbers * 2) as Address } else { 0 } }
    }
}
