//! Sequences whose caches live on the host go along with a pass on a device: their states cross over in every layer.

use minicache_core::{Batch, CacheSpec, Sequence, States};
use minicache_device::DeviceStates;
use minicache_device::driver::Acts;
use rayon::prelude::*;

use super::{Part, floats};
use crate::linear::halves;
use crate::{ModelConfig, Result};

impl Part {
    /// Attention of sequences whose caches live on the host.
    pub(super) fn on_host(
        &self,
        batch: &mut Batch<'_>,
        layer: usize,
        states: DeviceStates,
        out: Acts,
        rows: usize,
        config: &ModelConfig,
    ) -> Result<()> {
        let [q, k, v] = self.fetched(states, rows, config)?;
        let mut attended = vec![0.0; rows * config.q_dim()];
        batch.attend(layer, States::new(&q, &k, &v), &mut attended)?;
        let (high, low): (Vec<[u8; 2]>, Vec<[u8; 2]>) =
            attended.iter().map(|x| halves(*x, self.ops.act())).unzip();
        self.device.driver.upload(out.high, high.as_flattened())?;
        if out.low != 0 {
            self.device.driver.upload(out.low, low.as_flattened())?;
        }
        Ok(())
    }

    /// Gives a layer's states to caches that live on the host. Those that rank tokens by the attention that they receive
    /// attend once more.
    pub(super) fn fill_host(
        &self,
        sequences: &mut [(&mut Sequence, &CacheSpec)],
        layer: usize,
        states: DeviceStates,
        rows: usize,
        config: &ModelConfig,
    ) -> Result<()> {
        let [q, k, v] = self.fetched(states, rows, config)?;
        let fill = |(sequence, spec): &mut (&mut Sequence, &CacheSpec)| {
            let cache = sequence.cache_mut();
            if spec.needs_attention() {
                cache.attend_into(layer, &q, &k, &v, &mut vec![0.0; q.len()])
            } else {
                cache.append(layer, &k, &v)
            }
        };
        Ok(sequences.par_iter_mut().try_for_each(fill)?)
    }

    /// Queries, keys and values of a layer.
    fn fetched(&self, states: DeviceStates, rows: usize, config: &ModelConfig) -> Result<[Vec<f32>; 3]> {
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
        let numbers = |at, width| floats(&self.device, at, rows * width);
        Ok([numbers(states.q, q_dim)?, numbers(states.k, kv_dim)?, numbers(states.v, kv_dim)?])
    }
}
