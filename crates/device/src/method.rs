//! What a method stores, as the kernels have to know it.

use std::ops::Range;

use minicache_core::settings::{
    Axis, Granularity, KeySpace, ModelShape, Retention, RetentionRule, StoreType,
};
use minicache_core::{BlockLayout, CacheSpec, Scheme, Store};

use crate::driver::Act;
use crate::evicting::Evicting;
use crate::kernels::{File, Source};
use crate::{Error, Result};

/// Threads of a block of the kernels of caches: eight warps.
const THREADS: u32 = 256;

/// Tokens that attention reads at a time: sixteen strips of 16.
pub(crate) const TILE: usize = 256;

/// Tokens of a block of those that wait, and of kept ones.
pub(crate) const RECENT: usize = 16;

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
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Side {
    kind: Kind,
    /// The host's.
    block: BlockLayout,
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
#[derive(Debug, Clone, PartialEq)]
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
}

impl Side {
    /// Tokens of a block.
    pub(crate) fn slots(&self) -> usize {
        self.block.tokens
    }

    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.kind, Kind::Codes { .. })
    }

    /// How many of `len` tokens are in blocks.
    pub(crate) fn packed(&self, len: usize) -> usize {
        match self.kind {
            Kind::Floats(_) => len,
            Kind::Codes { residual, run, along: true, .. } => len.saturating_sub(residual) / run * run,
            Kind::Codes { residual, .. } => len.saturating_sub(residual),
        }
    }

    /// Bytes of a block of all stores, and of the scales in it.
    pub(crate) fn block_bytes(&self) -> (usize, usize) {
        let heads = self.stores * self.kv_heads;
        (heads * self.block.head_bytes, heads * self.block.scale_bytes)
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

impl Method {
    /// What `spec` stores of the layers `layers` of a model of `shape`.
    ///
    /// # Errors
    /// Methods and settings that have no kernels, by name; a pair of which `layers` has one.
    pub(crate) fn new(
        spec: &CacheSpec,
        shape: &ModelShape,
        layers: Range<usize>,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let refuse = |what: String| Err(Error::Unsupported(format!("{what} has no kernels for a device")));
        if !shape.head_dim.is_multiple_of(8) || shape.head_dim > 256 {
            return refuse(format!("a head of {} numbers (multiples of 8 up to 256 have)", shape.head_dim));
        }
        if shape.group() > 8 {
            return refuse(format!("a KV head for {} query heads (up to 8 have)", shape.group()));
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
            sides.push(Side {
                kind: kind_of,
                block: Store::new(shape.kv_heads, shape.head_dim, scheme, side).block_layout(),
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
        Ok(Self { shape: *shape, layers, sides, merging, evicting, act, precise })
    }

    /// The type of states that are not codes.
    pub(crate) fn exact(&self) -> StoreType {
        self.sides[0].exact
    }

    /// The files of kernels that it needs.
    pub(crate) fn files(&self) -> &'static [File] {
        match self.evicting {
            Some(Evicting::Expected { .. }) => {
                &[File::Attention, File::Store, File::Slots, File::Evict, File::Expect]
            }
            Some(_) => &[File::Attention, File::Store, File::Slots, File::Evict],
            None => &[File::Attention, File::Store],
        }
    }

    /// Blocks of attention that share a KV head, so that none has more query heads than registers have room for.
    pub(crate) fn passes(&self) -> usize {
        let group = self.shape.group();
        let most = if self.sides.iter().any(Side::is_packed) { 2 } else { 4 };
        (1..=group).find(|passes| group.is_multiple_of(*passes) && group / passes <= most).unwrap_or(group)
    }

    /// The kernels of caches.
    pub(crate) fn source(&self, file: File) -> Source {
        let mut macros = vec![
            ("DIM", self.shape.head_dim as i64),
            ("KV_HEADS", self.shape.kv_heads as i64),
            ("GROUP", self.shape.group() as i64),
            ("PASSES", self.passes() as i64),
            ("BFLOAT", i64::from(self.act == Act::Bf16)),
            ("PRECISE", i64::from(self.precise)),
        ];
        macros.extend(self.sides.iter().flat_map(Side::macros));
        Source { file, macros, threads: THREADS }
    }

    /// First position that any layer's next query sees, whole tiles of attention.
    pub(crate) fn first_needed(&self, len: usize) -> usize {
        let first = self.layers.clone().map(|layer| self.shape.first_seen(layer, len)).min();
        first.unwrap_or(0) / TILE * TILE
    }
}
