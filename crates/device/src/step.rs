//! A step of a group of sequences whose caches are of one method: tables are uploaded once, then each layer attends and stores with a few launches for all of them.

mod evict;
mod expect;

use std::sync::Arc;

use crate::Result;
use crate::device::{Device, Kernels};
use crate::driver::{Acts, Address, Memory, Plain, bytes_of};
use crate::method::{Method, TILE};
use crate::params::{
    HeldParams, JoinParams, KeepParams, MergeParams, PackParams, RetainParams, RowEntry, SequenceEntry,
    SettleParams, StepParams, TaskEntry, launch,
};
use crate::part::PartCache;
use evict::{EvictRoom, EvictStep};

/// Blocks of attention that a multiprocessor is given at least, if there is so much to read.
const BLOCKS_EACH: usize = 9;

/// Parts that the kernel which joins them has room for.
const MOST_SPLITS: usize = 1024;

/// Tokens that a block of attention reads at least.
const LEAST_SPLIT: usize = TILE;

/// Working memory of steps on one device, kept from step to step.
#[derive(Debug)]
pub(crate) struct Workspace {
    tables: Memory,
    pub(crate) parts: Memory,
    shared: [Memory; 2],
    sizes: [Memory; 2],
    distances: [Memory; 2],
    apart: [Memory; 2],
    index: [Memory; 2],
    /// Queries mapped to latents, states of a group's layers, and their latents.
    pub(crate) mapped: Memory,
    pub(crate) group: [Memory; 2],
    pub(crate) latents: [Memory; 2],
    /// Of methods that drop tokens, from their first step on.
    evict: Option<Box<EvictRoom>>,
}

impl Workspace {
    /// Empty.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let one = || Memory::new(&device.driver, 256);
        let two = || Ok::<_, crate::Error>([one()?, one()?]);
        Ok(Self {
            tables: one()?,
            parts: one()?,
            shared: two()?,
            sizes: two()?,
            distances: two()?,
            apart: two()?,
            index: two()?,
            mapped: one()?,
            group: two()?,
            latents: two()?,
            evict: None,
        })
    }
}

/// A layer's states of a group's rows on the device, f32: queries `(rows, heads, head_dim)`, keys and values
/// `(rows, kv_heads, head_dim)`.
#[derive(Debug, Clone, Copy)]
pub struct DeviceStates {
    /// Queries.
    pub q: Address,
    /// Keys, after RoPE.
    pub k: Address,
    /// Values.
    pub v: Address,
}

/// A step of sequences of one method on one device, in order, one after the other in its rows.
#[derive(Debug)]
pub(crate) struct GroupStep {
    pub(crate) device: Arc<Device>,
    pub(crate) method: Arc<Method>,
    pub(crate) kernels: Kernels,
    pub(crate) count: usize,
    pub(crate) rows: usize,
    pub(crate) sequences: Address,
    pub(crate) row_entries: Address,
    tiles: (Address, usize),
    pub(crate) tasks: [(Address, usize); 2],
    /// Tokens of all tasks.
    pub(crate) packed: [usize; 2],
    /// Parts of the held tokens, and tokens of a part; none held: 0 parts.
    pub(crate) splits: usize,
    pub(crate) length: usize,
    evicting: Option<EvictStep>,
    pub(crate) room: Workspace,
}

impl DeviceStates {
    /// From row `row` on, of queries of `q_dim` numbers and keys and values of `kv_dim`.
    #[must_use]
    pub fn skip(self, row: usize, q_dim: usize, kv_dim: usize) -> Self {
        let at = |address: Address, width: usize| address + (row * width * size_of::<f32>()) as Address;
        Self { q: at(self.q, q_dim), k: at(self.k, kv_dim), v: at(self.v, kv_dim) }
    }
}

impl GroupStep {
    /// A step in which each cache gets so many new tokens, for which it has made room ([`PartCache::begin`]).
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn new(
        device: &Arc<Device>,
        caches: &[(&mut PartCache, usize)],
        mut room: Workspace,
    ) -> Result<Self> {
        let method = caches[0].0.method().clone();
        let kernels = device.kernels(&method)?;
        let shape = method.shape;
        let (mut sequences, mut rows, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tasks, mut packed): ([Vec<TaskEntry>; 2], _) = (Default::default(), [0; 2]);
        let square = if shape.head_dim <= 128 { 64 } else { 32 } / if method.precise { 2 } else { 1 };
        for (index, (cache, tokens)) in caches.iter().enumerate() {
            let (sequence, len, first) = (index as i32, cache.len(), rows.len());
            sequences.push(SequenceEntry {
                tables: cache.tables(),
                len: len as i32,
                first: first as i32,
                rows: *tokens as i32,
                pad: 0,
            });
            rows.extend((len..len + tokens).map(|p| RowEntry { sequence, position: p as i32 }));
            if *tokens > 1 {
                let starts = (0..*tokens).step_by(square);
                tiles.extend(starts.map(|first| RowEntry { sequence, position: first as i32 }));
            }
            let sides = tasks.iter_mut().zip(&mut packed).zip(&method.sides);
            for ((tasks, packed), side) in sides.filter(|(_, side)| side.is_packed()) {
                let (mut at, end) = (side.packed(len), side.packed(len + tokens));
                while at < end {
                    let count = (side.slots() - at % side.slots()).min(end - at);
                    let row = *packed as i32;
                    tasks.push(TaskEntry { sequence, first: at as i32, count: count as i32, row });
                    *packed += count;
                    at += count;
                }
            }
        }
        // Sinks are read beside what else is held.
        let sinks = method.sides[0].sinks();
        let seen = |layer| {
            caches.iter().map(move |(c, _)| {
                let (len, first) = (c.len(), shape.first_seen(layer, c.len()));
                let tokens = len.saturating_sub(sinks) - first.saturating_sub(sinks) / TILE * TILE;
                if len > 0 { tokens.max(1) } else { 0 }
            })
        };
        let held = method.layers.clone().flat_map(seen).max().unwrap_or(0);
        let evicting = EvictStep::new(device, &method, caches, &mut room.evict)?;
        let held = evicting.as_ref().map_or(held, |step| step.held);
        // Enough blocks to keep the device busy; a step of many rows has them anyway.
        let blocks = (rows.len() * shape.kv_heads * method.passes()).max(1);
        let wanted = (device.driver.processors() * BLOCKS_EACH).div_ceil(blocks);
        let length = held.div_ceil(wanted.clamp(1, MOST_SPLITS)).max(LEAST_SPLIT).next_multiple_of(TILE);
        let splits = held.div_ceil(length);

        // One upload for all.
        let mut bytes = Vec::new();
        let mut place = |part: &[u8]| {
            let at = bytes.len();
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(64), 0);
            at as Address
        };
        let at = [
            place(bytes_of(&sequences)),
            place(bytes_of(&rows)),
            place(bytes_of(&tiles)),
            place(bytes_of(&tasks[0])),
            place(bytes_of(&tasks[1])),
        ];
        let base = room.tables.reserve(bytes.len())?;
        device.driver.upload(base, &bytes)?;
        let part = method.part_numbers() * size_of::<f32>();
        room.parts.reserve(rows.len() * shape.heads * (splits + 1) * part)?;
        let width = shape.kv_dim() * size_of::<f32>();
        if method.merging.kind >= 0 {
            for (i, side) in method.sides.iter().enumerate() {
                let numbers = rows.len() * side.columns;
                room.shared[i].reserve(rows.len() * width)?;
                room.sizes[i].reserve(2 * numbers * size_of::<f32>())?;
                room.distances[i].reserve(numbers * size_of::<f32>())?;
                room.apart[i].reserve(numbers)?;
                room.index[i].reserve(numbers * size_of::<i32>())?;
            }
        }
        method.reserve_latents(&mut room, rows.len(), packed)?;
        Ok(Self {
            packed,
            device: device.clone(),
            kernels,
            count: caches.len(),
            rows: rows.len(),
            sequences: base + at[0],
            row_entries: base + at[1],
            tiles: (base + at[2], tiles.len()),
            tasks: [(base + at[3], tasks[0].len()), (base + at[4], tasks[1].len())],
            splits,
            length,
            evicting,
            room,
            method,
        })
    }

    /// Numbers of a row of queries, and of one of keys or values.
    pub(crate) fn widths(&self) -> (usize, usize) {
        let shape = &self.method.shape;
        (shape.heads * shape.head_dim, shape.kv_dim())
    }

    /// Its working memory, for the next step.
    pub(crate) fn into_room(self) -> Workspace {
        self.room
    }

    pub(crate) fn launch<T: Plain>(&self, kernel: &str, grid: [usize; 3], params: &T) -> Result<()> {
        let kernel = self.kernels.of(kernel)?;
        // SAFETY: the methods of a step give each kernel its structure, with addresses of this step's memory, which `begin`
        // made as large as the kernels need for these rows.
        unsafe { launch(&*self.device.driver, kernel, grid.map(|n| n as u32), params) }
    }

    /// Attention of a layer's new tokens over what is held and over themselves: `out (rows, heads, head_dim)`, in the type
    /// of linear layers.
    ///
    /// # Errors
    /// Of the device.
    pub(crate) fn attend(&self, layer: usize, states: DeviceStates, out: Acts) -> Result<()> {
        let shape = &self.method.shape;
        let window = shape.window_of(layer).unwrap_or(0) as i32;
        let (scale, softcap) = (shape.scale, shape.softcap.unwrap_or(0.0));
        let (parts, splits) = (self.room.parts.address(), self.splits as i32);
        if let Some(step) = &self.evicting {
            self.attend_slots(step, layer, states.q)?;
        } else if self.method.latents.is_some() {
            self.attend_latents(layer, states)?;
        } else if self.splits > 0 {
            let params = HeldParams {
                q: states.q,
                sequences: self.sequences,
                rows: self.row_entries,
                parts,
                places: [self.method.sides[0].places[layer], self.method.sides[1].places[layer]],
                splits,
                length: self.length as i32,
                window,
                scale,
                softcap,
                pad: 0,
            };
            let heads = shape.kv_heads * self.method.passes();
            self.launch("attend_held", [self.rows * self.splits, heads, 1], &params)?;
        }
        if self.tiles.1 > 0 {
            let params = StepParams {
                q: states.q,
                k: states.k,
                v: states.v,
                sequences: self.sequences,
                tiles: self.tiles.0,
                parts,
                splits,
                window,
                scale,
                softcap,
            };
            self.launch("attend_step", [self.tiles.1, shape.heads, 1], &params)?;
        }
        if self.method.latents.is_some() {
            return self.join_latents(layer, states, out);
        }
        let params = JoinParams {
            parts,
            q: states.q,
            k: states.k,
            v: states.v,
            sequences: self.sequences,
            rows: self.row_entries,
            out: out.high,
            low: out.low,
            splits,
            scale,
            softcap,
            pad: 0,
        };
        self.launch("join", [self.rows, shape.heads, 1], &params)
    }

    /// Stores a layer's states; `shallower` are those of the layer before, which a pair needs, and `caches` the step's.
    ///
    /// # Errors
    /// Of the device, no memory for what is kept exact.
    pub(crate) fn store(
        &self,
        caches: &mut [(&mut PartCache, usize)],
        layer: usize,
        states: DeviceStates,
        shallower: DeviceStates,
    ) -> Result<()> {
        caches.iter_mut().for_each(|(cache, _)| cache.stored = true);
        if let Some(step) = &self.evicting {
            return self.evict(step, layer, states);
        }
        if self.method.latents.is_some() {
            return self.store_latents(layer, states);
        }
        let places = [0, 1].map(|side: usize| self.method.sides[side].places[layer]);
        let own = [states.k, states.v];
        // What goes into each side's store: nothing yet, of the first layer of a pair.
        let mut rows = [0, 1].map(|side| if places[side].pair < 0 { own[side] } else { 0 });
        let merged = [0, 1].map(|side: usize| places[side].pair >= 0 && places[side].member == 1);
        if merged.contains(&true) {
            self.merge(caches, places.map(|p| p.pair), merged, own, [shallower.k, shallower.v])?;
            for side in 0..2 {
                if merged[side] {
                    rows[side] = self.room.shared[side].address();
                }
            }
        }
        if rows == [0, 0] {
            return Ok(());
        }
        let stores = places.map(|p| p.store);
        let params = KeepParams { sequences: self.sequences, rows: self.row_entries, states: rows, stores };
        // Codes of tokens that leave the window are made of what has been kept of them before, so the order is: pack, keep.
        for side in 0..2 {
            let (tasks, count) = self.tasks[side];
            if rows[side] != 0 && count > 0 {
                let params = PackParams {
                    sequences: self.sequences,
                    tasks,
                    states: rows[side],
                    side: side as i32,
                    store: stores[side],
                };
                self.launch("pack", [count, self.method.shape.kv_heads, 1], &params)?;
            }
        }
        self.launch("keep", [self.rows, 2, 1], &params)
    }

    /// Merges the sides of a pair that are complete, and keeps apart what the rule says.
    fn merge(
        &self,
        caches: &mut [(&mut PartCache, usize)],
        pairs: [i32; 2],
        merged: [bool; 2],
        b: [Address; 2],
        a: [Address; 2],
    ) -> Result<()> {
        let method = &self.method;
        let merging = &method.merging;
        let rows = self.rows as i32;
        let address =
            |memory: &[Memory; 2]| [0, 1].map(|side| if merged[side] { memory[side].address() } else { 0 });
        let (distances, apart) = (address(&self.room.distances), address(&self.room.apart));
        for side in (0..2).filter(|&side| merged[side]) {
            let columns = method.sides[side].columns;
            let params = MergeParams {
                a: a[side],
                b: b[side],
                shared: self.room.shared[side].address(),
                sizes: self.room.sizes[side].address(),
                distances: distances[side],
                apart: apart[side],
                rows,
                columns: columns as i32,
                kind: merging.kind,
                pad: 0,
                t: merging.t,
            };
            self.launch("merge", [self.rows, columns, 1], &params)?;
        }
        let keeps = [0, 1].map(|side: usize| merged[side] && method.sides[side].keeps);
        let index = [0, 1].map(|side| if keeps[side] { self.room.index[side].address() } else { 0 });
        if keeps.contains(&true) {
            let params = RetainParams {
                sequences: self.sequences,
                distances: [0, 1].map(|side| if keeps[side] { distances[side] } else { 0 }),
                apart,
                index,
                pairs,
                rows,
                sinks: merging.sinks as i32,
                joint: i32::from(merging.joint),
                rule: [merging.rule; 2],
                gamma: [merging.gamma; 2],
                pad: 0,
            };
            let columns = method.sides[0].columns.max(method.sides[1].columns);
            self.launch("retain", [self.count, columns, 1], &params)?;
            // Single tokens have had their room made.
            let long = caches.iter_mut().filter(|(_, tokens)| *tokens > 1);
            for (cache, _) in long {
                for side in (0..2).filter(|&side| keeps[side]) {
                    cache.settle_kept(side)?;
                }
            }
        }
        for side in (0..2).filter(|&side| merged[side]) {
            if !keeps[side] && !method.sides[side].has_magnitudes {
                continue;
            }
            let params = SettleParams {
                sequences: self.sequences,
                rows: self.row_entries,
                a: a[side],
                b: b[side],
                shared: self.room.shared[side].address(),
                sizes: self.room.sizes[side].address(),
                index: index[side],
                side: side as i32,
                pair: pairs[side],
                row_count: rows,
                pad: 0,
            };
            self.launch("settle", [self.rows, method.sides[side].columns, 1], &params)?;
        }
        Ok(())
    }
}
