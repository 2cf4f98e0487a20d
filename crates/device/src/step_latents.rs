//! A step of sequences whose caches hold latents.

use std::sync::Arc;

use crate::Result;
use crate::driver::{Acts, Address};
use crate::latents::LatentMethod;
use crate::method::Method;
use crate::params::{
    EncodeParams, JoinLatentsParams, KeepExactParams, LatentParams, MapParams, WriteLatentsParams,
};
use crate::step::{DeviceStates, GroupStep, Workspace};

/// Threads of a block: each has a component of latents.
const THREADS: usize = 256;

impl Method {
    /// Makes room for what latents need in a step of `rows` rows, in which so many keys and values become latents.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn reserve_latents(&self, room: &mut Workspace, rows: usize, new: [usize; 2]) -> Result<()> {
        let Some(latents) = &self.latents else { return Ok(()) };
        let (shape, float) = (&self.shape, size_of::<f32>());
        room.mapped.reserve(rows * shape.heads * (2 * shape.head_dim + latents.ranks[0]) * float)?;
        for (side, new) in new.into_iter().enumerate() {
            let groups = &latents.groups[side];
            let layers = groups.iter().map(|g| g.layers.len()).max().unwrap_or(0);
            let sets = groups.iter().map(|g| g.sets.len()).max().unwrap_or(0);
            room.group[side].reserve(layers * rows * shape.kv_dim() * float)?;
            room.latents[side].reserve(sets * new * latents.ranks[side] * float)?;
        }
        Ok(())
    }
}

impl GroupStep {
    fn latents(&self) -> Arc<LatentMethod> {
        match &self.method.latents {
            Some(latents) => latents.clone(),
            None => unreachable!("asked of methods of latents"),
        }
    }

    /// The index of a layer's exact tokens.
    fn exact_layer(&self, layer: usize) -> i32 {
        (layer - self.method.layers.start) as i32
    }

    /// The parts of attention over what is held.
    pub(crate) fn attend_latents(&self, layer: usize, states: DeviceStates) -> Result<()> {
        if self.splits == 0 {
            return Ok(());
        }
        let (latents, shape) = (self.latents(), &self.method.shape);
        let groups = [0, 1].map(|side| latents.group(side, layer));
        let sets = [0, 1].map(|side: usize| latents.sets(side, groups[side].0));
        let mapped = self.room.mapped.address();
        let map = MapParams {
            q: states.q,
            out: mapped,
            sets: sets[0],
            layer: groups[0].1 as i32,
            scale: shape.scale,
        };
        self.launch("map_queries", [self.rows, shape.heads, 1], &map)?;
        let params = LatentParams {
            q: mapped,
            sequences: self.sequences,
            rows: self.row_entries,
            parts: self.room.parts.address(),
            sets,
            phases: latents.phases(),
            levels: latents.levels(),
            layer: self.exact_layer(layer),
            splits: self.splits as i32,
            length: self.length as i32,
            window: shape.window_of(layer).unwrap_or(0) as i32,
            softcap: shape.softcap.unwrap_or(0.0),
            pad: 0,
        };
        let heads = shape.kv_heads * self.method.passes();
        self.launch("attend_latents", [self.rows * self.splits, heads, 1], &params)
    }

    /// All parts together, in the space of values.
    pub(crate) fn join_latents(&self, layer: usize, states: DeviceStates, out: Acts) -> Result<()> {
        let (latents, shape) = (self.latents(), &self.method.shape);
        let (group, within) = latents.group(1, layer);
        let params = JoinLatentsParams {
            parts: self.room.parts.address(),
            q: states.q,
            k: states.k,
            v: states.v,
            sequences: self.sequences,
            rows: self.row_entries,
            out: out.high,
            low: out.low,
            sets: latents.sets(1, group),
            layer: within as i32,
            splits: self.splits as i32,
            scale: shape.scale,
            softcap: shape.softcap.unwrap_or(0.0),
        };
        self.launch("join_latents", [self.rows, shape.heads, 1], &params)
    }

    /// Stores a layer's states: exact ones at once, those that become latents with the last layer of their group.
    pub(crate) fn store_latents(&self, layer: usize, states: DeviceStates) -> Result<()> {
        let latents = self.latents();
        let bytes = self.rows * self.method.shape.kv_dim() * size_of::<f32>();
        for (side, own) in [states.k, states.v].into_iter().enumerate() {
            let (group, within) = latents.group(side, layer);
            let waiting = self.room.group[side].address();
            self.device.driver.copy(waiting + (within * bytes) as Address, own, bytes)?;
            let whole = &latents.groups[side][group];
            let (tasks, count) = self.tasks[side];
            if layer + 1 < whole.layers.end || count == 0 {
                continue;
            }
            let (sets, z, new) =
                (latents.sets(side, group), self.room.latents[side].address(), self.packed[side] as i32);
            let encode = EncodeParams {
                sequences: self.sequences,
                tasks,
                states: waiting,
                sets,
                phases: latents.phases(),
                out: z,
                side: side as i32,
                rows: self.rows as i32,
                latents: new,
                layer: self.exact_layer(whole.layers.start),
            };
            let parts = latents.ranks[side].div_ceil(THREADS);
            self.launch("encode", [count, whole.sets.len(), parts], &encode)?;
            let write = WriteLatentsParams {
                sequences: self.sequences,
                tasks,
                sets,
                z,
                levels: latents.levels(),
                side: side as i32,
                latents: new,
            };
            self.launch("write_latents", [count, whole.sets.len(), 1], &write)?;
        }
        let keep = KeepExactParams {
            sequences: self.sequences,
            rows: self.row_entries,
            states: [states.k, states.v],
            layer: self.exact_layer(layer),
            pad: 0,
        };
        self.launch("keep_exact", [self.rows, 2, 1], &keep)
    }
}
