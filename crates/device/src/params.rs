//! What kernels take, as they lay it out: the structures of `cuda/*.cu`, in the same order. Padding is spelled out.

use crate::Result;
use crate::driver::{Address, Driver, Kernel, Plain, bytes_of};
use crate::method::Place;
use crate::part::Tables;

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            #[repr(C)]
            pub(crate) struct $name {
                $(pub(crate) $field: $type,)*
            }
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*, "padding");
            // SAFETY: numbers in `repr(C)` without padding, as just asserted.
            unsafe impl Plain for $name {}
        )*
    };
}

params! {
    /// `embed`
    EmbedParams { ids: Address, table: Address, low: Address, out: Address, rows: i32, width: i32, }
    /// `rms_norm`
    NormParams {
        x: Address, bias: Address, weight: Address, out: Address, low: Address, index: Address,
        rows: i32, width: i32, eps: f32, pad: i32,
    }
    /// `rotate`
    RotateParams {
        qkv: Address, bias: Address, angles: Address, query_norm: Address, key_norm: Address,
        q: Address, k: Address, v: Address,
        rows: i32, heads: i32, kv_heads: i32, dim: i32, rotary: i32, eps: f32,
    }
    /// `swiglu`
    SwiGluParams { wide: Address, bias: Address, out: Address, low: Address, rows: i32, inner: i32, }
    /// `gather`
    GatherParams { x: Address, index: Address, out: Address, rows: i32, width: i32, }
    /// `scatter_add`
    ScatterParams { x: Address, index: Address, weights: Address, out: Address, rows: i32, width: i32, }
    /// `noise`
    NoiseParams { out: Address, count: u64, seed: u32, size: f32, wide: i32, pad: i32, }
    /// `best`
    BestParams { x: Address, out: Address, rows: i32, width: i32, }
    /// `score`
    ScoreParams { x: Address, pairs: Address, out: Address, rows: i32, width: i32, }
    /// `attend_held`
    HeldParams {
        q: Address, sequences: Address, rows: Address, parts: Address, places: [Place; 2],
        splits: i32, length: i32, window: i32, scale: f32, softcap: f32, pad: i32,
    }
    /// `attend_step`
    StepParams {
        q: Address, k: Address, v: Address, sequences: Address, tiles: Address, parts: Address,
        splits: i32, window: i32, scale: f32, softcap: f32,
    }
    /// `join`
    JoinParams {
        parts: Address, q: Address, k: Address, v: Address, sequences: Address, rows: Address, out: Address, low: Address,
        splits: i32, scale: f32, softcap: f32, pad: i32,
    }
    /// `merge`
    MergeParams {
        a: Address, b: Address, shared: Address, sizes: Address, distances: Address, apart: Address,
        rows: i32, columns: i32, kind: i32, pad: i32, t: f64,
    }
    /// `retain`
    RetainParams {
        sequences: Address, distances: [Address; 2], apart: [Address; 2], index: [Address; 2],
        pairs: [i32; 2], rows: i32, sinks: i32, joint: i32, rule: [i32; 2], gamma: [f32; 2], pad: i32,
    }
    /// `settle`
    SettleParams {
        sequences: Address, rows: Address, a: Address, b: Address, shared: Address, sizes: Address, index: Address,
        side: i32, pair: i32, row_count: i32, pad: i32,
    }
    /// `forget`
    ForgetParams { sequence: Address, out: Address, side: i32, columns: i32, position: i32, how: i32, }
    /// `keep`
    KeepParams { sequences: Address, rows: Address, states: [Address; 2], stores: [i32; 2], }
    /// `pack`
    PackParams { sequences: Address, tasks: Address, states: Address, side: i32, store: i32, }
    /// `restore`
    RestoreParams { sequence: Address, out: [Address; 2], places: [Place; 2], first: i32, pad: i32, }
    /// Where a layer's slots are.
    SlotPlace { table: i32, layer: i32, counts: i32, remembers: i32, }
    /// `attend_slots`
    SlotsParams {
        q: Address, sequences: Address, rows: Address, parts: Address, scores: Address, place: SlotPlace,
        splits: i32, length: i32, window: i32, stride: i32, scale: f32, softcap: f32,
    }
    /// `weigh` and `receive`
    ReceiveParams {
        q: Address, k: Address, sequences: Address, rankings: Address, tiles: Address, sums: Address,
        received: Address, place: SlotPlace,
        window: i32, total: i32, saved: i32, scale: f32, softcap: f32, pad: i32,
    }
    /// `keep_slots` and `move_slots`
    KeepSlotsParams {
        q: Address, k: Address, v: Address, sequences: Address, rankings: Address, scores: Address,
        received: Address, ranked: Address, sources: Address, movers: Address, kept: Address, place: SlotPlace,
        window: i32, total: i32, stride: i32, saved: i32, kernel: i32, scale: f32, softcap: f32, pad: i32,
    }
    /// `expect_mean`, `expect_spread`, `expect_logits` and `expect`
    ExpectParams {
        q: Address, k: Address, v: Address, sequences: Address, rankings: Address, prompts: Address,
        angles: Address, averages: Address, means: Address, spreads: Address, logits: Address, received: Address,
        sinks: i32, rotary: i32, total: i32, scale: f32,
    }
    /// What a sequence drops in a step.
    RankingEntry { from: i32, to: i32, most: i32, counted: i32, offset: i32, expected: i32, }
    /// A sequence of a step.
    SequenceEntry { tables: Tables, len: i32, first: i32, rows: i32, pad: i32, }
    /// A row of a step: its sequence and its position; or a tile of rows of a prefill: its sequence and first row.
    RowEntry { sequence: i32, position: i32, }
    /// Tokens that are packed together.
    TaskEntry { sequence: i32, first: i32, count: i32, row: i32, }
    /// Components of latents that share a scale.
    #[derive(Default)]
    SectionEntry {
        first: i32, size: i32, bits: i32, codes: i32, alike: i32, trellis: i32, unit: f32, middle: f32,
    }
    /// Components of latents of values that lie side by side.
    StripEntry { section: i32, first: i32, width: i32, codes: i32, }
    /// KV heads of a group of layers that share latents.
    SetEntry {
        mean: Address, encode: Address, restore: Address, sections: Address, strips: Address,
        rank: i32, section_count: i32, strip_count: i32, at: i32, scales_at: i32, layers: i32, head: i32, heads: i32,
    }
    /// `map_queries`
    MapParams { q: Address, out: Address, sets: Address, layer: i32, scale: f32, }
    /// `attend_latents`
    LatentParams {
        q: Address, sequences: Address, rows: Address, parts: Address, sets: [Address; 2], phases: Address, levels: Address,
        layer: i32, splits: i32, length: i32, window: i32, softcap: f32, pad: i32,
    }
    /// `join_latents`
    JoinLatentsParams {
        parts: Address, q: Address, k: Address, v: Address, sequences: Address, rows: Address, out: Address, low: Address,
        sets: Address, layer: i32, splits: i32, scale: f32, softcap: f32,
    }
    /// `keep_exact`
    KeepExactParams { sequences: Address, rows: Address, states: [Address; 2], layer: i32, pad: i32, }
    /// `encode`
    EncodeParams {
        sequences: Address, tasks: Address, states: Address, sets: Address, phases: Address, out: Address,
        side: i32, rows: i32, latents: i32, layer: i32,
    }
    /// `write_latents`
    WriteLatentsParams {
        sequences: Address, tasks: Address, sets: Address, z: Address, levels: Address, side: i32, latents: i32,
    }
    /// `restore_latents`
    RestoreLatentsParams {
        sequence: Address, out: [Address; 2], sets: [Address; 2], phases: Address, levels: Address,
        layers: [i32; 2], layer: i32, first: i32,
    }
}

/// Runs a kernel on `grid` blocks.
///
/// # Errors
/// Of the device.
///
/// # Safety
/// `params` is what the kernel takes, and what it points to is as large as the kernel expects.
pub(crate) unsafe fn launch<T: Plain>(
    driver: &dyn Driver,
    kernel: &Kernel,
    grid: [u32; 3],
    params: &T,
) -> Result<()> {
    if grid.contains(&0) {
        return Ok(());
    }
    // SAFETY: the caller's.
    unsafe { driver.launch(kernel, grid, bytes_of(std::slice::from_ref(params))) }
}
