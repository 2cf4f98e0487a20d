//! y = x Wᵀ: how the work is cut into tiles for the caches and into pieces for the threads.

use std::marker::PhantomData;
use std::ops::Range;

use super::activations::{ActivationBlock, Activations};
use super::kernels::{InstructionSet, Kernel, Scalar};
use super::layout::{Layout, PANEL, with_layout};
use super::matrix::PackedMatrix;

/// Rows of activations per tile. With two panels the AVX-512 kernel then keeps sixteen sums, two registers of
/// weights and what it broadcasts in its 32 registers.
const ROWS: usize = 4;

/// Activations of a block of rows are to stay in the second-level cache while panel after panel passes over them.
const ROW_BLOCK_BYTES: usize = 512 << 10;

/// Multiplications in the smallest piece that is worth another thread: a few microseconds of work, about what it
/// takes to hand a piece to a thread of the pool that is awake (one that sleeps takes ten).
const PIECE_FLOOR: usize = 128 << 10;

/// Multiplications in a piece of a large product; more pieces than threads level out unequal progress.
const PIECE: usize = 32 << 20;

impl PackedMatrix {
    /// y = x Wᵀ: `x` of shape (`rows`, in_features), `out` (`rows`, out_features), overwritten.
    ///
    /// Uses the rayon pool that it is called in. Called from outside of any pool, every call pays for handing
    /// the work over to the global one: run whole forward steps inside the pool (`rayon::scope`, `install`).
    ///
    /// # Panics
    /// If the lengths of `x` and `out` are not those of the shapes.
    pub fn matmul(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.matmul_quantized(&Activations::quantize(x, rows, self.in_features), out);
    }

    /// [`PackedMatrix::matmul`] with activations that several matrices share.
    ///
    /// # Panics
    /// If `x` has other than `in_features` columns, or the length of `out` is not `x.rows() * out_features`.
    pub fn matmul_quantized(&self, x: &Activations, out: &mut [f32]) {
        self.matmul_with(InstructionSet::active(), x, out);
    }

    /// [`PackedMatrix::matmul_quantized`] with the instructions chosen by hand, for tests and benchmarks.
    ///
    /// # Panics
    /// As [`PackedMatrix::matmul_quantized`], and if the machine has not these instructions.
    pub fn matmul_with(&self, set: InstructionSet, x: &Activations, out: &mut [f32]) {
        assert_eq!(x.in_features(), self.in_features, "activations for another matrix");
        assert_eq!(
            out.len(),
            x.rows() * self.out_features,
            "output is not ({}, {})",
            x.rows(),
            self.out_features
        );
        assert!(InstructionSet::available().contains(&set), "{set:?} is not available on this machine");
        with_layout!(self.format, L => match set {
            InstructionSet::Scalar => self.multiply::<Scalar, L>(x, out),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => self.multiply::<super::kernels::Avx2, L>(x, out),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni => self.multiply::<super::kernels::Avx512, L>(x, out),
            #[cfg(target_arch = "aarch64")]
            InstructionSet::Neon => self.multiply::<super::kernels::Neon, L>(x, out),
            #[allow(unreachable_patterns)]
            _ => unreachable!("checked to be available"),
        });
    }

    fn multiply<K: Kernel, L: Layout>(&self, x: &Activations, out: &mut [f32]) {
        let work = x.rows() * self.in_features * self.panels() * PANEL;
        // By threads and work: every output is a sum of its own, whatever piece it is in.
        let threads = rayon::current_num_threads();
        let pieces = (work / PIECE_FLOOR).min(threads).max((work / PIECE).min(4 * threads));
        let out = Output { data: out.as_mut_ptr(), row_length: self.out_features, slice: PhantomData };
        split(0..self.panels(), pieces, &|panels| self.multiply_panels::<K, L>(x, panels, &out));
    }

    /// All rows times a range of panels. Ranges of concurrent calls are disjoint.
    fn multiply_panels<K: Kernel, L: Layout>(&self, x: &Activations, panels: Range<usize>, out: &Output<'_>) {
        let row_bytes = self.blocks() * size_of::<ActivationBlock>();
        let row_block = (ROW_BLOCK_BYTES / row_bytes.max(1)).max(1).next_multiple_of(ROWS);
        for start in (0..x.rows()).step_by(row_block) {
            let rows = start..(start + row_block).min(x.rows());
            // A single row is bound by memory, which likes one stream better than two.
            let pairs = K::PANELS == 2 && x.rows() > 1;
            let mut panel = panels.start;
            while panel < panels.end {
                if pairs && panel + 2 <= panels.end {
                    self.multiply_rows::<K, L, 2>(x, rows.clone(), panel, out);
                    panel += 2;
                } else {
                    self.multiply_rows::<K, L, 1>(x, rows.clone(), panel, out);
                    panel += 1;
                }
            }
        }
    }

    fn multiply_rows<K: Kernel, L: Layout, const P: usize>(
        &self,
        x: &Activations,
        rows: Range<usize>,
        panel: usize,
        out: &Output<'_>,
    ) {
        let mut row = rows.start;
        while row < rows.end {
            row += match rows.end - row {
                1 => self.tile::<K, L, 1, P>(x, row, panel, out),
                2 => self.tile::<K, L, 2, P>(x, row, panel, out),
                3 => self.tile::<K, L, 3, P>(x, row, panel, out),
                _ => self.tile::<K, L, ROWS, P>(x, row, panel, out),
            };
        }
    }

    fn tile<K: Kernel, L: Layout, const R: usize, const P: usize>(
        &self,
        x: &Activations,
        row: usize,
        panel: usize,
        out: &Output<'_>,
    ) -> usize {
        let panels = std::array::from_fn(|p| self.panel(panel + p));
        let x = std::array::from_fn(|r| x.row(row + r));
        // SAFETY: `matmul_with` has checked that the machine has the instructions of the kernel.
        let tile = unsafe { K::tile::<L, R, P>(panels, x, self.blocks()) };
        for (r, sums) in tile.iter().enumerate() {
            for (p, sums) in sums.iter().enumerate() {
                let column = (panel + p) * PANEL;
                let used = PANEL.min(self.out_features - column);
                // SAFETY: the row is one of x, which has as many rows as the output; the columns are below
                // out_features, and no concurrent call has a panel of this one's range.
                unsafe { out.store(row + r, column, &sums[..used]) };
            }
        }
        R
    }
}

/// The output matrix, of which each thread writes its own columns: not a partition into slices, because a
/// thread's columns of several rows do not lie together.
struct Output<'a> {
    data: *mut f32,
    row_length: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only written through `store`, whose callers write disjoint places.
unsafe impl Sync for Output<'_> {}

impl Output<'_> {
    /// Writes `values` to one row from `column` on.
    ///
    /// # Safety
    /// The row exists, the values end within it, and nothing else writes these places at the same time.
    unsafe fn store(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: the caller vouches for place and exclusiveness; `values` is another allocation, because the
        // output is borrowed mutably for as long as `self` lives.
        unsafe {
            let place = self.data.add(row * self.row_length + column);
            place.copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }
}

/// Runs `work` on `pieces` consecutive ranges of about equal length, in parallel. Ranges start at even numbers,
/// so that pairs of panels stay together.
fn split(range: Range<usize>, pieces: usize, work: &(impl Fn(Range<usize>) + Sync)) {
    let left = pieces / 2;
    let middle = range.start + (range.len() * left / pieces.max(1)).next_multiple_of(2);
    if pieces <= 1 || middle >= range.end || middle == range.start {
        work(range);
        return;
    }
    rayon::join(|| split(range.start..middle, left, work), || split(middle..range.end, pieces - left, work));
}
