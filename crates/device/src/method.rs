//! What a method stores, as the kernels have to know it.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use minicache_core::settings::{
    Axis, Granularity, KeySpace, ModelShape, Retention, RetentionRule, StoreType,
};
use minicache_core::{BlockLayout, CacheSpec, Resources, Scheme, Store, StoreCount};

use crate::device::{Device, Kernels};
use crate::driver::Act;
use crate::evicting::Evicting;
use crate::held::Held;
use crate::kernels::{File, Source};
use crate::latents::LatentMethod;
use crate::{Error, Result};

/// Threads of a block of the kernels of caches: eight warps.
const THREADS: u32 = 256;

/// Tokens that attention reads at a time: sixteen strips of 16.
pub(crate) const TILE: usize = 256;

/// Tokens of a block of those that wait, and of kept ones.
pub(crate) const RECENT: usize = 16;

/// The host's lines, to which blocks are rounded up.
pub(crate) const LINE: usize = 64;

/// Tokens of a page of magnitudes.
pub(crate) const PAGE: usize = 256;

/// How a model is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arithmetic {
    /// The type of weights and activations of linear layers.
    pub act: Act,
    /// Whether what rounding to that type leaves is kept too, so that numbers are as good as in f32.
    pub precise: bool,
}

/// How numbers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Floats(StoreType),
    Codes {
        bits: usize,
        /// Numbers that share a scale and a zero.
        run: usize,
        /// Whether these are of one channel.
        along: bool,
        residual: usize,
    },
    /// Latents, and exact tokens before and after them.
    Latents {
        sinks: usize,
        residual: usize,
        block_bytes: usize,
        sink_tokens: usize,
    },
}

/// Where a layer finds its states on one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Place {
    /// Its part of a block.
    pub(crate) store: i32,
    /// Its pair, for magnitudes and kept tokens; -1: the layer has states of its own.
    pub(crate) pair: i32,
    /// Which layer of the pair it is.
    pub(crate) member: i32,
}

/// One side of a cache.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    kind: Kind,
    /// The host's.
    block: BlockLayout,
    /// What an empty side counts, and a store of the kept tokens of a layer and column.
    pub(crate) held: Held,
    pub(crate) kept_count: StoreCount,
    /// Type of what waits and of what is kept exact.
    exact: StoreType,
    magnitude: StoreType,
    pub(crate) columns: usize,
    pub(crate) places: Vec<Place>,
    pub(crate) stores: usize,
    pub(crate) pairs: usize,
    pub(crate) has_magnitudes: bool,
    /// Whether tokens may be kept exact.
    pub(crate) keeps: bool,
    kv_heads: usize,
    head_dim: usize,
    keys: bool,
}

/// How pairs are merged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Merging {
    /// The kernel's number of the function.
    pub(crate) kind: i32,
    pub(crate) t: f64,
    pub(crate) rule: i32,
    pub(crate) gamma: f32,
    pub(crate) joint: bool,
    pub(crate) sinks: usize,
}

/// A method on those of a model's layers that are on one device.
#[derive(Debug)]
pub(crate) struct Method {
    pub(crate) shape: ModelShape,
    /// Those on the device.
    pub(crate) layers: Range<usize>,
    pub(crate) sides: [Side; 2],
    pub(crate) merging: Merging,
    /// What it drops; its states then lie in slots, and the sides only say their type.
    pub(crate) evicting: Option<Evicting>,
    pub(crate) act: Act,
    /// Whether attention within a step is computed in f32 throughout.
    pub(crate) precise: bool,
    /// What a method of latents has beside it.
    pub(crate) latents: Option<Arc<LatentMethod>>,
    /// What it was made of.
    spec: CacheSpec,
    /// Those of the device, once they are asked for.
    pub(crate) kernels: OnceLock<Kernels>,
}

impl Side {
    /// Tokens of a block.
    pub(crate) fn slots(&self) -> usize {
        self.block.tokens
    }

    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.kind, Kind::Codes { .. } | Kind::Latents { .. })
    }

    /// How many of the first `len` tokens are apart from blocks, so that their indices count from the next.
    pub(crate) fn sinks(&self) -> usize {
        if let Kind::Latents { sinks, .. } = self.kind { sinks } else { 0 }
    }

    /// Tokens of a block of sinks, and bytes of it.
    pub(crate) fn sink_block(&self) -> (usize, usize) {
        let Kind::Latents { sink_tokens, .. } = self.kind else { return (1, 0) };
        let head = (self.head_dim * sink_tokens * self.exact.bytes()).next_multiple_of(LINE);
        (sink_tokens, self.stores * self.kv_heads * head)
    }

    /// How many of `len` tokens are in blocks.
    pub(crate) fn packed(&self, len: usize) -> usize {
        match self.kind {
            Kind::Floats(_) => len,
            Kind::Codes { residual, run, along: true, .. } => len.saturating_sub(residual) / run * run,
            Kind::Codes { residual, .. } => len.saturating_sub(residual),
            Kind::Latents { sinks, residual, .. } => len.saturating_sub(sinks + residual),
        }
    }

    /// Bytes of a block of all stores.
    pub(crate) fn block_bytes(&self) -> usize {
        match self.kind {
            Kind::Latents { block_bytes, .. } => block_bytes,
            _ => self.stores * self.kv_heads * self.block.head_bytes,
        }
    }

    fn exact_bytes(&self) -> usize {
        self.head_dim * RECENT * self.exact.bytes()
    }

    /// Bytes of a block of tokens that wait, of all stores.
    pub(crate) fn recent_bytes(&self) -> usize {
        self.stores * self.kv_heads * self.exact_bytes()
    }

    /// Bytes of a page of the magnitudes of all pairs.
    pub(crate) fn page_bytes(&self) -> usize {
        self.pairs * 2 * self.columns * PAGE * self.magnitude.bytes()
    }

    /// Bytes of a block of kept tokens of one column of one pair.
    pub(crate) fn kept_bytes(&self) -> usize {
        2 * (self.kv_heads / self.columns) * self.exact_bytes() + RECENT * size_of::<i32>()
    }

    fn macros(&self) -> Vec<(&'static str, i64)> {
        let dtype = |t: StoreType| i64::from(t == StoreType::F32);
        let (kind, bits, run, along, residual) = match self.kind {
            Kind::Floats(t) => (dtype(t), 4, 32, false, 0),
            Kind::Codes { bits, run, along, residual } => {
                (2, bits as i64, run as i64, along, residual as i64)
            }
            Kind::Latents { .. } => return Vec::new(),
        };
        let values = [
            kind,
            bits,
            run,
            i64::from(along),
            residual,
            dtype(self.exact),
            self.stores as i64,
            self.columns as i64,
            dtype(self.magnitude),
        ];
        let names = if self.keys {
            [
                "K_KIND",
                "K_BITS",
                "K_RUN",
                "K_ALONG",
                "K_RESIDUAL",
                "K_EXACT",
                "K_STORES",
                "K_COLUMNS",
                "K_MAGNITUDE",
            ]
        } else {
            [
                "V_KIND",
                "V_BITS",
                "V_RUN",
                "V_ALONG",
                "V_RESIDUAL",
                "V_EXACT",
                "V_STORES",
                "V_COLUMNS",
                "V_MAGNITUDE",
            ]
        };
        names.into_iter().zip(values).collect()
    }
}

const NO_RULE: i32 = 3;

impl Merging {
    /// Whether distances decide which tokens are kept.
    pub(crate) fn has_rule(&self) -> bool {
        self.rule != NO_RULE
    }
}

impl PartialEq for Method {
    /// Whether kernels and maps of one serve the other, so that sequences of both can go through a step together.
    fn eq(&self, other: &Self) -> bool {
        let maps = |m: &Self| m.latents.as_ref().map(Arc::as_ptr);
        (&self.spec, &self.shape, &self.layers) == (&other.spec, &other.shape, &other.layers)
            && (self.act, self.precise) == (other.act, other.precise)
            && maps(self) == maps(other)
    }
}

fn refuse<T>(what: String) -> Result<T> {
    Err(Error::Unsupported(format!("{what} has no kernels for a device")))
}

impl Method {
    /// What `spec` stores of the layers `layers` of a model of `shape`.
    ///
    /// # Errors
    /// Methods and settings that have no kernels, by name; a pair of which `layers` has one.
    pub(crate) fn new(
        device: &Device,
        spec: &CacheSpec,
        shape: &ModelShape,
        layers: Range<usize>,
        arithmetic: Arithmetic,
        resources: &Resources,
    ) -> Result<Self> {
        if !shape.head_dim.is_multiple_of(8) || shape.head_dim > 256 {
            return refuse(format!("a head of {} numbers (multiples of 8 up to 256 have)", shape.head_dim));
        }
        if shape.group() > 8 {
            return refuse(format!("a KV head for {} query heads (up to 8 have)", shape.group()));
        }
        if let CacheSpec::Latent(_) = spec {
            return Self::of_latents(device, spec, shape, layers, arithmetic, resources);
        }
        let none = Retention { rule: RetentionRule::MostDistinct, gamma: 0.0, joint: false };
        let evicting = Evicting::of(spec);
        let (kind, t, retention) = match spec {
            CacheSpec::Full(_) | CacheSpec::Rtn(_) | CacheSpec::Kivi(_) => (-1, 0.0, None),
            CacheSpec::MiniCache(s) => (0, s.t, Some(&s.retention)),
            CacheSpec::Mean(_) => (1, 0.0, None),
            CacheSpec::MaxNorm(_) => (2, 0.0, None),
            CacheSpec::RankOne(s) => (3, 0.0, Some(&s.retention)),
            _ if evicting.is_some() => (-1, 0.0, None),
            other => return refuse(format!("the method `{}`", other.name())),
        };
        let pairing = spec.pairing().unwrap_or_default();
        if pairing.key_space == KeySpace::PreRope {
            return refuse("key_space = \"pre_rope\"".into());
        }
        if kind >= 0 && pairing.residual > 0 {
            return refuse("a window of newest tokens that are not merged yet (residual)".into());
        }
        if kind >= 0 && spec.quantisation().is_some_and(|q| q.retained) {
            return refuse("quantised retained tokens (quant.retained)".into());
        }
        let keeps = retention.is_some() || pairing.sinks > 0;
        let rule = match retention.map(|r| r.rule) {
            Some(RetentionRule::MostDistinct) => 0,
            Some(RetentionRule::AsPrinted) => 1,
            Some(RetentionRule::TopFraction) => 2,
            None => NO_RULE,
        };
        let retention = retention.unwrap_or(&none);
        let columns = if pairing.granularity == Granularity::Head { shape.kv_heads } else { 1 };
        let merged = spec.merged_pairs(shape.layers);
        let mut sides = Vec::new();
        for (keys, (scheme, pairs)) in [true, false].into_iter().zip(spec.schemes().into_iter().zip(&merged))
        {
            let kind_of = match scheme {
                Scheme::F16 => Kind::Floats(StoreType::F16),
                Scheme::F32 => Kind::Floats(StoreType::F32),
                Scheme::Quant { bits, group, axis, residual } => {
                    let along = axis == Axis::Channel;
                    if along && !TILE.is_multiple_of(group) {
                        return refuse(format!("groups of {group} tokens (those that divide {TILE} have)"));
                    }
                    Kind::Codes { bits: usize::from(bits), run: group, along, residual }
                }
                other => return refuse(format!("{other:?}")),
            };
            let mut places = vec![Place { store: -1, pair: -1, member: 0 }; shape.layers];
            let pairs: Vec<_> =
                pairs.iter().filter(|(a, b)| layers.contains(a) || layers.contains(b)).collect();
            for (pair, &&(a, b)) in pairs.iter().enumerate() {
                if !(layers.contains(&a) && layers.contains(&b)) {
                    return Err(Error::Unsupported(format!(
                        "layers {a} and {b} are merged and lie on two devices; start_layer of the other parity helps"
                    )));
                }
                for (member, layer) in [a, b].into_iter().enumerate() {
                    places[layer] = Place { store: pair as i32, pair: pair as i32, member: member as i32 };
                }
            }
            let mut stores = pairs.len();
            for place in places[layers.clone()].iter_mut().filter(|p| p.pair < 0) {
                place.store = stores as i32;
                stores += 1;
            }
            let side = if keys { minicache_core::Side::Keys } else { minicache_core::Side::Values };
            let store = Store::new(shape.kv_heads, shape.head_dim, scheme, side).with_waiting(spec.dtype());
            let exact = if spec.dtype() == StoreType::F32 { Scheme::F32 } else { Scheme::F16 };
            let kept = Store::new(shape.kv_heads / columns, shape.head_dim, exact, side).with_blocks(RECENT);
            sides.push(Side {
                kind: kind_of,
                block: store.block_layout(),
                held: Held::Stores(store.count()),
                kept_count: kept.count(),
                exact: spec.dtype(),
                magnitude: pairing.magnitudes,
                columns,
                places,
                stores,
                pairs: pairs.len(),
                has_magnitudes: kind >= 0 && kind != 1 && !pairs.is_empty(),
                keeps: keeps && !pairs.is_empty(),
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                keys,
            });
        }
        let Ok(sides) = <[Side; 2]>::try_from(sides) else { unreachable!("keys and values") };
        let merging = Merging {
            kind,
            t,
            rule,
            gamma: retention.gamma as f32,
            joint: retention.joint,
            sinks: pairing.sinks,
        };
        let Arithmetic { act, precise } = arithmetic;
        let (latents, spec) = (None, spec.clone());
        let kernels = OnceLock::new();
        Ok(Self { shape: *shape, layers, sides, merging, evicting, act, precise, latents, spec, kernels })
    }

    /// Latents of a plan that `resources` have.
    fn of_latents(
        device: &Device,
        spec: &CacheSpec,
        shape: &ModelShape,
        layers: Range<usize>,
        arithmetic: Arithmetic,
        resources: &Resources,
    ) -> Result<Self> {
        let plan = resources.latent_plan().map_err(Error::Core)?;
        if [&plan.spec().k, &plan.spec().v].iter().any(|side| side.residual_bits.is_some()) {
            return refuse("a window of newest tokens in eight bits (residual_bits)".into());
        }
        let latents = device.latents(plan, &layers)?;
        let count = layers.len();
        let side = |side: usize| {
            let groups = &latents.groups[side];
            let held = crate::held::Latents::new(groups, latents.sinks, latents.residual);
            let store = &groups[0].sets[0].store;
            Side {
                kind: Kind::Latents {
                    sinks: latents.sinks,
                    residual: latents.residual,
                    block_bytes: latents.block_bytes[side],
                    sink_tokens: groups[0].sink_tokens,
                },
                block: store.block_layout(),
                held: Held::Latents(held),
                kept_count: store.count(),
                exact: latents.exact,
                magnitude: latents.exact,
                columns: 1,
                places: Vec::new(),
                stores: count,
                pairs: 0,
                has_magnitudes: false,
                keeps: false,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                keys: side == 0,
            }
        };
        let sides = [0, 1].map(side);
        let merging = Merging { kind: -1, t: 0.0, rule: NO_RULE, gamma: 0.0, joint: false, sinks: 0 };
        let Arithmetic { act, precise } = arithmetic;
        let (latents, spec) = (Some(latents), spec.clone());
        let (evicting, kernels) = (None, OnceLock::new());
        Ok(Self { shape: *shape, layers, sides, merging, evicting, act, precise, latents, spec, kernels })
    }

    /// The type of states that are not codes.
    pub(crate) fn exact(&self) -> StoreType {
        self.sides[0].exact
    }

    /// The files of its kernels.
    pub(crate) fn files(&self) -> &'static [File] {
        match (&self.latents, &self.evicting) {
            (Some(_), _) => &[File::Latent, File::Prefill, File::LatentStore],
            (None, None) => &[File::Attention, File::Prefill, File::Store],
            (None, Some(Evicting::Expected { .. })) => {
                &[File::Attention, File::Prefill, File::Slots, File::Evict, File::Expect]
            }
            (None, Some(_)) => &[File::Attention, File::Prefill, File::Slots, File::Evict],
        }
    }

    /// Numbers of a part of attention: largest score, sum, and what is weighed.
    pub(crate) fn part_numbers(&self) -> usize {
        2 + self.shape.head_dim + self.latents.as_ref().map_or(0, |latents| 1 + latents.ranks[1])
    }

    /// Blocks of attention that share a KV head, so that none has more query heads than registers have room for.
    pub(crate) fn passes(&self) -> usize {
        let group = self.shape.group();
        if let Some(latents) = &self.latents {
            return latents.passes;
        }
        let most = if self.sides.iter().any(Side::is_packed) { 2 } else { 4 };
        (1..=group).find(|passes| group.is_multiple_of(*passes) && group / passes <= most).unwrap_or(group)
    }

    /// The kernels of caches.
    pub(crate) fn source(&self, file: File) -> Source {
        let shape = &self.shape;
        let mut macros = vec![
            ("DIM", shape.head_dim as i64),
            ("KV_HEADS", shape.kv_heads as i64),
            ("GROUP", shape.group() as i64),
            ("PASSES", self.passes() as i64),
            ("DIGITS", if self.spec.activation_bits() == Some(8) { 1 } else { 2 }),
            ("BFLOAT", i64::from(self.act == Act::Bf16)),
        ];
        match (file, &self.latents) {
            (File::Prefill, _) => {
                macros.retain(|(name, _)| *name != "PASSES" && *name != "DIGITS");
                macros.push(("PRECISE", i64::from(self.precise)));
                macros.push(("PART", self.part_numbers() as i64));
            }
            (_, Some(latents)) => macros.extend(latents.macros()),
            (_, None) => macros.extend(self.sides.iter().flat_map(Side::macros)),
        }
        Source { file, macros, threads: THREADS }
    }

    /// First position that any layer's query at position `len` sees.
    pub(crate) fn first_seen(&self, len: usize) -> usize {
        self.layers.clone().map(|layer| self.shape.first_seen(layer, len)).min().unwrap_or(0)
    }
}
