//! The rotations of a model's positions, made once while a cache has them: for keys that are rotated whenever they are
//! read.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use crate::Rotary;

/// A rotary embedding with the cosines and sines of the positions so far, shared by all caches that have the embedding.
pub(crate) struct Angles {
    rotary: Arc<dyn Rotary>,
    /// `(positions, rotary_dim)`: cosines, then sines.
    rows: RwLock<Vec<f32>>,
}

/// Those of `rotary`, made or found.
pub(crate) fn angles(rotary: &Arc<dyn Rotary>) -> Arc<Angles> {
    static MADE: Mutex<Vec<Weak<Angles>>> = Mutex::new(Vec::new());
    // A thread that failed left nothing half made.
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    made.retain(|angles| angles.strong_count() > 0);
    // Nothing else can be at this address as long as the embedding is held. By its data: tables of functions differ.
    let own = Arc::as_ptr(rotary).cast::<()>();
    let wanted = |angles: &Arc<Angles>| Arc::as_ptr(&angles.rotary).cast::<()>() == own;
    if let Some(angles) = made.iter().filter_map(Weak::upgrade).find(wanted) {
        return angles;
    }
    let angles = Arc::new(Angles { rotary: rotary.clone(), rows: RwLock::default() });
    made.push(Arc::downgrade(&angles));
    angles
}

impl Angles {
    /// Bytes of the rows of so many positions, held once for a model.
    pub(crate) fn bytes(positions: usize, rotary_dim: usize) -> usize {
        positions * rotary_dim * size_of::<f32>()
    }

    /// Makes the rows of all positions below `len`.
    pub(crate) fn extend(&self, len: usize) {
        let dim = self.rotary.rotary_dim();
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        let from = rows.len() / dim.max(1);
        if from < len {
            rows.reserve_exact((len - from) * dim);
            rows.resize(len * dim, 0.0);
            let new = rows.chunks_exact_mut(dim.max(1)).enumerate().skip(from);
            new.for_each(|(position, row)| self.rotary.angles_into(position, row));
        }
    }

    /// Rotates head vectors `x (positions, dim)` to positions that [`Angles::extend`] has made.
    pub(crate) fn rotate(&self, positions: Range<usize>, x: &mut [f32], dim: usize) {
        let width = self.rotary.rotary_dim();
        let half = width / 2;
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        let rows = rows[positions.start * width..positions.end * width].chunks_exact(width.max(1));
        for (row, x) in rows.zip(x.chunks_exact_mut(dim)) {
            let ((cos, sin), (re, im)) = (row.split_at(half), x.split_at_mut(half));
            for (((re, im), cos), sin) in re.iter_mut().zip(im).zip(cos).zip(sin) {
                (*re, *im) = (*re * cos - *im * sin, *im * cos + *re * sin);
            }
        }
    }

    /// The inverse for the vectors of one position.
    pub(crate) fn unrotate(&self, position: usize, x: &mut [f32], dim: usize) {
        x.chunks_exact_mut(dim).for_each(|x| self.rotary.unrotate(position, x));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A turn by the position and a factor, of the first four numbers.
    struct Turning;

    impl Rotary for Turning {
        fn angles_into(&self, position: usize, out: &mut [f32]) {
            for (j, i) in [(0, 2), (1, 3)] {
                let (sin, cos) = (position as f32 * 0.5f32.powi(j)).sin_cos();
                (out[j as usize], out[i]) = (2.0 * cos, 2.0 * sin);
            }
        }
        fn rotate(&self, position: usize, x: &mut [f32]) {
            let mut a = [0.0; 4];
            self.angles_into(position, &mut a);
            let y = [x[0] * a[0] - x[2] * a[2], x[1] * a[1] - x[3] * a[3]];
            (x[2], x[3]) = (x[2] * a[0] + x[0] * a[2], x[3] * a[1] + x[1] * a[3]);
            x[..2].copy_from_slice(&y);
        }
        fn unrotate(&self, position: usize, x: &mut [f32]) {
            let mut a = [0.0; 4];
            self.angles_into(position, &mut a);
            let y = [x[0] * a[0] + x[2] * a[2], x[1] * a[1] + x[3] * a[3]];
            (x[2], x[3]) = (x[2] * a[0] - x[0] * a[2], x[3] * a[1] - x[1] * a[3]);
            x[..2].copy_from_slice(&y);
            x[..4].iter_mut().for_each(|x| *x *= 0.25);
        }
        fn rotary_dim(&self) -> usize {
            4
        }
    }

    #[test]
    fn rows_rotate_as_the_embedding_does_and_are_made_once() {
        let rotary: Arc<dyn Rotary> = Arc::new(Turning);
        let made = angles(&rotary);
        assert!(Arc::ptr_eq(&made, &angles(&rotary.clone())));
        assert!(!Arc::ptr_eq(&made, &angles(&(Arc::new(Turning) as Arc<dyn Rotary>))));
        made.extend(3);
        made.extend(9);
        made.extend(5);
        // Vectors of six numbers, the last two of which pass through.
        let x: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        let mut got = x.clone();
        made.rotate(4..8, &mut got, 6);
        let mut want = x.clone();
        want.chunks_exact_mut(6).enumerate().for_each(|(i, x)| rotary.rotate(4 + i, x));
        got.iter().zip(&want).for_each(|(got, want)| assert!((got - want).abs() < 1e-6));
        got.chunks_exact_mut(6).enumerate().for_each(|(i, x)| made.unrotate(4 + i, x, 6));
        got.iter().zip(&x).for_each(|(got, x)| assert!((got - x).abs() < 1e-6));
    }
}
