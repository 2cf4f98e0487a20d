//! Threads that stay awake through a forward step.
//!
//! A step of one token is some 150 short parallel regions with little between them. Rayon sends a thread to sleep that has
//! found nothing to do for some 20 microseconds, and waking it takes as long again: a few dozen times a token.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// Steps in progress.
static STEPS: AtomicUsize = AtomicUsize::new(0);

/// Rounds of looking for work in vain after which a thread lets others of the machine's run.
const ROUNDS: usize = 16;

/// How long a thread looks for work in vain. It must not be until the step ends: a thread that takes a part of the step
/// first, and begins to look while it waits for a part of that part, holds up the very step whose end it would wait for.
const PATIENCE: Duration = Duration::from_millis(1);

/// Keeps the pool's other threads looking for work until it is dropped, if this is the only step in progress: of several
/// steps the threads may wait for each other, and have enough to do.
pub(crate) struct Awake(Arc<AtomicBool>);

impl Awake {
    /// On a thread of the pool.
    pub(crate) fn new() -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let alone = STEPS.fetch_add(1, Ordering::AcqRel) == 0;
        let own = rayon::current_thread_index();
        if alone && own.is_some() && rayon::current_num_threads() > 1 {
            let ended = ended.clone();
            // Not of a scope, which would wait for threads that are busy with something else.
            rayon::spawn_broadcast(move |thread| {
                if Some(thread.index()) != own {
                    look_for_work(|| ended.load(Ordering::Acquire) || STEPS.load(Ordering::Acquire) != 1);
                }
            });
        }
        Self(ended)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        STEPS.fetch_sub(1, Ordering::AcqRel);
    }
}

fn look_for_work(ended: impl Fn() -> bool) {
    let mut since = Instant::now();
    while since.elapsed() < PATIENCE {
        for _ in 0..ROUNDS {
            if ended() {
                return;
            }
            if rayon::yield_now() == Some(Yield::Executed) {
                since = Instant::now();
                continue;
            }
            // The more threads there are, the less often each looks into the others' work.
            (0..4 * rayon::current_num_threads()).for_each(|_| spin_loop());
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use rayon::prelude::*;

    use super::*;

    /// One test at a time: their steps would be each other's.
    static ONE: Mutex<()> = Mutex::new(());

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
    }

    /// Regions within regions, which wait for each other's threads.
    fn work(depth: u32) -> u32 {
        match depth {
            0 => 1,
            _ => (0..4).into_par_iter().map(|_| work(depth - 1)).sum(),
        }
    }

    /// Steps one after the other, several at once, and within each other's regions: all come to their end, whichever
    /// thread takes what.
    #[test]
    fn steps_end() {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            let step = || {
                rayon::scope(|_| {
                    let _awake = Awake::new();
                    work(4)
                })
            };
            pool.install(|| {
                for _ in 0..200 {
                    assert_eq!(step(), 256);
                }
                let all: u32 = (0..200).into_par_iter().map(|_| step()).sum();
                assert_eq!(all, 200 * 256);
                let (a, b) = rayon::join(step, || (0..8).into_par_iter().map(|_| step()).sum::<u32>());
                assert_eq!((a, b), (256, 8 * 256));
            });
            let sum = AtomicU32::new(0);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        (0..50).for_each(|_| _ = sum.fetch_add(pool.install(step), Ordering::Relaxed))
                    });
                }
            });
            assert_eq!(sum.into_inner(), 150 * 256);
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
    }

    /// A thread that is busy with something else when a step begins is not waited for.
    #[test]
    fn a_busy_thread_is_not_waited_for() {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = pool(2);
        let (busy, done) = (AtomicBool::new(false), AtomicBool::new(false));
        pool.scope(|scope| {
            scope.spawn(|_| {
                busy.store(true, Ordering::Release);
                while !done.load(Ordering::Acquire) {
                    spin_loop();
                }
            });
            scope.spawn(|_| {
                while !busy.load(Ordering::Acquire) {
                    spin_loop();
                }
                drop(Awake::new());
                done.store(true, Ordering::Release);
            });
        });
    }

    /// A thread that begins to look for work within a part of the step that it looks for lets that part go on.
    #[test]
    fn a_part_of_the_step_goes_on() {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = pool(2);
        let (begun, awake, done) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
        let until = |flag: &AtomicBool| {
            while !flag.load(Ordering::Acquire) {
                spin_loop();
            }
        };
        pool.scope(|scope| {
            scope.spawn(|_| {
                begun.store(true, Ordering::Release);
                until(&awake);
                // As in a wait: the first thing found is to look for work.
                rayon::yield_now();
                done.store(true, Ordering::Release);
            });
            scope.spawn(|_| {
                until(&begun);
                let _step = Awake::new();
                awake.store(true, Ordering::Release);
                until(&done);
            });
        });
    }
}
