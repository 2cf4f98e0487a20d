//! The bytes that a store reports are those that the allocator gave it, and attention over it allocates nothing.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use minicache_core::settings::Axis;
use minicache_core::{CacheSpec, ModelShape, Precision, Resources, Scheme, Side, Store, build};

/// Counts what this thread holds and how often it asked.
struct Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's; the counters are plain cells without destructors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get().wrapping_add(layout.size()));
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn schemes() -> Vec<Scheme> {
    let mut all = vec![Scheme::F32, Scheme::F16];
    for (bits, group) in [(2, 32), (3, 64), (4, 32), (4, 128), (8, 32)] {
        for axis in [Axis::Channel, Axis::Token] {
            all.push(Scheme::Quant { bits, group, axis, residual: 32 });
        }
    }
    all
}

fn row(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 31 + seed * 17) % 101) as f32 / 50.0 - 1.0).collect()
}

#[test]
fn bytes_are_what_the_allocator_gave() {
    let sections = [(8, 16), (4, 48), (3, 64), (2, 100)];
    for side in [Side::Keys, Side::Values] {
        Store::sections(&sections, side).push(&row(228 * 200, 0));
        let before = HELD.get();
        let mut store = Store::sections(&sections, side);
        let fixed = HELD.get() - before;
        (0..1000).for_each(|i| store.push(&row(228, i)));
        let (counted, held) = (store.bytes().total(), HELD.get() - before);
        assert!(
            counted.abs_diff(held - fixed) * 100 <= held,
            "sections {side:?}: {counted} counted, {held} held"
        );
    }
    for scheme in schemes() {
        // The thread's working memory, which is not the store's.
        Store::new(8, 128, scheme, Side::Keys).push(&row(8 * 128 * 200, 0));
        for (heads, dim, tokens) in [(3, 64, 1000), (8, 128, 517), (2, 80, 300), (1, 192, 700)] {
            for side in [Side::Keys, Side::Values] {
                let before = HELD.get();
                let mut store = Store::new(heads, dim, scheme, side);
                let fixed = HELD.get() - before;
                for i in 0..tokens {
                    store.push(&row(heads * dim, i));
                }
                let held = HELD.get() - before;
                let counted = store.bytes().total();
                // The layout (a few hundred bytes, whatever the length) is not the tokens'.
                assert!(
                    counted.abs_diff(held - fixed) * 100 <= held,
                    "{scheme:?} {side:?} {heads}x{dim}: {counted} counted, {held} held"
                );
                store.drop_before(tokens / 2);
                let held = HELD.get() - before;
                let counted = store.bytes().total();
                assert!(
                    counted.abs_diff(held - fixed) * 100 <= held,
                    "{scheme:?}: {counted}, {held} after drop"
                );
            }
        }
    }
}

#[test]
fn attention_allocates_nothing_once_warm() {
    let (heads, dim, tokens, rows) = (2, 64, 400, 3);
    let (q, p) = (row(rows * dim, 1), row(rows * tokens, 2));
    let (mut scores, mut sums) = (vec![0.0; rows * tokens], vec![0.0; rows * dim]);
    for scheme in schemes() {
        for precision in [Precision::Fast, Precision::Exact] {
            let [mut keys, mut values] = [Side::Keys, Side::Values]
                .map(|side| Store::new(heads, dim, scheme, side).with_precision(precision));
            for i in 0..tokens {
                let x = row(heads * dim, i);
                keys.push(&x);
                values.push(&x);
            }
            let mut attend = || {
                for head in 0..heads {
                    keys.scores(head, 0..tokens, &q, rows, &mut scores);
                    values.accumulate(head, 0..tokens, &p, rows, &mut sums);
                }
            };
            attend();
            let before = CALLS.get();
            attend();
            assert_eq!(CALLS.get(), before, "{scheme:?}");
        }
    }
}

#[test]
fn a_decode_step_allocates_only_where_a_page_begins() {
    let shape =
        ModelShape { layers: 4, heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, ..ModelShape::PLAIN };
    let rows: Vec<_> = (0..29).map(|i| (row(256, i), row(128, i + 50), row(128, i + 90))).collect();
    let mut out = vec![0.0; 256];
    for spec in [
        "full",
        "kivi-2",
        "mean",
        "minicache",
        "{ method = \"minicache\", quant = { bits = 4 } }",
        "rotated",
        "turboquant",
        "{ method = \"turboquant\", inner_product = true }",
        "xkv",
    ] {
        let mut cache = build(&CacheSpec::parse(spec).unwrap(), &shape, &Resources::default()).unwrap();
        let mut step = |i: usize| {
            let before = CALLS.get();
            for layer in 0..shape.layers {
                let (q, k, v) = &rows[(i * 5 + layer) % rows.len()];
                cache.attend_into(layer, q, k, v, &mut out).unwrap();
            }
            cache.finish_step().unwrap();
            CALLS.get() - before
        };
        for i in 0..128 {
            step(i);
        }
        let quiet = (128..256).filter(|&i| step(i) == 0).count();
        assert!(quiet >= 96, "{spec}: {quiet} of 128 steps allocate nothing");
    }
}

#[test]
fn a_fork_holds_only_what_it_writes() {
    let (heads, dim) = (4, 128);
    for scheme in schemes() {
        let mut store = Store::new(heads, dim, scheme, Side::Values);
        for i in 0..2000 {
            store.push(&row(heads * dim, i));
        }
        let whole = store.bytes().total();
        let x = row(heads * dim, 0);
        let before = HELD.get();
        let mut fork = store.clone();
        fork.push(&x);
        let own = HELD.get() - before;
        assert!(own * 8 < whole, "{scheme:?}: a fork of {whole} bytes holds {own} of its own");
    }
}
