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

/// A matrix whose element (i, j) is at `i * steps.0 + j * steps.1`, in f64.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: &'a [f64],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) steps: (usize, usize),
}

impl Strided<'_> {
    pub(crate) fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, steps: (self.steps.1, self.steps.0), ..self }
    }

    fn is_within(&self) -> bool {
        let last = |n: usize, step: usize| n.saturating_sub(1) * step;
        self.rows * self.cols == 0
            || last(self.rows, self.steps.0) + last(self.cols, self.steps.1) < self.data.len()
    }
}

/// `out += a b`, with `out` contiguous `(a.rows, b.cols)`.
pub(crate) fn add_wide_product(a: Strided<'_>, b: Strided<'_>, out: &mut [f64]) {
    assert!(a.cols == b.rows && out.len() == a.rows * b.cols);
    assert!(a.is_within() && b.is_within());
    let step = |n: usize| n as isize;
    // SAFETY: the assertions bound every element that these shapes and steps reach; `alpha = 1` keeps what `out` holds.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            step(b.cols),
            true,
            a.data.as_ptr(),
            step(a.steps.1),
            step(a.steps.0),
            b.data.as_ptr(),
            step(b.steps.1),
            step(b.steps.0),
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
        let wide: Vec<f64> = a.iter().map(|x| f64::from(*x)).collect();
        let a = Strided { data: &wide, rows: 4, cols: 6, steps: (10, 1) };
        let mut gram = vec![1.0; 36];
        add_wide_product(a.transposed(), a, &mut gram);
        for (i, got) in gram.iter().enumerate() {
            let want = 1.0 + (0..4).map(|t| wide[t * 10 + i / 6] * wide[t * 10 + i % 6]).sum::<f64>();
            assert!((got - want).abs() < 1e-12);
        }
    }
}
