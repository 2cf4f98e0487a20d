//! Matrices of floats on the CPU, kept in the type that the file has.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use minicache_core::kernels::loops;
use minicache_core::kernels::tile::tile;
use rayon::prelude::*;

use crate::{Error, Result};

/// Rows of input that the weights are streamed past at a time: as many as make reading and widening them cheap.
const ROWS: usize = 48;

/// Bytes of a block of input rows that stay in the second-level cache beside the weights passing by.
const INPUT_BYTES: usize = 512 << 10;

/// Weight rows taken at a time.
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
            Data::F16(data) => loops::widen_f16(&data[range], out),
            Data::Bf16(data) => loops::widen_bf16(&data[range], out),
        }
    }

    /// `out` (n, rows) = `x` (n, columns) times this matrix, transposed.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` are not those of the shapes.
    pub(crate) fn matmul(&self, x: &[f32], n: usize, out: &mut [f32]) {
        let weights = match &self.data {
            Data::F32(data) => Weights::F32(data),
            Data::F16(data) => Weights::F16(data),
            Data::Bf16(data) => Weights::Bf16(data),
        };
        multiply(weights, self.columns, x, n, out);
    }
}

/// `out` (n, outputs) = `x` (n, inputs) times `w` (outputs, inputs), transposed.
///
/// # Panics
/// As [`FloatMatrix::matmul`].
pub(crate) fn product(x: &[f32], w: &[f32], n: usize, inputs: usize, out: &mut [f32]) {
    multiply(Weights::F32(w), inputs, x, n, out);
}

/// The numbers of a matrix, row by row.
#[derive(Clone, Copy)]
enum Weights<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Weights<'a> {
    fn len(self) -> usize {
        match self {
            Weights::F32(data) => data.len(),
            Weights::F16(data) => data.len(),
            Weights::Bf16(data) => data.len(),
        }
    }

    /// The numbers from `from` on, as f32: where they lie, or widened into `room`.
    fn floats<'b>(self, from: usize, room: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        let range = from..from + room.len();
        match self {
            Weights::F32(data) => return &data[range],
            Weights::F16(data) => loops::widen_f16(&data[range], room),
            Weights::Bf16(data) => loops::widen_bf16(&data[range], room),
        }
        room
    }
}

/// The product of [`FloatMatrix::matmul`].
///
/// An output is the same to the last bit whatever else is computed in the call: however many rows there are, and
/// whatever the number of threads. It is the sum, in order, of the dot products of [`BLOCK`] columns, and tiles of any
/// size do a dot product's additions in the same order. Blocked products of libraries choose their blocks by the number
/// of rows and by the sizes of the machine's caches.
fn multiply(weights: Weights<'_>, columns: usize, x: &[f32], n: usize, out: &mut [f32]) {
    let rows = weights.len().checked_div(columns).unwrap_or(0);
    assert_eq!((x.len(), out.len()), (n * columns, n * rows), "no ({n}, {columns}) and ({n}, {rows})");
    let target = Columns(out.as_mut_ptr());
    let height = n.clamp(1, ROWS);
    // A block of input rows has to stay in the second-level cache while the weights pass by; where it is too long, it
    // passes a block of columns at a time. (All columns at once read the weights as they lie.)
    let span = if height * columns * size_of::<f32>() <= INPUT_BYTES { columns.max(1) } else { BLOCK };
    let job = |range: Range<usize>| {
        let mut room = [0.0; TALL * BLOCK];
        let mut sums = [[0.0; TALL]; ROWS];
        for top in (0..n).step_by(height) {
            let inputs = top..(top + height).min(n);
            let sums = &mut sums[..inputs.len()];
            for from in (0..columns).step_by(span) {
                let span = from..(from + span).min(columns);
                let mut first = range.start;
                while first < range.end {
                    let taken = if range.end - first >= TALL { TALL } else { 1 };
                    sums.fill([0.0; TALL]);
                    let input = Input { x, columns, rows: inputs.clone() };
                    if taken == TALL {
                        sum_rows::<TALL>(weights, first, span.clone(), input, &mut room, sums);
                    } else {
                        sum_rows::<1>(weights, first, span.clone(), input, &mut room, sums);
                    }
                    for (i, sums) in inputs.clone().zip(&*sums) {
                        for (w, sum) in sums[..taken].iter().enumerate() {
                            // SAFETY: the assertion above says that `out` has n rows; this job alone reads and writes
                            // the columns of its range.
                            unsafe {
                                let place = target.at(i * rows + first + w);
                                *place = if from == 0 { *sum } else { *place + sum };
                            }
                        }
                    }
                    first += taken;
                }
            }
        }
    };
    if columns == 0 {
        return out.fill(0.0);
    }
    if rows * columns * n < SERIAL {
        return job(0..rows);
    }
    // Which rows of weights go together makes no difference to the result.
    let chunk = rows.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(TALL).max(8);
    (0..rows.div_ceil(chunk)).into_par_iter().for_each(|i| job(i * chunk..((i + 1) * chunk).min(rows)));
}

/// Some rows of the input `x`, which has `columns` columns.
#[derive(Clone)]
struct Input<'a> {
    x: &'a [f32],
    columns: usize,
    rows: Range<usize>,
}

/// Adds the products of the columns `span` of `W` weight rows from `first` on with every row of the input to `sums`.
fn sum_rows<const W: usize>(
    weights: Weights<'_>,
    first: usize,
    span: Range<usize>,
    input: Input<'_>,
    room: &mut [f32; TALL * BLOCK],
    sums: &mut [[f32; TALL]],
) {
    let columns = input.columns;
    for from in span.clone().step_by(BLOCK) {
        let width = BLOCK.min(span.end - from);
        let mut w = [&[][..]; W];
        for (i, (w, room)) in w.iter_mut().zip(room.chunks_exact_mut(BLOCK)).enumerate() {
            *w = weights.floats((first + i) * columns + from, &mut room[..width]);
        }
        sum_block::<W>(w, &input, from, sums);
    }
}

/// Adds to `sums` the products of the weight rows `w` with the same columns, from `from` on, of every row of the input.
fn sum_block<const W: usize>(w: [&[f32]; W], input: &Input<'_>, from: usize, sums: &mut [[f32; TALL]]) {
    let width = w[0].len();
    let row = |i: usize| &input.x[(input.rows.start + i) * input.columns + from..][..width];
    fn add<const W: usize, const M: usize>(tile: [[f32; M]; W], sums: &mut [[f32; TALL]]) {
        for (i, row) in tile.iter().enumerate() {
            row.iter().zip(sums.iter_mut()).for_each(|(value, sums)| sums[i] += value);
        }
    }
    let mut i = 0;
    while i < sums.len() {
        let sums = &mut sums[i..];
        match sums.len() {
            1 => add(tile(w, [row(i)]), sums),
            2 => add(tile(w, [row(i), row(i + 1)]), sums),
            3 => add(tile(w, [row(i), row(i + 1), row(i + 2)]), sums),
            _ => add(tile(w, [row(i), row(i + 1), row(i + 2), row(i + 3)]), sums),
        }
        i += 4;
    }
}

/// Where jobs write their own columns of a shared output.
#[derive(Clone, Copy)]
struct Columns(*mut f32);

// SAFETY: every job reads and writes other elements.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn products_of_every_type_and_row_count() {
        for (rows, columns) in [(5, 3), (40, 33), (130, 1100), (11, 3000)] {
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
                let mut alone = Vec::new();
                for n in [1, 2, 3, 4, 5, 11, 48, 49, 100] {
                    let x: Vec<f32> =
                        (0..n * columns).map(|i| ((i * 104_729) % 997) as f32 / 498.0 - 1.0).collect();
                    let mut out = vec![f32::NAN; n * rows];
                    matrix.matmul(&x, n, &mut out);
                    if n == 1 {
                        alone.clone_from(&out);
                    }
                    assert_eq!(out[..rows], alone, "{dtype:?} {rows}x{columns}: a row beside {n}");
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

    #[test]
    fn neither_threads_nor_neighbours_change_a_bit() {
        let numbers = |n: usize, by: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * by) % 2003) as f32 / 1001.0 - 1.0).collect()
        };
        // Longer than what stays in the cache whole, and with columns, rows and inputs left over by every block.
        let (rows, columns, n) = (75, 3 * BLOCK + 77, 2 * ROWS + 7);
        let (w, x) = (numbers(rows * columns, 7919), numbers(n * columns, 104_729));
        let whole = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; n * rows];
            pool.install(|| product(&x, &w, n, columns, &mut out));
            out
        };
        let want = whole(1);
        for threads in 2..=4 {
            assert_eq!(whole(threads), want, "{threads} threads");
        }
        for at in [0, 1, ROWS - 1, ROWS, n - 1] {
            let mut one = vec![0.0; rows];
            product(&x[at * columns..][..columns], &w, 1, columns, &mut one);
            assert_eq!(one, want[at * rows..][..rows], "row {at} alone");
        }
    }

    #[test]
    #[should_panic(expected = "no (2, 3)")]
    fn an_output_of_another_size_is_refused() {
        product(&[0.0; 6], &[0.0; 6], 2, 3, &mut [0.0; 3]);
    }
}
