//! What queries to come are expected to look at: the launches that score a prompt's tokens for `expected_attention`.

use super::{DeviceStates, GroupStep};
use crate::Result;
use crate::device::Device;
use crate::driver::{Address, Memory, bytes_of};
use crate::evicting::Evicting;
use crate::method::Method;
use crate::params::ExpectParams;
use crate::part::PartCache;

/// Channels of a side of a tile of a covariance.
const SIDE: usize = 64;

/// Tokens of a block of `expect_logits`.
const TOKENS: usize = 16;

/// Working memory.
#[derive(Debug)]
pub(super) struct ExpectRoom {
    angles: Memory,
    means: Memory,
    spreads: Memory,
    logits: Memory,
}

impl ExpectRoom {
    fn new(device: &Device) -> Result<Self> {
        let one = || Memory::new(&device.driver, 256);
        Ok(Self { angles: one()?, means: one()?, spreads: one()?, logits: one()? })
    }
}

/// The prompts of a step.
#[derive(Debug)]
pub(super) struct ExpectStep {
    sinks: usize,
    rotary: usize,
    count: usize,
    /// Tokens of the longest after the first ones.
    longest: usize,
    prompts: Address,
    angles: Address,
    averages: Address,
}

impl ExpectStep {
    /// Those of `caches` whose tokens are dropped in this step, if there are any; `offsets` are where their candidates
    /// begin, of `total`.
    pub(super) fn new(
        device: &Device,
        method: &Method,
        caches: &[(&mut PartCache, usize)],
        (offsets, total): (&[usize], usize),
        room: &mut Option<ExpectRoom>,
    ) -> Result<Option<Self>> {
        let Some(Evicting::Expected { sinks, future, .. }) = method.evicting else { return Ok(None) };
        let expecting = |(cache, tokens): &(&mut PartCache, usize)| {
            method.evicting.as_ref().is_some_and(|e| e.expects(cache.len(), *tokens))
        };
        let prompts: Vec<i32> =
            (0..caches.len()).filter(|&i| expecting(&caches[i])).map(|i| i as i32).collect();
        let Some(&first) = prompts.first() else { return Ok(None) };
        let room = match room {
            Some(room) => room,
            none => none.insert(ExpectRoom::new(device)?),
        };
        // Sequences of one model rotate as many numbers.
        let rotary = caches[first as usize].0.rotary.dim();
        let mut angles = vec![0f32; total * rotary];
        let mut averages = Vec::with_capacity(prompts.len() * rotary);
        let mut longest = 0;
        for (cache, tokens, offset) in prompts.iter().map(|&i| {
            let (cache, tokens) = &caches[i as usize];
            (cache, *tokens, offsets[i as usize])
        }) {
            longest = longest.max(tokens - sinks);
            for (position, row) in
                angles[offset * rotary..].chunks_exact_mut(rotary.max(1)).take(tokens).enumerate()
            {
                cache.rotary.angles_into(position, row);
            }
            averages.extend(cache.rotary.average(tokens..tokens + future));
        }
        let mut bytes = bytes_of(&prompts).to_vec();
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        let at = bytes.len() as Address;
        bytes.extend_from_slice(bytes_of(&averages));
        let after = bytes.len() as Address;
        bytes.extend_from_slice(bytes_of(&angles));
        let base = room.angles.reserve(bytes.len())?;
        device.driver.upload(base, &bytes)?;
        let (dim, heads) = (method.shape.head_dim, prompts.len() * method.shape.heads);
        room.means.reserve(heads * dim * size_of::<f32>())?;
        room.spreads.reserve(heads * dim * dim * size_of::<f32>())?;
        room.logits.reserve(method.shape.heads * total * size_of::<f32>())?;
        Ok(Some(Self {
            sinks,
            rotary,
            count: prompts.len(),
            longest,
            prompts: base,
            angles: base + after,
            averages: base + at,
        }))
    }
}

impl GroupStep {
    /// Writes the scores of the prompts' tokens to `received (kv_heads, total)`.
    pub(super) fn expect(
        &self,
        step: &ExpectStep,
        rankings: Address,
        (received, total): (Address, usize),
        states: DeviceStates,
    ) -> Result<()> {
        let Some(room) = self.room.evict.as_ref().and_then(|room| room.expect.as_ref()) else {
            return Ok(());
        };
        let shape = &self.method.shape;
        let params = ExpectParams {
            q: states.q,
            k: states.k,
            v: states.v,
            sequences: self.sequences,
            rankings,
            prompts: step.prompts,
            angles: step.angles,
            averages: step.averages,
            means: room.means.address(),
            spreads: room.spreads.address(),
            logits: room.logits.address(),
            received,
            sinks: step.sinks as i32,
            rotary: step.rotary as i32,
            total: total as i32,
            scale: shape.scale,
        };
        if states.q != 0 {
            let tiles = shape.head_dim.div_ceil(SIDE).pow(2);
            self.launch("expect_mean", [step.count, shape.heads, 1], &params)?;
            self.launch("expect_spread", [step.count, shape.heads, tiles], &params)?;
        }
        self.launch("expect_logits", [step.count, shape.heads, step.longest.div_ceil(TOKENS)], &params)?;
        self.launch("expect", [step.count, shape.kv_heads, 1], &params)
    }
}
