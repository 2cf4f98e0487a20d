//! What a whole cache says it holds is what the allocator gave it, and what the accounting says without building it.
//!
//! One test: the allocator is the process's, so nothing may run beside it.
#![allow(clippy::unwrap_used)]

#[path = "caches/latent.rs"]
mod latent;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use minicache_core::{
    CacheSpec, KvCache, LayerSimilarity, ModelShape, Resources, Synthetic, build, footprint,
};

/// Counts what the process holds.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; the counter is an atomic number.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SPECS: [&str; 26] = [
    "full",
    "{ method = \"full\", dtype = \"f32\" }",
    "mean",
    "max_norm",
    "minicache",
    "{ method = \"minicache\", start_layer = 0, granularity = \"head\" }",
    "{ method = \"minicache\", start_layer = 0, retention = { rule = \"top_fraction\", gamma = 0.1 } }",
    "{ method = \"minicache\", merge = \"values\", quant = { bits = 4, group = 128, retained = true } }",
    "{ method = \"minicache\", start_layer = 1, quant = { bits = 3, group = 64 } }",
    "{ method = \"minicache\", residual = 40, quant = { bits = 4, residual = 0 } }",
    "{ method = \"minicache\", pairs = { keys = [0, 2], values = [1] }, quant = { bits = 4 } }",
    "kivi-2",
    "kivi-4",
    "rtn-3",
    "smoothquant",
    "rank_one",
    "fp8",
    "{ method = \"rotated\", quant = { bits = 3, residual = 20 } }",
    "turboquant",
    "{ method = \"turboquant\", bits = 3, inner_product = true }",
    "h2o",
    "{ method = \"sinks\", recent = 100 }",
    "snapkv",
    "expected_attention",
    "{ method = \"xkv\", rank_k = 16, rank_v = 24 }",
    "{ method = \"xkv\", group = 3, rank_k = 8, rank_v = 1.0 }",
];

const LATENTS: [&str; 4] = [
    "{ method = \"latent\", k = { group = 4, bits = 4 }, v = { group = 4, bits = 3 } }",
    "{ method = \"latent\", k = { group = 4, rate = 2.0 }, v = { group = 4, rate = 3.0 }, residual = 32 }",
    "{ method = \"latent\", residual = 32, k = { group = 4, rate = 2.0 }, v = { residual_bits = 8 } }",
    "{ method = \"latent\", k = { group = 4, bits = 16 }, v = { group = 4, axis = \"channel\", bits = 2 } }",
];

const PROMPT: usize = 1000;
const DECODED: usize = 60;

/// Bytes that go with the cache: what working memory the thread keeps is not its.
fn freed_with(cache: Box<dyn KvCache>) -> usize {
    let before = HELD.load(Relaxed);
    drop(cache);
    before - HELD.load(Relaxed)
}

fn check(text: &str, shape: &ModelShape, resources: &Resources) {
    let states = Synthetic::new(shape, PROMPT + DECODED, LayerSimilarity::default(), 0);
    let spec = CacheSpec::parse(text).unwrap();
    let empty = || build(&spec, shape, resources).unwrap();
    // Stores without tokens: a few hundred bytes each.
    let fixed = freed_with(empty());

    let mut cache = empty();
    states.fill(&mut *cache, 0..PROMPT, PROMPT).unwrap();
    let said = footprint(&spec, shape, resources, PROMPT, LayerSimilarity::default()).unwrap().total();
    let held = freed_with(cache);
    // Pairs differ by how many of their tokens are outliers.
    assert!((said + fixed).abs_diff(held) * 50 <= held, "{text} in {shape:?}: {said} accounted, {held} held");

    let mut cache = empty();
    states.fill(&mut *cache, 0..PROMPT, PROMPT).unwrap();
    let mut out = vec![0.0; shape.heads * shape.head_dim];
    for token in PROMPT..PROMPT + DECODED {
        let attend = |layer: usize, k: &[f32], v: &[f32]| {
            cache.attend_into(layer, &states.queries(layer, token, 1), k, v, &mut out)
        };
        states.states(token..token + 1, attend).unwrap();
        cache.finish_step().unwrap();
    }
    let counted = cache.footprint().total();
    let held = freed_with(cache);
    assert!(
        (counted + fixed).abs_diff(held) * 100 <= held,
        "{text} in {shape:?}: {counted} counted, {held} held, {fixed} of them without tokens"
    );
}

#[test]
fn footprints_are_what_the_allocator_gave() {
    // One thread, so that working memory is warm wherever work is done.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        for (kv_heads, group, head_dim, window) in
            [(3, 3, 64, None), (8, 1, 128, None), (2, 2, 80, None), (4, 2, 96, Some(500))]
        {
            let heads = kv_heads * group;
            let shape =
                ModelShape { layers: 4, heads, kv_heads, head_dim, window, scale: 0.1, ..ModelShape::PLAIN };
            for text in SPECS {
                check(text, &shape, &Resources::default());
            }
        }
        // The random basis is made by a cubic process, so small.
        for (kv_heads, head_dim, window) in [(2, 32, None), (1, 64, None), (2, 32, Some(500))] {
            let shape = ModelShape {
                layers: 4,
                heads: 4,
                kv_heads,
                head_dim,
                window,
                scale: 0.1,
                ..ModelShape::PLAIN
            };
            for text in LATENTS {
                let latent = Some(latent::plan(text, &shape));
                check(text, &shape, &Resources { latent, rotary: None });
            }
        }
    });
}
