// What every kernel needs, of CUDA and of the emulated device alike. No header of CUDA's own.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define WARPS (THREADS / WARP)
#define ALL 0xffffffffu

#ifdef EMULATED
#define DEVICE static inline
#define DEVICE_METHOD inline
#else
#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
// One structure by value is all that a kernel takes; THREADS is the size of its blocks.
#define KERNEL(name, Params) extern "C" __global__ void __launch_bounds__(THREADS) name(const Params p)
// The same where registers have to do for so many blocks at a time.
#define KERNEL_OF(blocks, name, Params) \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks) name(const Params p)
#define SHARED __shared__

DEVICE float from_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE u16 round_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Memory that a kernel only reads, which the compiler may then ask for as early as it likes.
DEVICE uint4 read16(const void* at) {
    uint4 x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
    return x;
}

DEVICE uint2 read8(const void* at) {
    uint2 x;
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at));
    return x;
}

DEVICE u64 read_address(const u64* at) {
    u64 x;
    asm("ld.global.nc.u64 %0, [%1];" : "=l"(x) : "l"(at));
    return x;
}

DEVICE u32 read4(const void* at) {
    u32 x;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(at));
    return x;
}

DEVICE u16 read2(const void* at) {
    u16 x;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(at));
    return x;
}

// Unsigned bytes of `a` times signed bytes of `b`, added to `c`.
DEVICE int dot4(u32 a, u32 b, int c) {
    int y;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
#endif

#ifdef EMULATED
DEVICE uint4 read16(const void* at) { return *(const uint4*)at; }
DEVICE uint2 read8(const void* at) { return *(const uint2*)at; }
DEVICE u64 read_address(const u64* at) { return *at; }
DEVICE u32 read4(const void* at) { return *(const u32*)at; }
DEVICE u16 read2(const void* at) { return *(const u16*)at; }
#endif

DEVICE float from_bits(u32 x) {
    union { u32 bits; float number; } y;
    y.bits = x;
    return y.number;
}

DEVICE u32 to_bits(float x) {
    union { float number; u32 bits; } y;
    y.number = x;
    return y.bits;
}

// The same number in all threads of a warp, known to be so.
DEVICE int uniform(int x) { return __shfl_sync(ALL, x, 0); }

// The nearest half; what is too large becomes the largest.
DEVICE u16 to_half(float x) { return round_half(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

// Activations and weights of linear layers: halves, or bfloat16 where BFLOAT is 1.
DEVICE float from_act(u16 x) {
#if BFLOAT
    return from_bits((u32)x << 16);
#else
    return from_half(x);
#endif
}

DEVICE u16 to_act(float x) {
#if BFLOAT
    const u32 bits = to_bits(x);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return to_half(x);
#endif
}

// Writes an activation; what rounding leaves of it goes to `low`, if that is anywhere.
DEVICE void put_act(u64 out, u64 low, u64 i, float x) {
    const u16 high = to_act(x);
    ((u16*)out)[i] = high;
    if (low) ((u16*)low)[i] = to_act(x - from_act(high));
}

DEVICE float warp_sum(float x) {
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}

DEVICE float warp_max(float x) {
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
    return x;
}

DEVICE double warp_sum(double x) {
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}

// The sum over all threads of the block, in each of them.
template <class T>
DEVICE T block_sum(T x) {
    SHARED T parts[WARPS];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = 0;
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    return sum;
}

// How many threads of the block before this one have the bit, after `seen` earlier ones; `seen` grows by all that have it.
DEVICE int rank(bool bit, int* seen) {
    const u32 ballot = __ballot_sync(ALL, bit);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    SHARED int ones[WARPS];
    __syncthreads();
    if (lane == 0) ones[warp] = __popc(ballot);
    __syncthreads();
    int at = *seen + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) at += ones[w];
        *seen += ones[w];
    }
    return at;
}

// The least of each thread's numbers.
DEVICE float block_least(float x) {
    SHARED float parts[WARPS];
    x = -warp_max(-x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) x = fminf(x, parts[i]);
    return x;
}
