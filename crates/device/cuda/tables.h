// What the kernels of all caches know of memory: blocks of tokens in the host's layout (see `minicache_core::store`), and
// tables of them.
//
// Keys lie in strips of 16 tokens with a step for each channel, values in strips of 16 channels (the last may be narrower)
// with a step for each token. Floats: a number for each step and lane. Codes: steps in fours, a byte for each lane and step
// of a four; codes below 8 bits share bytes.

enum { F16, F32, CODES };

#define LANES 16
#define RECENT 16       // tokens of a block of those that wait to be quantised, and of kept ones
#define CONST static constexpr int

#define FIXED DEVICE constexpr

FIXED int ceil_div(int a, int b) { return (a + b - 1) / b; }
FIXED int lines(int bytes) { return ceil_div(bytes, 64) * 64; }
FIXED int bytes_of(int kind) { return kind == F32 ? 4 : 2; }
// Codes of three bits lie in two planes.
#define FIRST_PLANE(bits) ((bits) == 3 ? 2 : (bits))
// Bytes of a plane of `bits` of a strip.
FIXED int plane_bytes(int bits, int steps, int width) { return ceil_div(ceil_div(steps, 4), 8 / bits) * 4 * width; }
FIXED int strip_bytes(int bits, int steps, int width) {
    return bits == 3 ? plane_bytes(2, steps, width) + plane_bytes(1, steps, width) : plane_bytes(bits, steps, width);
}

// One sequence's tables: for each side those of the blocks, of the waiting tokens' and of the magnitudes' pages.
struct Tables {
    u64 blocks[2], recent[2], magnitudes[2], kept[2], sinks[2];
};

struct Sequence {
    Tables tables;
    int len;         // tokens held before the step
    int first, rows; // its rows in the step
    int pad;
};

struct Row {
    int sequence, position;
};

template <class T>
DEVICE T* entry(u64 table, int i) {
    return (T*)read_address((const u64*)table + i);
}

// Index of a number in a vector's floats of `dim` in a block of `slots` tokens.
template <int S>
DEVICE int float_at(int dim, int slots, int slot, int channel) {
    if (S == 0) return (slot / LANES * dim + channel) * LANES + slot % LANES;
    const int strip = channel / LANES, left = dim - strip * LANES;
    return strip * LANES * slots + slot * (left < LANES ? left : LANES) + channel % LANES;
}

DEVICE float load(const void* x, int kind, int i) {
    return kind == F32 ? ((const float*)x)[i] : from_half(((const u16*)x)[i]);
}

DEVICE void store(void* x, int kind, int i, float y) {
    if (kind == F32)
        ((float*)x)[i] = y;
    else
        ((u16*)x)[i] = to_half(y);
}

// The same of what a kernel only reads.
DEVICE float read(const void* x, int kind, int i) {
    return kind == F32 ? from_bits(read4((const float*)x + i)) : from_half(read2((const u16*)x + i));
}

// Eight numbers of what a kernel only reads.
DEVICE void load8(const void* x, int kind, int i, float* y) {
    if (kind == F32) {
        const uint4 a = read16((const float*)x + i), b = read16((const float*)x + i + 4);
        const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = from_bits(words[j]);
    } else {
        const uint4 a = read16((const u16*)x + i);
        const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            y[2 * j] = from_half((u16)(words[j] & 0xffff));
            y[2 * j + 1] = from_half((u16)(words[j] >> 16));
        }
    }
}

#define HEADS (KV_HEADS * GROUP)
// A score below all others.
#define NONE (-1e30f)

DEVICE float capped(float score, float softcap) {
    return softcap > 0.0f ? softcap * tanhf(score / softcap) : score;
}
