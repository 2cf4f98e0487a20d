//! Per-thread working memory: no heap allocation per decode step after warm-up.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` with a buffer of `len` numbers (contents unspecified). The buffer is taken out of the thread's pool
/// while in use, because a thread that waits for others may start another task.
pub(crate) fn with_buffer<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    work(&mut Buffer::new(len))
}

/// A buffer (contents unspecified) that goes back to the pool of the thread that drops it.
pub(crate) struct Buffer {
    numbers: Vec<f32>,
    len: usize,
}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        let mut numbers = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        if numbers.len() < len {
            numbers.resize(len, 0.0);
        }
        Self { numbers, len }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        // A thread that ends has no pool any more.
        let _ = FREE.try_with(|free| free.borrow_mut().push(numbers));
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.numbers[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.len]
    }
}
