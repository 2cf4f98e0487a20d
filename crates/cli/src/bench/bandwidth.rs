//! The memory-bandwidth bound of this machine.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Reads 256 MiB with all threads of the current rayon pool, five times, and gives the best rate in GB/s (10^9 bytes
/// per second): the bound for decoding, which reads its cache once per token.
pub(crate) fn bandwidth_gb_s() -> f64 {
    const WORDS: usize = 256 << 17;
    let data: Vec<u64> = (0..WORDS as u64).collect();
    let part = WORDS.div_ceil(rayon::current_num_threads());
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        let sum = data.par_chunks(part).map(read).reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    size_of_val(&data[..]) as f64 / best / 1e9
}

/// Touches every word; independent sums keep the loads, not the additions, the limit.
fn read(data: &[u64]) -> u64 {
    let mut sums = [0_u64; 32];
    for words in data.chunks_exact(32) {
        for (sum, &word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}
