//! Merge, pack, score and sum over stores that do not fit the caches, one call per KV head and layer as decoding does.
//!
//! Throughput is in bytes of the store, to be held against the bandwidth that is printed first.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use minicache_core::kernels::{Isa, with_isa};
use minicache_core::settings::Axis;
use minicache_core::{
    CacheSpec, LayerSimilarity, ModelShape, Precision, Resources, Scheme, Side, Store, Synthetic, build,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

const TOKENS: usize = 4096;

/// A model's attention: what one decode step reads.
struct Model {
    name: &'static str,
    layers: usize,
    heads: usize,
    dim: usize,
    /// Query heads per KV head.
    rows: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "smollm2-135m", layers: 30, heads: 3, dim: 64, rows: 3 },
    Model { name: "llama-2-7b, 8 layers", layers: 8, heads: 32, dim: 128, rows: 1 },
];

fn quant(bits: u8, group: usize, axis: Axis) -> Scheme {
    Scheme::Quant { bits, group, axis, residual: 32 }
}

/// Name, keys, values.
fn schemes() -> Vec<(String, Scheme, Scheme)> {
    let mut all =
        vec![("f32".to_string(), Scheme::F32, Scheme::F32), ("f16".to_string(), Scheme::F16, Scheme::F16)];
    for (bits, group) in [(4, 32), (4, 128), (3, 32), (2, 32)] {
        let (keys, values) = (quant(bits, group, Axis::Channel), quant(bits, group, Axis::Token));
        all.push((format!("kivi-{bits} g{group}"), keys, values));
    }
    all.push(("rtn-8 g32".to_string(), quant(8, 32, Axis::Token), quant(8, 32, Axis::Token)));
    all
}

fn random(n: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(1);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn filled(model: &Model, tokens: usize, scheme: Scheme, side: Side) -> Store {
    let mut store = Store::new(model.heads, model.dim, scheme, side).with_precision(Precision::Fast);
    let rows = random(model.heads * model.dim * 128);
    (0..tokens / 128).for_each(|_| store.push(&rows));
    store
}

fn decode(c: &mut Criterion) {
    for model in MODELS {
        let mut group = c.benchmark_group(format!("decode step at {TOKENS}, {}", model.name));
        group.sample_size(20);
        for (name, keys, values) in schemes() {
            let layers: Vec<_> = (0..model.layers)
                .into_par_iter()
                .map(|_| {
                    let keys = filled(&model, TOKENS, keys, Side::Keys);
                    (keys, filled(&model, TOKENS, values, Side::Values))
                })
                .collect();
            let bytes: usize = layers.iter().map(|(k, v)| k.bytes().total() + v.bytes().total()).sum();
            let q = random(model.rows * model.dim);
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| {
                    for (keys, values) in &layers {
                        (0..model.heads).into_par_iter().for_each_init(
                            || (vec![0.0; model.rows * TOKENS], vec![0.0; model.rows * model.dim]),
                            |(scores, sums), head| {
                                keys.scores(head, 0..TOKENS, &q, model.rows, scores);
                                values.accumulate(head, 0..TOKENS, scores, model.rows, sums);
                                black_box(&sums);
                            },
                        );
                    }
                });
            });
        }
        group.finish();
    }
}

/// One head within the second-level cache: the arithmetic of each instruction set, without the memory.
fn arithmetic(c: &mut Criterion) {
    const NEAR: usize = 1024;
    let mut group = c.benchmark_group(format!("{NEAR} tokens in cache"));
    for (dim, rows) in [(128, 1), (64, 3)] {
        let model = Model { name: "", layers: 1, heads: 1, dim, rows };
        for (name, keys, values) in schemes() {
            let keys = filled(&model, NEAR, keys, Side::Keys);
            let values = filled(&model, NEAR, values, Side::Values);
            for isa in Isa::available() {
                if isa == Isa::SCALAR && !name.starts_with('f') {
                    continue; // What the others are tested against, an order of magnitude slower.
                }
                let id = BenchmarkId::new(format!("dim {dim}, {rows} rows, {}", isa.name()), &name);
                group.bench_function(id, |b| {
                    let q = random(rows * dim);
                    let (mut scores, mut sums) = (vec![0.0; rows * NEAR], vec![0.0; rows * dim]);
                    with_isa(isa, || {
                        b.iter(|| {
                            keys.scores(0, 0..NEAR, &q, rows, &mut scores);
                            values.accumulate(0, 0..NEAR, &scores, rows, &mut sums);
                        });
                    });
                });
            }
        }
    }
    group.finish();
}

fn pack(c: &mut Criterion) {
    let model = &MODELS[0];
    let mut group = c.benchmark_group("push 128 tokens, 3 heads of 64");
    let rows = random(model.heads * model.dim * 128);
    group.throughput(Throughput::Elements(rows.len() as u64));
    for (name, keys, values) in schemes() {
        for (side, scheme) in [(Side::Keys, keys), (Side::Values, values)] {
            group.bench_function(BenchmarkId::new(&name, format!("{side:?}")), |b| {
                b.iter(|| {
                    let mut store = Store::new(model.heads, model.dim, scheme, side);
                    store.push(&rows);
                    store
                });
            });
        }
    }
    group.finish();
}

/// Latents of one head within the second-level cache, in codes of uniform steps and of a trellis: packing them, and what
/// 3 query heads read of them.
fn latents(c: &mut Criterion) {
    const NEAR: usize = 1024;
    const NUMBERS: usize = 128;
    const ROWS: usize = 3;
    let rows = random(NUMBERS * NEAR);
    type New = fn(&[(u8, usize)], Side) -> Store;
    let kinds: [(&str, New, &[u8]); 2] =
        [("uniform", Store::sections, &[2, 3]), ("trellis", Store::trellis, &[1, 2, 3])];
    let mut group = c.benchmark_group(format!("{NEAR} latents of {NUMBERS} numbers"));
    group.throughput(Throughput::Elements(NEAR as u64));
    for (kind, store, bits) in kinds {
        for &bits in bits {
            let empty = |side| store(&[(bits, NUMBERS)], side).with_precision(Precision::Fast);
            group.bench_function(BenchmarkId::new(format!("push, {kind}"), bits), |b| {
                b.iter_batched_ref(|| empty(Side::Values), |store| store.push(&rows), BatchSize::SmallInput);
            });
            let [keys, values] = [Side::Keys, Side::Values].map(|side| {
                let mut store = empty(side);
                store.push(&rows);
                store
            });
            for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::SCALAR) {
                let id = |what: &str| BenchmarkId::new(format!("{what}, {kind}, {}", isa.name()), bits);
                let q = random(ROWS * NUMBERS);
                let (mut scores, mut sums) = (random(ROWS * NEAR), vec![0.0; ROWS * NUMBERS]);
                group.bench_function(id("scores"), |b| {
                    with_isa(isa, || b.iter(|| keys.scores(0, 0..NEAR, &q, ROWS, &mut scores)));
                });
                group.bench_function(id("sums"), |b| {
                    with_isa(isa, || b.iter(|| values.accumulate(0, 0..NEAR, &scores, ROWS, &mut sums)));
                });
            }
        }
    }
    group.finish();
}

/// Merging a prompt, and decoding after it, in a pair of layers: what `minicache` adds to what its stores do.
fn merge(c: &mut Criterion) {
    const PROMPT: usize = 1024;
    for model in MODELS {
        let (kv_heads, head_dim, heads) = (model.heads, model.dim, model.heads * model.rows);
        let shape = ModelShape { layers: 2, heads, kv_heads, head_dim, scale: 0.1, ..ModelShape::PLAIN };
        let states = Synthetic::new(&shape, PROMPT + 1, LayerSimilarity::default(), 0);
        let mut prompt = Vec::new();
        let keep = |_, k: &[f32], v: &[f32]| {
            prompt.push((k.to_vec(), v.to_vec()));
            Ok(())
        };
        states.states(0..PROMPT, keep).expect("nothing fails");
        let mut group = c.benchmark_group(format!("a pair of layers, {}", model.name));
        group.sample_size(20);
        for name in ["full", "minicache", "minicache-4"] {
            let spec = CacheSpec::parse(name).expect("a method's name");
            let filled = || {
                let mut cache = build(&spec, &shape, &Resources::default()).expect("it fits the shape");
                for (layer, (k, v)) in prompt.iter().enumerate() {
                    cache.append(layer, k, v).expect("states are finite");
                }
                cache.finish_step().expect("states can be stored");
                cache
            };
            group.throughput(Throughput::Elements((2 * PROMPT) as u64));
            group
                .bench_function(BenchmarkId::new(format!("store {PROMPT} tokens"), name), |b| b.iter(filled));
            let cache = filled();
            let (q, kv) = (random(heads * head_dim), random(kv_heads * head_dim));
            let mut out = vec![0.0; heads * head_dim];
            group.throughput(Throughput::Elements(2));
            group.bench_function(BenchmarkId::new(format!("one token after {PROMPT}"), name), |b| {
                // A copy shares what it does not write, and the sequence does not grow with the iterations.
                b.iter_batched_ref(
                    || cache.fork(),
                    |cache| {
                        for layer in 0..2 {
                            cache.attend_into(layer, &q, &kv, &kv, &mut out).expect("states are finite");
                        }
                    },
                    BatchSize::SmallInput,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(benches, decode, arithmetic, pack, latents, merge);
criterion_main!(benches);
