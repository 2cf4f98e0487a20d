//! Small dense products on strided f32 views, by the `gemm` crate that candle itself uses.

/// A read-only matrix view: `rows x cols`, row stride `stride`, contiguous columns.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + cols <= data.len(), "view beyond its data");
        assert!(stride >= cols);
        Self { data, rows, cols, stride }
    }
}

/// `out = a b^T`, with `out` contiguous `(a.rows, b.rows)`.
pub(crate) fn mul_transposed(a: View<'_>, b: View<'_>, out: &mut [f32]) {
    assert_eq!(a.cols, b.cols);
    assert!(out.len() >= a.rows * b.rows);
    // SAFETY: `View::new` and the assertions above bound every element that these shapes and strides reach.
    unsafe {
        gemm::gemm(
            a.rows,
            b.rows,
            a.cols,
            out.as_mut_ptr(),
            1,
            b.rows as isize,
            false,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b.data.as_ptr(),
            b.stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out += p x`, with `p` contiguous `(rows, x.rows)` and `out` `(rows, x.cols)` with row stride `stride`.
pub(crate) fn add_product(p: &[f32], rows: usize, x: View<'_>, out: &mut [f32], stride: usize) {
    assert!(stride >= x.cols && p.len() >= rows * x.rows);
    assert!(rows == 0 || out.len() >= (rows - 1) * stride + x.cols);
    // SAFETY: as above; `out` is read and written, `alpha = 1` keeps what it holds.
    unsafe {
        gemm::gemm(
            rows,
            x.cols,
            x.rows,
            out.as_mut_ptr(),
            1,
            stride as isize,
            true,
            p.as_ptr(),
            1,
            x.rows as isize,
            x.data.as_ptr(),
            1,
            x.stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_equal_the_definition() {
        let a: Vec<f32> = (0..40).map(|i| (i as f32).sin()).collect();
        let b: Vec<f32> = (0..60).map(|i| (i as f32 * 0.7).cos()).collect();
        let (va, vb) = (View::new(&a, 4, 6, 10), View::new(&b, 5, 6, 12));
        let mut out = vec![7.0; 20];
        mul_transposed(va, vb, &mut out);
        for i in 0..4 {
            for j in 0..5 {
                let want: f32 = (0..6).map(|c| a[i * 10 + c] * b[j * 12 + c]).sum();
                assert!((out[i * 5 + j] - want).abs() < 1e-5);
            }
        }
        let mut acc = vec![1.0; 24];
        add_product(&out, 4, vb, &mut acc, 6);
        for i in 0..4 {
            for c in 0..6 {
                let want: f32 = 1.0 + (0..5).map(|j| out[i * 5 + j] * b[j * 12 + c]).sum::<f32>();
                assert!((acc[i * 6 + c] - want).abs() < 1e-4);
            }
        }
    }
}
