//! A model on GPUs: what [`super::host`] does, as launches. Tokens go in and logits come out; states stay in caches that
//! live on the device ([`DeviceCache`]). Sequences whose caches live on the host (methods without kernels, observed ones)
//! go along: their queries, keys and values are fetched in every layer, which is slow.

mod crossing;
mod room;
mod runs;
mod weights;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use minicache_core::{CacheSpec, ModelShape, Resources, Sequence};
use minicache_device::driver::{Acts, Address, Memory};
use minicache_device::{Device, DeviceCache, DeviceStates, Devices, Norm, Ops, Rotation};
use rayon::prelude::*;

use super::attention::Positions;
use super::{Observer, Score, Step};
use crate::families::{EMBEDDING, FINAL_NORM, HEAD};
use crate::moe::Routing;
use crate::{Error, ModelConfig, Result};
use room::{MLP_ROWS, Room};
pub(super) use runs::grouped;
use runs::{Run, filled, runs};
pub(crate) use weights::Weights;
use weights::{Layer, Linear, Matrix, Mlp, SwiGlu, as_bytes};

/// Percent of a device's memory that are left for the work of steps.
const WORK: u64 = 8;

/// Layers that are loaded at a time: each has its weights in f32 on the host until they are on the device.
const LOADED_TOGETHER: usize = 4;

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Body {
    parts: Vec<Part>,
    /// Where caches live.
    devices: Devices,
    /// The embedding, on the first device.
    table: Matrix,
    /// The output projection on the last device; `None`: the embedding there.
    head: Option<Matrix>,
    norm: Memory,
}

/// Consecutive layers on one device.
#[derive(Debug)]
struct Part {
    device: Arc<Device>,
    layers: Range<usize>,
    ops: Ops,
    weights: Vec<Layer>,
    /// One pass at a time.
    room: Mutex<Room>,
}

fn words(numbers: impl IntoIterator<Item = u32>) -> Vec<u8> {
    numbers.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn floats(device: &Device, at: Address, count: usize) -> Result<Vec<f32>> {
    let mut bytes = vec![0; count * 4];
    device.driver.download(at, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

impl Body {
    /// Loads a model, layer i to the device `map[i]`.
    pub(crate) fn load(
        source: Weights<'_>,
        config: &ModelConfig,
        devices: &[Arc<Device>],
        map: &[usize],
        tick: &dyn Fn(),
    ) -> Result<Self> {
        let arithmetic = source.arithmetic(config)?;
        let mut parts: Vec<Part> = Vec::new();
        // Several layers at a time: GGUF weights are dequantised by one thread each.
        let layers = (0..map.len()).collect::<Vec<_>>();
        let loaded = layers.chunks(LOADED_TOGETHER).flat_map(|some| {
            let load = |&index: &usize| Layer::load(source, config, index, &devices[map[index]], arithmetic);
            some.par_iter().map(load).collect::<Vec<_>>()
        });
        for (index, weights) in loaded.enumerate() {
            let (device, weights) = (&devices[map[index]], weights?);
            match parts.last_mut() {
                Some(part) if Arc::ptr_eq(&part.device, device) => {
                    part.weights.push(weights);
                    part.layers.end = index + 1;
                }
                _ => parts.push(Part {
                    device: device.clone(),
                    layers: index..index + 1,
                    ops: Ops::new(device, arithmetic.act)?,
                    weights: vec![weights],
                    room: Mutex::new(Room::new(device, arithmetic.precise)?),
                }),
            }
            tick();
        }
        let (first, last) = (&parts[0].device, &parts[parts.len() - 1].device);
        let whole = |name: &str, device: &Device| {
            source.matrix(&[(name.to_string(), config.vocab)], config.hidden, device, arithmetic)
        };
        let table = whole(EMBEDDING, first)?;
        tick();
        let head = match config.tied {
            true if parts.len() == 1 => None,
            true => Some(whole(EMBEDDING, last)?),
            false => Some(whole(HEAD, last)?),
        };
        let norm = Memory::of(&last.driver, &as_bytes(&source.vector(FINAL_NORM, config.hidden)?))?;
        tick();
        let places = parts.iter().map(|part| (part.device.clone(), part.layers.clone())).collect();
        let devices = Devices::new(places, arithmetic);
        Ok(Self { devices, table, head, norm, parts })
    }

    /// Bytes of the weights on each of `devices`.
    pub(crate) fn bytes(&self, devices: &[Arc<Device>]) -> Vec<u64> {
        let mut bytes = vec![0; devices.len()];
        let ends = [&self.parts[0], &self.parts[self.parts.len() - 1]].map(|part| &part.device);
        for (bytes, device) in bytes.iter_mut().zip(devices) {
            let here = |other: &Arc<Device>| Arc::ptr_eq(device, other);
            let layers = self.parts.iter().filter(|part| here(&part.device)).flat_map(|part| &part.weights);
            let mut sum = layers.map(Layer::bytes).sum::<usize>();
            if here(ends[0]) {
                sum += self.table.bytes();
            }
            if here(ends[1]) {
                sum += self.norm.bytes() + self.head.as_ref().map_or(0, Matrix::bytes);
            }
            *bytes = sum as u64;
        }
        bytes
    }

    /// See [`super::Decoder::free_memory`]. Of several devices the fullest is full first.
    pub(crate) fn free_memory(&self) -> Result<u64> {
        let mut least = u64::MAX;
        let layers: usize = self.parts.iter().map(|part| part.layers.len()).sum();
        for part in &self.parts {
            let pool = &part.device.pool;
            let (free, total) = part.device.driver.memory()?;
            let free = free + (pool.reserved() - pool.held()) as u64;
            let share = free.saturating_sub(total * WORK / 100) / part.layers.len() as u64;
            least = least.min(share.saturating_mul(layers as u64));
        }
        Ok(least)
    }

    /// An empty cache on the devices; `None` of methods without kernels, with the reason on stderr once.
    pub(crate) fn cache(
        &self,
        spec: &CacheSpec,
        shape: &ModelShape,
        resources: &Resources,
    ) -> Result<Option<DeviceCache>> {
        match self.devices.empty(spec, shape, resources) {
            Ok(cache) => Ok(Some(cache)),
            Err(minicache_device::Error::Unsupported(reason)) => {
                static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
                let mut said = SAID.lock().unwrap_or_else(|e| e.into_inner());
                if !said.contains(&reason) {
                    eprintln!("{reason}: its caches stay on the host, which is slow");
                    said.push(reason);
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Runs the new tokens of all steps, and gives the logits `(rows, vocab)` of the rows `wanted`.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        steps: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
        observer: Option<Observer<'_>>,
    ) -> Result<Vec<f32>> {
        self.stepped(config, steps, positions, wanted, observer, |part, room, rows| {
            finite_logits(config, part, room, rows)
        })
    }

    /// Runs the new tokens of one step, whose cache attends, and gives their states to all `sequences`, whose caches are
    /// empty, too.
    pub(crate) fn fill(
        &self,
        config: &ModelConfig,
        exact: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
        specs: &[&CacheSpec],
        sequences: &mut [Sequence],
    ) -> Result<Vec<f32>> {
        let ids: Vec<u32> = exact.iter().flat_map(|s| s.tokens).copied().collect();
        let mut runs = runs(&self.devices, exact)?;
        runs.extend(filled(&self.devices, sequences, specs, ids.len())?);
        self.pass(config, &ids, runs, positions, wanted, None, |part, room, rows| {
            finite_logits(config, part, room, rows)
        })
    }

    /// Likewise, and gives the likeliest tokens.
    pub(crate) fn forward_greedy(
        &self,
        config: &ModelConfig,
        steps: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
    ) -> Result<Vec<u32>> {
        self.stepped(config, steps, positions, wanted, None, |part, room, rows| {
            let out = room.small.address();
            part.ops.best(room.logits.address(), out, rows, config.vocab)?;
            let mut bytes = vec![0; rows * 4];
            part.device.driver.download(out, &mut bytes)?;
            let tokens: Vec<u32> = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            if tokens.contains(&u32::MAX) { Err(not_finite()) } else { Ok(tokens) }
        })
    }

    /// Likewise, and gives what every row's predictions come to, `pairs` being the row that each is compared with and the
    /// token that follows.
    pub(crate) fn forward_scored(
        &self,
        config: &ModelConfig,
        steps: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
        pairs: &[[u32; 2]],
    ) -> Result<Vec<Score>> {
        self.stepped(config, steps, positions, wanted, None, |part, room, rows| {
            let at = room.small.reserve(rows * 20)?;
            part.device.driver.upload(at, &words(pairs.iter().flatten().copied()))?;
            let out = at + (rows * 8) as Address;
            part.ops.score(room.logits.address(), at, out, rows, config.vocab)?;
            let scores = floats(&part.device, out, rows * 3)?;
            let score = |x: &[f32; 3]| Score { nll: x[0].into(), kl: x[1].into(), agrees: x[2] > 0.0 };
            let scores: Vec<Score> = scores.as_chunks().0.iter().map(score).collect();
            let finite = scores.iter().all(|s| s.nll.is_finite() && s.kl.is_finite());
            if finite { Ok(scores) } else { Err(not_finite()) }
        })
    }

    /// [`Self::pass`] of what steps say.
    fn stepped<T>(
        &self,
        config: &ModelConfig,
        steps: &mut [Step<'_>],
        positions: &Positions,
        wanted: &[Range<usize>],
        observer: Option<Observer<'_>>,
        read: impl Fn(&Part, &mut Room, usize) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let ids: Vec<u32> = steps.iter().flat_map(|s| s.tokens).copied().collect();
        self.pass(config, &ids, runs(&self.devices, steps)?, positions, wanted, observer, read)
    }

    /// Runs the tokens `ids` of `runs`. `read` takes what is wanted of the logits of so many rows.
    #[allow(clippy::too_many_arguments)] // each is another thing, and there are two callers, both above
    fn pass<T>(
        &self,
        config: &ModelConfig,
        ids: &[u32],
        mut runs: Vec<Run<'_>>,
        positions: &Positions,
        wanted: &[Range<usize>],
        mut observer: Option<Observer<'_>>,
        read: impl Fn(&Part, &mut Room, usize) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let rows = ids.len();
        let mut stream: Option<Vec<f32>> = None;
        let mut predicted = Vec::new();
        for (index, part) in self.parts.iter().enumerate() {
            let mut room = part.room.lock().unwrap_or_else(|e| e.into_inner());
            let room = &mut *room;
            room.reserve(config, rows)?;
            let driver = &part.device.driver;
            driver.upload(room.angles.address(), &as_bytes(positions.all()))?;
            match stream.take() {
                Some(x) => driver.upload(room.x.address(), &as_bytes(&x))?,
                None => {
                    let at = room.small.reserve(rows * 4)?;
                    driver.upload(at, &words(ids.iter().copied()))?;
                    part.ops.embed(at, self.table.acts(), room.x.address(), rows, config.hidden)?;
                }
            }
            part.forward(config, room, rows, &mut runs, &mut observer)?;
            if index + 1 < self.parts.len() {
                stream = Some(floats(&part.device, room.x.address(), rows * config.hidden)?);
            } else {
                predicted = match self.logits(config, part, room, wanted)? {
                    0 => Vec::new(),
                    rows => read(part, room, rows)?,
                };
            }
        }
        runs.into_iter().try_for_each(Run::finish)?;
        Ok(predicted)
    }

    /// Final norm and output projection into the room for logits, of so many rows as it gives.
    fn logits(
        &self,
        config: &ModelConfig,
        part: &Part,
        room: &mut Room,
        wanted: &[Range<usize>],
    ) -> Result<usize> {
        let rows: Vec<u32> = wanted.iter().cloned().flatten().map(|row| row as u32).collect();
        let (n, hidden, vocab) = (rows.len(), config.hidden, config.vocab);
        if n == 0 {
            return Ok(0);
        }
        let index = room.small.reserve(n * 4)?;
        part.device.driver.upload(index, &words(rows))?;
        part.ops.rms_norm(&Norm {
            x: room.x.address(),
            bias: part.weights[part.weights.len() - 1].last_bias(),
            weight: self.norm.address(),
            out: room.acts(&room.normed, n * hidden),
            index,
            rows: n,
            width: hidden,
            eps: config.rms_eps,
        })?;
        let out = room.logits.reserve(n * vocab * 4)?;
        let head = self.head.as_ref().unwrap_or(&self.table).acts();
        part.ops.product(head, room.acts(&room.normed, n * hidden), out, (n, hidden, vocab), false)?;
        Ok(n)
    }
}

/// The logits of `rows` rows.
fn finite_logits(config: &ModelConfig, part: &Part, room: &Room, rows: usize) -> Result<Vec<f32>> {
    let logits = floats(&part.device, room.logits.address(), rows * config.vocab)?;
    if logits.iter().all(|x| x.is_finite()) { Ok(logits) } else { Err(not_finite()) }
}

fn not_finite() -> Error {
    Error::Input("the logits are not finite; the model's weights or its input are broken".into())
}

impl Part {
    /// Takes the residual stream `room.x` through the part's layers.
    fn forward(
        &self,
        config: &ModelConfig,
        room: &mut Room,
        rows: usize,
        runs: &mut [Run<'_>],
        observer: &mut Option<Observer<'_>>,
    ) -> Result<()> {
        let (q_dim, kv_dim, hidden) = (config.q_dim(), config.kv_dim(), config.hidden);
        let norm = |bias: Address, weight: &Memory, room: &Room| Norm {
            x: room.x.address(),
            bias,
            weight: weight.address(),
            out: room.acts(&room.normed, rows * hidden),
            index: 0,
            rows,
            width: hidden,
            eps: config.rms_eps,
        };
        let mut bias = 0;
        for (layer, index) in self.weights.iter().zip(self.layers.clone()) {
            self.ops.rms_norm(&norm(bias, &layer.input_norm, room))?;
            if let Some(observer) = observer {
                // With the bias of the layer before, which the norm has added.
                observer(index, &floats(&self.device, room.x.address(), rows * hidden)?);
            }
            let normed = room.acts(&room.normed, rows * hidden);
            let attended = room.acts(&room.attended, rows * q_dim);
            layer.qkv.apply(&self.ops, normed, room.qkv.address(), rows, false)?;
            let own = index % 2;
            self.ops.rotate(&Rotation {
                qkv: room.qkv.address(),
                bias: layer.qkv.bias(),
                angles: room.angles.address(),
                norms: layer.head_norms.as_ref().map_or([0; 2], |n| [n[0].address(), n[1].address()]),
                out: [room.q.address(), room.k[own].address(), room.v[own].address()],
                rows,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                rotary: config.rope.rotary_dim,
                eps: config.rms_eps,
            })?;
            let [q, k, v] = [&room.q, &room.k[own], &room.v[own]].map(Memory::address);
            let states = DeviceStates { q, k, v };
            for run in runs.iter_mut() {
                let Range { start, end } = *run.rows();
                let states = states.skip(start, q_dim, kv_dim);
                let (out, rows) = (attended.from_row(start, q_dim), end - start);
                match run {
                    Run::Device { step, attends: true, .. } => step.attend(index, states, out)?,
                    Run::Device { step, .. } => step.store(index, states)?,
                    Run::Host { batch, .. } => self.on_host(batch, index, states, out, rows, config)?,
                    Run::Filled { sequences, .. } => {
                        self.fill_host(sequences, index, states, rows, config)?
                    }
                }
            }
            layer.output.apply(&self.ops, attended, room.x.address(), rows, true)?;
            self.ops.rms_norm(&norm(layer.output.bias(), &layer.mlp_norm, room))?;
            match &layer.mlp {
                Mlp::Dense(swiglu) => {
                    self.swiglu(swiglu, room, normed, room.x.address(), rows, true)?;
                }
                Mlp::Sparse { router, experts } => self.experts(config, router, experts, room, rows)?,
            }
            bias = layer.last_bias();
        }
        // The next part's layers, or the final norm, read a stream that lacks nothing but the last part's bias.
        if bias != 0 && self.layers.end < config.layers {
            let last = &self.weights[self.weights.len() - 1].mlp_norm;
            self.ops.rms_norm(&norm(bias, last, room))?;
        }
        Ok(())
    }

    /// y (+)= down(silu(gate(x)) * up(x)), a few rows at a time.
    fn swiglu(&self, m: &SwiGlu, room: &Room, x: Acts, y: Address, rows: usize, add: bool) -> Result<()> {
        let (hidden, inner) = (m.gate_up.inputs, m.down.inputs);
        for first in (0..rows).step_by(MLP_ROWS) {
            let n = MLP_ROWS.min(rows - first);
            let (wide, act) = (room.wide.address(), room.acts(&room.inner, n * inner));
            m.gate_up.apply(&self.ops, x.from_row(first, hidden), wide, n, false)?;
            self.ops.swiglu(wide, m.gate_up.bias(), act, n, inner)?;
            m.down.apply(&self.ops, act, y + (first * hidden * 4) as Address, n, add)?;
        }
        Ok(())
    }

    /// Each token through the experts that the router chooses, which the host sorts out: the scores are few.
    fn experts(
        &self,
        config: &ModelConfig,
        router: &Linear,
        experts: &[SwiGlu],
        room: &mut Room,
        rows: usize,
    ) -> Result<()> {
        let Some(numbers) = config.experts else { return Ok(()) };
        let hidden = config.hidden;
        let normed = room.acts(&room.normed, rows * hidden);
        let scores = room.result.address();
        router.apply(&self.ops, normed, scores, rows, false)?;
        let scores = floats(&self.device, scores, rows * experts.len())?;
        for (expert, tokens) in Routing::new(&scores, numbers).chosen {
            let n = tokens.len();
            let mut bytes = words(tokens.iter().map(|(token, _)| *token as u32));
            bytes.extend(as_bytes(&tokens.iter().map(|(_, weight)| *weight).collect::<Vec<_>>()));
            let index = room.small.reserve(bytes.len())?;
            self.device.driver.upload(index, &bytes)?;
            let (x, y) = (room.acts(&room.rows, n * hidden), room.result.address());
            self.ops.gather(normed, index, x, n, hidden)?;
            self.swiglu(&experts[expert], room, x, y, n, false)?;
            let weights = index + (n * 4) as Address;
            self.ops.scatter_add(y, (index, weights), room.x.address(), n, hidden)?;
        }
        Ok(())
    }
}
