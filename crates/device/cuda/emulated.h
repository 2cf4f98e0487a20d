// A device of the host's: kernels are compiled by a C++ compiler, blocks run one after the other, and the threads of a
// block are fibres that take turns at barriers and shuffles. One launch at a time has a file of kernels.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };

namespace emulated {

const int MOST = 1024;
const size_t STACK = 256 << 10;

struct Barrier {
    int arrived = 0, alive = 0;
    unsigned turns = 0;
};

struct Fibre {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    bool done = false;
    // The barrier that it waits at, and the turn that it has to see end.
    const Barrier* at = nullptr;
    unsigned turn = 0;
    // What it gives in exchanges, by turns: a thread is at most one exchange ahead of its warp.
    uint64_t slots[2] = {0, 0};
    unsigned exchanges = 0;
};

static Fibre fibres[MOST];
static Barrier block, warps[MOST / 32];
static void* scheduler;
static int now;
static Index grid, block_index, block_size;
static void (*body)(const void*);
static const void* parameters;
static bool moved;

extern "C" void minicache_fibre_switch(void** from, void* to) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(".text\n.globl minicache_fibre_switch\n.hidden minicache_fibre_switch\nminicache_fibre_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
const int SAVED = 6;
#elif defined(__aarch64__)
asm(".text\n.globl minicache_fibre_switch\n.hidden minicache_fibre_switch\nminicache_fibre_switch:\n"
    "sub sp, sp, #176\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #176\nret\n");
#else
#error "the emulated device knows x86-64 and AArch64"
#endif

[[noreturn]] static inline void fail(const char* what) {
    fprintf(stderr, "emulated device: block (%u, %u, %u), thread %d: %s\n", block_index.x, block_index.y,
            block_index.z, now, what);
    abort();
}

static inline void yield() { minicache_fibre_switch(&fibres[now].stack_pointer, scheduler); }

static inline void open(Barrier& barrier) {
    barrier.arrived = 0;
    barrier.turns++;
}

static inline void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.alive) return open(barrier);
    fibres[now].at = &barrier;
    fibres[now].turn = barrier.turns;
    yield();
}

static inline bool waits(const Fibre& fibre) { return fibre.at && fibre.at->turns == fibre.turn; }

static inline void leave(Barrier& barrier) {
    barrier.alive--;
    if (barrier.alive > 0 && barrier.arrived == barrier.alive) open(barrier);
}

static inline void start() {
    body(parameters);
    fibres[now].done = true;
    leave(block);
    leave(warps[now / 32]);
    yield();
    fail("a finished thread went on");
}

static inline void prepare(Fibre& fibre) {
    if (!fibre.stack) fibre.stack = static_cast<char*>(malloc(STACK));
    uintptr_t top = reinterpret_cast<uintptr_t>(fibre.stack) + STACK;
    top &= ~static_cast<uintptr_t>(15);
#if defined(__x86_64__)
    // As after a call: the stack is off by one word where a function begins.
    void** at = reinterpret_cast<void**>(top) - 2;
    *at = reinterpret_cast<void*>(&start);
    at -= SAVED;
    memset(at, 0, SAVED * sizeof(void*));
#else
    void** at = reinterpret_cast<void**>(top - 176);
    memset(at, 0, 176);
    at[11] = reinterpret_cast<void*>(&start);
#endif
    fibre.stack_pointer = at;
    fibre.done = false;
    fibre.at = nullptr;
    fibre.exchanges = 0;
}

static inline void run_block(int threads) {
    block = Barrier{0, threads, 0};
    for (int w = 0; w * 32 < threads; w++) warps[w] = Barrier{0, threads - w * 32 < 32 ? threads - w * 32 : 32, 0};
    for (int t = 0; t < threads; t++) prepare(fibres[t]);
    for (int left = threads; left > 0;) {
        moved = false;
        // A warp for as long as it gets on, then the next.
        for (int first = 0; first < threads; first += 32) {
            for (bool on = true; on;) {
                on = false;
                for (now = first; now < first + 32; now++) {
                    Fibre& fibre = fibres[now];
                    if (fibre.done || waits(fibre)) continue;
                    fibre.at = nullptr;
                    on = moved = true;
                    minicache_fibre_switch(&scheduler, fibre.stack_pointer);
                    left -= fibre.done;
                }
            }
        }
        now = 0;
        if (!moved) fail("threads wait for each other at different barriers");
    }
}

static inline void run(const unsigned* shape, void (*kernel)(const void*), const void* params) {
    static std::mutex one;
    std::lock_guard<std::mutex> lock(one);
    grid = Index{shape[0], shape[1], shape[2]};
    block_size = Index{shape[3], 1, 1};
    if (shape[3] > MOST || shape[3] % 32 != 0) fail("blocks have whole warps, at most 1024 threads");
    body = kernel;
    parameters = params;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = Index{x, y, z};
                run_block(static_cast<int>(shape[3]));
            }
}

// Gives a word to the warp; `read` then sees those of the others.
static inline unsigned give(const void* value, size_t bytes) {
    const unsigned turn = fibres[now].exchanges++ % 2;
    memcpy(&fibres[now].slots[turn], value, bytes);
    wait(warps[now / 32]);
    return turn;
}

template <class T>
static inline T exchange(T value, int partner) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a word");
    const unsigned turn = give(&value, sizeof(T));
    T other;
    memcpy(&other, &fibres[partner].slots[turn], sizeof(T));
    return other;
}

static inline unsigned ballot(bool bit) {
    const unsigned turn = give(&bit, sizeof(bit));
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) {
        bool other;
        memcpy(&other, &fibres[now / 32 * 32 + lane].slots[turn], sizeof(other));
        all |= (unsigned)other << lane;
    }
    return all;
}

}  // namespace emulated

#define threadIdx (Index{(unsigned)emulated::now, 0, 0})
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid)
#define SHARED static
#define KERNEL(name, Params)                                                              \
    static void name##_body(const Params& p);                                             \
    static void name##_call(const void* p) { name##_body(*static_cast<const Params*>(p)); } \
    extern "C" void name(const unsigned* shape, const void* p) { emulated::run(shape, name##_call, p); } \
    static void name##_body(const Params& p)

#define KERNEL_OF(blocks, name, Params) KERNEL(name, Params)

static inline void __syncthreads() { emulated::wait(emulated::block); }
static inline void __syncwarp() { emulated::wait(emulated::warps[emulated::now / 32]); }

template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int distance) {
    return emulated::exchange(value, emulated::now ^ distance);
}

template <class T>
static inline T __shfl_sync(unsigned, T value, int lane) {
    return emulated::exchange(value, (emulated::now & ~31) | lane);
}

static inline int __popc(unsigned x) { return __builtin_popcount(x); }

static inline unsigned __ballot_sync(unsigned, bool bit) { return emulated::ballot(bit); }

static inline float from_half(unsigned short x) {
    const unsigned sign = (unsigned)(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    unsigned bits;
    if (exponent == 0) {
        const float small = (float)mantissa * (1.0f / 16777216.0f);
        memcpy(&bits, &small, 4);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline unsigned short round_half(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    const unsigned sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x7f800000) return (unsigned short)(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (size < 0x38800000) {
        float small;
        memcpy(&small, &size, 4);
        return (unsigned short)(sign | (unsigned)nearbyintf(small * 16777216.0f));
    }
    const unsigned rounded = size + 0xfff + (size >> 13 & 1);
    const unsigned half = (rounded >> 13) - (112u << 10);
    return (unsigned short)(sign | (half > 0x7c00 ? 0x7c00 : half));
}

static inline int dot4(unsigned a, unsigned b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(a >> 8 * i & 255) * (int)(signed char)(b >> 8 * i & 255);
    return c;
}
