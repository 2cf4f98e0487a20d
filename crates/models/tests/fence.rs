//! No kernel reads or writes beyond what it was given: every allocation ends where memory ends.
//!
//! While it is told to, the allocator of this test puts what is asked for at the end of pages of their own, followed by
//! pages that may not be touched, and takes freed pages away. A read of one number too many ends the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor};
use minicache_config::WeightMode;
use minicache_core::kernels::{Isa, with_isa};
use minicache_core::{CacheSpec, Resources, Side, Store, build};
use minicache_models::packed::PackedMatrix;
use minicache_models::{Decoder, Gguf, LoadOptions, LogitsFor, ModelConfig, Safetensors, Step};

/// Addresses are never used twice.
const REGION: usize = 1 << 40;
const PAGE: usize = 4096;
/// What is smaller is not what kernels work on.
const SMALLEST: usize = 64;

struct Fence;

static ON: AtomicBool = AtomicBool::new(false);
static START: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);
static FENCED: AtomicUsize = AtomicUsize::new(0);

impl Fence {
    /// Pages for `layout`, the last of them out of bounds.
    fn pages(layout: Layout) -> usize {
        (layout.size().div_ceil(PAGE) + 1) * PAGE
    }

    fn owns(pointer: *const u8) -> bool {
        let start = START.load(SeqCst);
        start > 0 && (start..start + REGION).contains(&(pointer as usize))
    }
}

// SAFETY: what is given out is mapped, writable, aligned and nobody else's; the rest is the system allocator's.
unsafe impl GlobalAlloc for Fence {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let fits = layout.size() >= SMALLEST && layout.align() <= PAGE;
        if !fits || !ON.load(SeqCst) {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        }
        let pages = Self::pages(layout);
        let at = START.load(SeqCst) + NEXT.fetch_add(pages, SeqCst);
        if at + pages > START.load(SeqCst) + REGION {
            return ptr::null_mut();
        }
        // SAFETY: these pages of the reserved region are this allocation's alone.
        if unsafe { libc::mprotect(at as *mut _, pages - PAGE, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return ptr::null_mut();
        }
        FENCED.fetch_add(1, SeqCst);
        let end = at + pages - PAGE;
        ((end - layout.size()) / layout.align() * layout.align()) as *mut u8
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if !Self::owns(pointer) {
            // SAFETY: the caller's promise.
            return unsafe { System.dealloc(pointer, layout) };
        }
        let first = pointer as usize / PAGE * PAGE;
        let length = Self::pages(layout) - PAGE;
        // SAFETY: the allocation's own pages, given back and out of bounds from now on.
        unsafe {
            libc::madvise(first as *mut _, length, libc::MADV_DONTNEED);
            libc::mprotect(first as *mut _, length, libc::PROT_NONE);
        }
    }
}

#[global_allocator]
static FENCE: Fence = Fence;

/// Runs `work` with all that it allocates fenced in, on one thread with the instructions of `isa`.
fn fenced(isa: Isa, work: impl FnOnce() + Send) {
    if START.load(SeqCst) == 0 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: address space that nothing else has; nothing is there before it is made writable.
        let start = unsafe { libc::mmap(ptr::null_mut(), REGION, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        START.store(start as usize, SeqCst);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        with_isa(isa, || {
            ON.store(true, SeqCst);
            work();
            ON.store(false, SeqCst);
        });
    });
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

const SPECS: [&str; 18] = [
    "full",
    "{ method = \"full\", dtype = \"f32\" }",
    "fp8",
    "{ method = \"rotated\", quant = { bits = 3, residual = 5 } }",
    "turboquant-4",
    "{ method = \"turboquant\", bits = 3, inner_product = true }",
    "mean",
    "{ method = \"minicache\", start_layer = 0, quant = { bits = 4, residual = 8 } }",
    "{ method = \"minicache\", start_layer = 0, granularity = \"head\", residual = 5, quant = { bits = 2, residual = 0, retained = true } }",
    "{ method = \"rank_one\", start_layer = 1, sinks = 1 }",
    "kivi-2",
    "{ method = \"rtn\", quant = { bits = 3, residual = 0 } }",
    "{ method = \"smoothquant\", activation_bits = 8 }",
    "{ method = \"h2o\", heavy = 6, recent = 6 }",
    "{ method = \"sinks\", sinks = 2, recent = 9 }",
    "{ method = \"snapkv\", kept = 15, window = 6, kernel = 3 }",
    "{ method = \"expected_attention\", kept = 15 }",
    "{ method = \"xkv\", group = 2, rank_k = 5, rank_v = 7 }",
];

/// A prompt and some tokens of two sequences side by side, with every cache.
fn steps(decoder: &Decoder, tokens: &[u32]) {
    for spec in SPECS {
        let spec = CacheSpec::parse(spec).unwrap();
        let new = || {
            let resources = Resources { rotary: Some(decoder.rotary(60)), latent: None };
            decoder.sequence(build(&spec, decoder.shape(), &resources).unwrap(), 60)
        };
        let (mut a, mut b) = (new(), new());
        for (of_a, of_b) in [(0..37, 0..1), (37..38, 1..2), (38..39, 2..13), (39..40, 13..14)] {
            let mut steps = [
                Step { tokens: &tokens[of_a], sequence: &mut a, logits: LogitsFor::All },
                Step { tokens: &tokens[of_b], sequence: &mut b, logits: LogitsFor::Last },
            ];
            let logits = decoder.forward(&mut steps).unwrap();
            assert!(logits.iter().flatten().all(|x| x.is_finite()), "{}", spec.label());
        }
    }
}

/// One test: the allocator is all of the process's.
#[test]
fn nothing_is_touched_beyond_its_end() {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 200).collect();
    let options = |weights| LoadOptions { weights, ..LoadOptions::default() };
    for isa in Isa::available() {
        fenced(isa, || {
            for name in ["llama3", "phi3", "mixtral", "qwen3"] {
                let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
                let config = ModelConfig::from_json(&text).unwrap();
                let source = Safetensors::open(fixture(name)).unwrap();
                let decoder = Decoder::load(&config, &source, &options(WeightMode::Auto)).unwrap();
                steps(&decoder, &tokens);
            }
            let gguf = Gguf::open(&fixture("gguf/llama3.q8_0.gguf")).unwrap();
            let config = gguf.config().unwrap();
            let decoder = Decoder::load(&config, &gguf, &options(WeightMode::Quantized)).unwrap();
            steps(&decoder, &tokens);
            // What latents are stored in.
            for side in [Side::Keys, Side::Values] {
                for mut store in [
                    Store::trellis(&[(1, 48), (2, 40), (3, 33), (8, 16)], side),
                    Store::sections(&[(2, 40), (3, 33), (4, 16), (8, 17)], side),
                ] {
                    let (dim, tokens) = (store.dim(), 75);
                    let x: Vec<f32> = (0..tokens * dim).map(|i| (i as f32 * 0.3).sin()).collect();
                    store.push(&x);
                    let (mut scores, mut sums) = (vec![0.0; 3 * (tokens - 5)], vec![0.0; 3 * dim]);
                    let weights = vec![0.01; 3 * (tokens - 5)];
                    match side {
                        Side::Keys => store.scores(0, 5..tokens, &x[..3 * dim], 3, &mut scores),
                        Side::Values => store.accumulate(0, 5..tokens, &weights, 3, &mut sums),
                    }
                    assert!(scores.iter().chain(&sums).all(|x| x.is_finite()));
                }
            }
            // Products of packed weights of every format, and sizes that fill no panel.
            for (dtype, outputs, rows) in [
                (GgmlDType::Q4_0, 33, 1),
                (GgmlDType::Q4_1, 47, 5),
                (GgmlDType::Q8_0, 17, 3),
                (GgmlDType::Q4K, 16, 9),
            ] {
                let numbers: Vec<f32> = (0..outputs * 256).map(|i| (i as f32 * 0.7).sin()).collect();
                let weights =
                    candle_core::Tensor::from_vec(numbers.clone(), (outputs, 256), &Device::Cpu).unwrap();
                let weights = QTensor::quantize(&weights, dtype).unwrap();
                let Some(packed) = PackedMatrix::from_qtensor(&weights).unwrap() else { continue };
                let mut out = vec![0.0; rows * outputs];
                packed.matmul(&numbers[..rows * 256], rows, &mut out);
                assert!(out.iter().all(|x| x.is_finite()));
            }
        });
    }
    assert!(FENCED.load(SeqCst) > 10_000, "{} allocations were fenced", FENCED.load(SeqCst));
}
