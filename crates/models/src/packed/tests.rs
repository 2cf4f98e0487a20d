//! Products against dequantised f32, and instruction sets against each other.
#![allow(clippy::unwrap_used)]

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::*;

/// Numbers in -1..1 that look random: a linear congruential generator per call.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    // The sum of four is about normal.
    (0..n).map(|_| (next() + next() + next() + next()) * 0.866).collect()
}

fn qtensor(dtype: GgmlDType, out: usize, inp: usize, seed: u64) -> QTensor {
    let w = Tensor::from_vec(noise(out * inp, seed), (out, inp), &Device::Cpu).unwrap();
    QTensor::quantize(&(w * 0.05).unwrap(), dtype).unwrap()
}

fn packed(dtype: GgmlDType, out: usize, inp: usize, seed: u64) -> PackedMatrix {
    PackedMatrix::from_qtensor(&qtensor(dtype, out, inp, seed)).unwrap().unwrap()
}

fn dense(m: &PackedMatrix) -> Vec<f32> {
    let mut w = vec![0.0; m.out_features() * m.in_features()];
    for (i, row) in w.chunks_exact_mut(m.in_features()).enumerate() {
        m.row(i, row);
    }
    w
}

/// In f64: x (rows, in), w (out, in).
fn reference(x: &[f32], w: &[f32], inp: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(inp).flat_map(|x| w.chunks_exact(inp).map(move |w| dot(x, w) as f32)).collect()
}

fn rms(a: &[f32]) -> f32 {
    (a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32).sqrt()
}

fn relative_rms(a: &[f32], b: &[f32]) -> f32 {
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    rms(&difference) / rms(b)
}

const KEPT: [(GgmlDType, Format); 4] = [
    (GgmlDType::Q4_0, Format::Q4_0),
    (GgmlDType::Q4_1, Format::Q4_1),
    (GgmlDType::Q8_0, Format::Q8_0),
    (GgmlDType::Q4K, Format::Q4_1),
];

#[test]
fn rows_equal_the_dequantised_tensor() {
    for (dtype, format) in KEPT {
        let q = qtensor(dtype, 37, 512, 1);
        let m = PackedMatrix::from_qtensor(&q).unwrap().unwrap();
        assert_eq!(m.format(), format);
        let expected = q.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let tolerance = if dtype == GgmlDType::Q4K { 1e-3 } else { 1e-7 };
        assert!(relative_rms(&dense(&m), &expected) <= tolerance, "{dtype:?}");
    }
}

#[test]
fn other_types_are_requantised_to_eight_bits() {
    for dtype in
        [GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q5K, GgmlDType::Q6K]
    {
        let q = qtensor(dtype, 19, 512, 2);
        let m = PackedMatrix::from_qtensor(&q).unwrap().unwrap();
        assert_eq!(m.format(), Format::Q8_0);
        let expected = q.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = relative_rms(&dense(&m), &expected);
        assert!(error < 7e-3, "{dtype:?}: {error}");
    }
}

#[test]
fn what_cannot_be_packed_is_none() {
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
        assert!(PackedMatrix::from_qtensor(&qtensor(dtype, 16, 64, 3)).unwrap().is_none());
    }
    assert!(PackedMatrix::quantize_q8(&noise(16 * 33, 3), 16, 33).is_none());
    let vector = QTensor::quantize(
        &Tensor::zeros(64, candle_core::DType::F32, &Device::Cpu).unwrap(),
        GgmlDType::Q8_0,
    );
    assert!(PackedMatrix::from_qtensor(&vector.unwrap()).is_err());
}

#[test]
fn products_are_within_one_percent_of_f32() {
    for (dtype, _) in KEPT {
        for set in InstructionSet::available() {
            let (rows, out, inp) = (7, 100, 1536);
            let m = packed(dtype, out, inp, 4);
            let x = noise(rows * inp, 5);
            let expected = reference(&x, &dense(&m), inp);
            let mut y = vec![f32::NAN; rows * out];
            m.matmul_with(*set, &Activations::quantize(&x, rows, inp), &mut y);
            let error = relative_rms(&y, &expected);
            assert!(error < 0.01, "{dtype:?} {set:?}: {error}");
            assert!(error > 1e-4, "suspiciously exact: {dtype:?} {set:?}: {error}");
        }
    }
}

/// With activations that int8 holds exactly only the rounding of f32 is left, so errors of the integer sums that
/// a relative tolerance would hide show.
#[test]
fn integer_sums_are_exact() {
    for (dtype, _) in KEPT {
        for set in InstructionSet::available() {
            let (rows, out, inp) = (5, 50, 256);
            let m = packed(dtype, out, inp, 6);
            let x: Vec<f32> = noise(rows * inp, 7)
                .iter()
                .enumerate()
                // Every block reaches 127, so its scale is 1; among them blocks of nothing but the extremes.
                .map(|(i, v)| match (i % 32, i / 32 % 3) {
                    (0, _) | (_, 1) => 127.0,
                    (_, 2) => {
                        if v.is_sign_positive() {
                            127.0
                        } else {
                            -127.0
                        }
                    }
                    _ => (v * 40.0).round(),
                })
                .collect();
            let expected = reference(&x, &dense(&m), inp);
            let mut y = vec![f32::NAN; rows * out];
            m.matmul_with(*set, &Activations::quantize(&x, rows, inp), &mut y);
            let error = relative_rms(&y, &expected);
            assert!(error < 2e-6, "{dtype:?} {set:?}: {error}");
        }
    }
}

/// Codes and activations at the ends of their ranges, where 16-bit sums would saturate or wrap.
#[test]
fn extreme_codes_do_not_saturate() {
    let extremes: Vec<f32> = (0..16 * 64).map(|i| if (i / 5) % 2 == 0 { 127.0 } else { -127.0 }).collect();
    let constant = vec![127.0; 16 * 64];
    for w in [&extremes, &constant] {
        for x in [&extremes, &constant] {
            let m = PackedMatrix::quantize_q8(w, 16, 64).unwrap();
            for set in InstructionSet::available() {
                let mut y = vec![f32::NAN; 16 * 16];
                m.matmul_with(*set, &Activations::quantize(x, 16, 64), &mut y);
                assert!(relative_rms(&y, &reference(x, &dense(&m), 64)) < 2e-6, "{set:?}");
            }
        }
    }
    // The most negative byte is no product of our quantiser, but files may hold it.
    let mut bytes = Vec::new();
    for row in 0..16u8 {
        bytes.extend_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
        bytes.extend_from_slice(&[if row % 2 == 0 { 0x80 } else { 0x7f }; 32]);
    }
    let storage =
        candle_core::quantized::QStorage::from_data(bytes.into(), &Device::Cpu, GgmlDType::Q8_0).unwrap();
    let m = PackedMatrix::from_qtensor(&QTensor::new(storage, (16, 32)).unwrap()).unwrap().unwrap();
    for set in InstructionSet::available() {
        for sign in [1.0, -1.0] {
            let mut y = [f32::NAN; 16];
            m.matmul_with(*set, &Activations::quantize(&[127.0 * sign; 32], 1, 32), &mut y);
            for (row, y) in y.iter().enumerate() {
                let code = if row % 2 == 0 { -128.0 } else { 127.0 };
                assert_eq!(*y, sign * 0.5 * code * 127.0 * 32.0, "{set:?} row {row}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_instruction_set_equals_scalar(
        rows in 1usize..12, out in 1usize..70, blocks in 1usize..9, format in 0usize..3, seed in any::<u64>()
    ) {
        let inp = blocks * BLOCK;
        let m = packed(KEPT[format].0, out, inp, seed);
        let x = Activations::quantize(&noise(rows * inp, seed ^ 1), rows, inp);
        let mut expected = vec![f32::NAN; rows * out];
        m.matmul_with(InstructionSet::Scalar, &x, &mut expected);
        for set in InstructionSet::available() {
            let mut y = vec![f32::NAN; rows * out];
            m.matmul_with(*set, &x, &mut y);
            let scale = rms(&expected).max(1e-3);
            for (y, e) in y.iter().zip(&expected) {
                prop_assert!((y - e).abs() <= 1e-5 * scale, "{set:?}: {y} {e} of {scale}");
            }
        }
    }

    #[test]
    fn a_row_is_independent_of_its_batch(rows in 2usize..9, pick in 0usize..9, seed in any::<u64>()) {
        let (out, inp) = (33, 128);
        let m = packed(GgmlDType::Q4_1, out, inp, seed);
        let x = noise(rows * inp, seed ^ 1);
        let pick = pick % rows;
        let (mut all, mut one) = (vec![0.0; rows * out], vec![0.0; out]);
        m.matmul(&x, rows, &mut all);
        m.matmul(&x[pick * inp..(pick + 1) * inp], 1, &mut one);
        prop_assert_eq!(&all[pick * out..(pick + 1) * out], &one[..]);
    }
}

#[test]
fn large_products_are_cut_without_gaps() {
    // Beyond one row block and many pieces; an odd number of panels, the last one not full.
    let (rows, out, inp) = (1500, 1000, 512);
    let m = packed(GgmlDType::Q4_0, out, inp, 8);
    let x = Activations::quantize(&noise(rows * inp, 9), rows, inp);
    let mut y = vec![f32::NAN; rows * out];
    m.matmul_quantized(&x, &mut y);
    let mut one = vec![f32::NAN; out];
    for row in [0, 1, 700, 701, 1498, 1499] {
        let x = Activations::quantize(&noise(rows * inp, 9)[row * inp..(row + 1) * inp], 1, inp);
        m.matmul_quantized(&x, &mut one);
        assert_eq!(one, y[row * out..(row + 1) * out]);
    }
    assert!(y.iter().all(|y| y.is_finite()));
}

#[test]
fn any_number_of_threads_gives_the_same() {
    // 19 panels: pieces of unequal length, with 64 threads more pieces than pairs of panels.
    let (rows, out, inp) = (9, 300, 3072);
    let m = packed(GgmlDType::Q4_1, out, inp, 10);
    let x = noise(rows * inp, 11);
    let product = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut y = vec![f32::NAN; rows * out];
        pool.install(|| m.matmul(&x, rows, &mut y));
        y
    };
    let one = product(1);
    assert!(one.iter().all(|y| y.is_finite()));
    for threads in [2, 3, 7, 64] {
        assert_eq!(product(threads), one, "{threads} threads");
    }
}

#[test]
fn concatenation_appends_rows() {
    for (dtype, _) in KEPT {
        // 24 and 7 are no multiples of a panel.
        let parts: Vec<_> =
            [(48, 1), (24, 2), (7, 3)].map(|(out, seed)| packed(dtype, out, 256, seed)).into();
        let whole = PackedMatrix::concat(&parts).unwrap();
        assert_eq!(dense(&whole), parts.iter().flat_map(dense).collect::<Vec<_>>());
        assert_eq!((whole.out_features(), whole.in_features()), (79, 256));
    }
    assert!(PackedMatrix::concat(&[]).is_none());
    let [a, b, c] = [(GgmlDType::Q4_0, 64), (GgmlDType::Q8_0, 64), (GgmlDType::Q4_0, 32)]
        .map(|(dtype, inp)| packed(dtype, 16, inp, 4));
    assert!(PackedMatrix::concat(&[a.clone(), b]).is_none());
    assert!(PackedMatrix::concat(&[a, c]).is_none());
}

#[test]
fn bytes_are_those_of_the_format() {
    for (dtype, bits) in [(GgmlDType::Q4_0, 4.5), (GgmlDType::Q4_1, 5.0), (GgmlDType::Q8_0, 8.5)] {
        let m = packed(dtype, 64, 256, 1);
        assert_eq!(m.format().bits_per_weight(), bits);
        assert_eq!(m.bytes(), (64.0 * 256.0 * bits / 8.0) as usize);
    }
}

#[test]
fn infinities_reach_the_output() {
    let m = packed(GgmlDType::Q4_1, 16, 64, 1);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 128];
        x[3] = bad;
        let mut y = vec![0.0; 32];
        m.matmul(&x, 2, &mut y);
        assert!(y[..16].iter().all(|y| !y.is_finite()));
        assert!(y[16..].iter().all(|y| y.is_finite()));
    }
}

#[test]
fn empty_products_do_nothing() {
    let m = packed(GgmlDType::Q8_0, 16, 64, 1);
    m.matmul(&[], 0, &mut []);
}
