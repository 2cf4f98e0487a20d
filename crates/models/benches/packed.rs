//! The linear layers of SmolLM2-135M (Q4_1 with a Q8_0 output layer) by number of rows, and one of its layers
//! against candle's quantised and dense products. Throughput: multiplications and additions per second
//! (elements), or, for one row of the whole model, bytes of weights per second.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use minicache_models::packed::{Activations, InstructionSet, PackedMatrix};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCABULARY: usize = 49152;
/// (out, in) of q k v, o, gate up, down: fused as a decoder would.
const SHAPES: [(usize, usize); 4] =
    [(960, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)];

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn tensor(rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(noise(rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn quantised(dtype: GgmlDType, out: usize, inp: usize) -> QTensor {
    QTensor::quantize(&tensor(out, inp), dtype).unwrap()
}

/// Every weight of the model in its own memory, as in a real decode: one layer alone would stay in the cache.
fn model() -> Vec<PackedMatrix> {
    let pack = |dtype, out, inp| PackedMatrix::from_qtensor(&quantised(dtype, out, inp)).unwrap().unwrap();
    let layer = SHAPES.map(|(out, inp)| pack(GgmlDType::Q4_1, out, inp));
    let mut all: Vec<PackedMatrix> = (0..LAYERS).flat_map(|_| layer.clone()).collect();
    all.push(pack(GgmlDType::Q8_0, VOCABULARY, HIDDEN));
    all
}

fn operations(matrices: &[PackedMatrix], rows: usize) -> u64 {
    2 * matrices.iter().map(|m| (m.in_features() * m.out_features() * rows) as u64).sum::<u64>()
}

fn steps(c: &mut Criterion) {
    let model = model();
    let mut group = c.benchmark_group("model");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for rows in [1, 2, 4, 8, 16, 64, 512] {
        // A prefill needs the logits of one row only.
        let matrices = if rows == 512 { &model[..model.len() - 1] } else { &model[..] };
        let x = noise(rows * INTERMEDIATE);
        let mut out = vec![0.0; rows * matrices.iter().map(PackedMatrix::out_features).max().unwrap()];
        let bytes = matrices.iter().map(|m| m.bytes() as u64).sum();
        group.throughput(if rows == 1 {
            Throughput::Bytes(bytes)
        } else {
            Throughput::Elements(operations(matrices, rows))
        });
        let mut activations = Activations::default();
        group.bench_function(BenchmarkId::new("packed", rows), |b| {
            // Inside the pool, as a forward step should be.
            rayon::scope(|_| {
                b.iter(|| {
                    for m in matrices {
                        activations.assign(&x[..rows * m.in_features()], rows, m.in_features());
                        m.matmul_quantized(&activations, &mut out[..rows * m.out_features()]);
                    }
                    black_box(out[0])
                });
            });
        });
    }
    group.finish();
}

fn against_candle(c: &mut Criterion) {
    // gate and up
    let (out, inp) = SHAPES[2];
    let dense = tensor(out, inp).t().unwrap().contiguous().unwrap();
    for rows in [1, 16, 512] {
        let mut group = c.benchmark_group(format!("{rows}x{inp}x{out}"));
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements((2 * rows * out * inp) as u64));
        let x = tensor(rows, inp);
        let flat = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut y = vec![0.0; rows * out];
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let q = quantised(dtype, out, inp);
            let packed = PackedMatrix::from_qtensor(&q).unwrap().unwrap();
            for set in InstructionSet::available() {
                if *set == InstructionSet::Scalar && rows > 1 {
                    continue; // What the others are tested against: a minute for what they do in a blink.
                }
                group.bench_function(format!("packed {dtype:?} {set:?}"), |b| {
                    rayon::scope(|_| {
                        b.iter(|| {
                            packed.matmul_with(*set, &Activations::quantize(&flat, rows, inp), &mut y);
                            black_box(y[0])
                        });
                    });
                });
            }
            let candle = QMatMul::from_qtensor(q).unwrap();
            group.bench_function(format!("candle {dtype:?}"), |b| b.iter(|| candle.forward(&x).unwrap()));
        }
        group.bench_function("candle f32", |b| b.iter(|| x.matmul(&dense).unwrap()));
        group.finish();
    }
}

criterion_group!(benches, steps, against_candle);
criterion_main!(benches);
