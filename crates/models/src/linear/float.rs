//! Matrices of floats on the CPU, kept in the type that the file has.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::simd;
use crate::{Error, Result};

/// Rows of input up to which the weights are streamed past them as they lie; above, a blocked matrix product, which
/// copies them first, is faster.
const FEW_ROWS: usize = 48;

/// Weight rows taken at a time when streaming.
const TALL: usize = 4;

/// Columns widened at a time: a block of f32 that stays in the first-level cache.
const BLOCK: usize = 1024;

/// Multiplications below which spreading over threads costs more than it saves.
const SERIAL: usize = 1 << 15;

#[derive(Debug, Clone)]
enum Data {
    F32(Arc<Vec<f32>>),
    F16(Arc<Vec<f16>>),
    Bf16(Arc<Vec<bf16>>),
}

/// A matrix `(rows, columns)` of floats; shared, not copied, when cloned.
#[derive(Debug, Clone)]
pub(crate) struct FloatMatrix {
    data: Data,
    rows: usize,
    columns: usize,
}

impl FloatMatrix {
    /// Takes a two-dimensional f32, f16 or bf16 tensor.
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let flat = tensor.flatten_all()?;
        let data = match tensor.dtype() {
            DType::F16 => Data::F16(Arc::new(flat.to_vec1()?)),
            DType::BF16 => Data::Bf16(Arc::new(flat.to_vec1()?)),
            DType::F32 => Data::F32(Arc::new(flat.to_vec1()?)),
            other => return Err(Error::Weights(format!("a matrix of {} is not supported", other.as_str()))),
        };
        Ok(Self { data, rows, columns })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        let width = if matches!(self.data, Data::F32(_)) { 4 } else { 2 };
        self.rows * self.columns * width
    }

    /// Writes one row to `out`.
    pub(crate) fn row_into(&self, row: usize, out: &mut [f32]) {
        self.widen(row * self.columns, out);
    }

    /// Writes the numbers from `from` on, in row-major order, to `out`.
    fn widen(&self, from: usize, out: &mut [f32]) {
        let range = from..from + out.len();
        match &self.data {
            Data::F32(data) => out.copy_from_slice(&data[range]),
            Data::F16(data) => simd::widen_f16(&data[range], out),
            Data::Bf16(data) => simd::widen_bf16(&data[range], out),
        }
    }

    /// `out` (n, rows) = `x` (n, columns) times this matrix, transposed.
    pub(crate) fn matmul(&self, x: &[f32], n: usize, out: &mut [f32]) {
        debug_assert_eq!((x.len(), out.len()), (n * self.columns, n * self.rows));
        if n <= FEW_ROWS { self.stream(x, n, out) } else { self.blocked(x, n, out) }
    }

    /// Every weight is read from memory once.
    fn stream(&self, x: &[f32], n: usize, out: &mut [f32]) {
        let (rows, out) = (self.rows, Columns(out.as_mut_ptr()));
        let job = |range: std::ops::Range<usize>| {
            let mut widened = Vec::new();
            let mut sums = [[0f32; TALL]; FEW_ROWS];
            let sums = &mut sums[..n];
            let mut first = range.start;
            while first < range.end {
                let taken = if range.end - first >= TALL { TALL } else { 1 };
                sums.fill([0.0; TALL]);
                if taken == TALL {
                    self.sum_rows::<TALL>(first, x, &mut widened, sums);
                } else {
                    self.sum_rows::<1>(first, x, &mut widened, sums);
                }
                for (i, sums) in sums.iter().enumerate() {
                    for (w, sum) in sums[..taken].iter().enumerate() {
                        // SAFETY: this job alone writes the columns of its range of `out`, which has n rows.
                        unsafe { out.at(i * rows + first + w).write(*sum) };
                    }
                }
                first += taken;
            }
        };
        if rows * self.columns * n < SERIAL {
            return job(0..rows);
        }
        let chunk = rows.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(TALL).max(8);
        (0..rows.div_ceil(chunk)).into_par_iter().for_each(|i| job(i * chunk..((i + 1) * chunk).min(rows)));
    }

    /// Adds the products of `W` weight rows from `first` on with every row of `x` to `sums`.
    fn sum_rows<const W: usize>(
        &self,
        first: usize,
        x: &[f32],
        widened: &mut Vec<f32>,
        sums: &mut [[f32; TALL]],
    ) {
        let columns = self.columns;
        if let Data::F32(data) = &self.data {
            let w = std::array::from_fn(|i| &data[(first + i) * columns..][..columns]);
            return sum_block::<W>(w, x, columns, 0, sums);
        }
        widened.resize(W * BLOCK, 0.0);
        for from in (0..columns).step_by(BLOCK) {
            let width = BLOCK.min(columns - from);
            for (i, w) in widened.chunks_exact_mut(BLOCK).enumerate() {
                self.widen((first + i) * columns + from, &mut w[..width]);
            }
            let w = std::array::from_fn(|i| &widened[i * BLOCK..][..width]);
            sum_block::<W>(w, x, columns, from, sums);
        }
    }

    /// Blocked matrix product; half-precision weights are widened a panel at a time.
    fn blocked(&self, x: &[f32], n: usize, out: &mut [f32]) {
        if let Data::F32(data) = &self.data {
            return product(x, data, n, self.columns, self.rows, out, self.rows);
        }
        // A panel of 2^20 numbers: small beside the weights, large enough for the product to run at full speed.
        let height = ((1 << 20) / self.columns).clamp(1, self.rows);
        let mut panel = vec![0f32; height * self.columns];
        for from in (0..self.rows).step_by(height) {
            let height = height.min(self.rows - from);
            let panel = &mut panel[..height * self.columns];
            panel
                .par_chunks_mut(self.columns)
                .enumerate()
                .for_each(|(i, row)| self.widen((from + i) * self.columns, row));
            product(x, panel, n, self.columns, height, &mut out[from..], self.rows);
        }
    }
}

/// Adds to `sums` the products of the weight rows `w` with the same columns, from `from` on, of every row of `x`.
fn sum_block<const W: usize>(
    w: [&[f32]; W],
    x: &[f32],
    columns: usize,
    from: usize,
    sums: &mut [[f32; TALL]],
) {
    let width = w[0].len();
    let row = |i: usize| &x[i * columns + from..][..width];
    fn add<const W: usize, const M: usize>(tile: [[f32; M]; W], sums: &mut [[f32; TALL]]) {
        for (i, row) in tile.iter().enumerate() {
            row.iter().zip(sums.iter_mut()).for_each(|(value, sums)| sums[i] += value);
        }
    }
    let mut i = 0;
    while i < sums.len() {
        let sums = &mut sums[i..];
        match sums.len() {
            1 => add(simd::tile(w, [row(i)]), sums),
            2 => add(simd::tile(w, [row(i), row(i + 1)]), sums),
            3 => add(simd::tile(w, [row(i), row(i + 1), row(i + 2)]), sums),
            _ => add(simd::tile(w, [row(i), row(i + 1), row(i + 2), row(i + 3)]), sums),
        }
        i += 4;
    }
}

/// Where jobs write their own columns of a shared output.
#[derive(Clone, Copy)]
struct Columns(*mut f32);

// SAFETY: every job writes other elements.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// # Safety
    /// `index` lies within the output.
    unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(index) }
    }
}

/// `out` (n, outputs), its rows `stride` apart, = `x` (n, inputs) times `w` (outputs, inputs), transposed.
pub(crate) fn product(
    x: &[f32],
    w: &[f32],
    n: usize,
    inputs: usize,
    outputs: usize,
    out: &mut [f32],
    stride: usize,
) {
    assert!(x.len() >= n * inputs && w.len() >= outputs * inputs && out.len() >= (n - 1) * stride + outputs);
    let parallel =
        if n * inputs * outputs < SERIAL { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    // SAFETY: the assertion above is what the strides ask for; `out` does not overlap the inputs.
    unsafe {
        gemm::gemm(
            n,
            outputs,
            inputs,
            out.as_mut_ptr(),
            1,
            stride as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            w.as_ptr(),
            inputs as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallel,
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn products_of_every_type_and_row_count() {
        for (rows, columns) in [(5, 3), (40, 33), (130, 1100)] {
            let w: Vec<f32> = (0..rows * columns).map(|i| ((i * 7919) % 1013) as f32 / 506.0 - 1.0).collect();
            let w = Tensor::from_vec(w, (rows, columns), &Device::Cpu).unwrap();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let stored = w.to_dtype(dtype).unwrap();
                let matrix = FloatMatrix::new(&stored).unwrap();
                assert_eq!(matrix.bytes(), rows * columns * dtype.size_in_bytes());
                let exact: Vec<f32> =
                    stored.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let mut row = vec![0.0; columns];
                matrix.row_into(rows - 1, &mut row);
                assert_eq!(row, exact[(rows - 1) * columns..]);
                for n in [1, 2, 3, 4, 5, 11, 48, 49, 100] {
                    let x: Vec<f32> =
                        (0..n * columns).map(|i| ((i * 104_729) % 997) as f32 / 498.0 - 1.0).collect();
                    let mut out = vec![f32::NAN; n * rows];
                    matrix.matmul(&x, n, &mut out);
                    for (i, got) in out.iter().enumerate() {
                        let (x, w) =
                            (&x[i / rows * columns..][..columns], &exact[i % rows * columns..][..columns]);
                        let want: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        assert!(
                            (f64::from(*got) - want).abs() < 1e-4,
                            "{dtype:?} {rows}x{columns}, {n}: {got} {want}"
                        );
                    }
                }
            }
        }
    }
}
