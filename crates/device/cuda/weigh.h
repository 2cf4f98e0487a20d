// Weighing: queries meet keys and probabilities meet values, in strips of floats or of codes.
//
// Codes meet weights as on the host: queries and probabilities become two signed bytes relative to their largest, and
// byte dot products are exact.

// Strips of 16 tokens that a warp takes of a tile: what does not depend on the tokens is made once for them.
#define STRIPS_EACH 2
#define TILE (WARPS * LANES * STRIPS_EACH)
// Query heads of a KV head that a block takes; PASSES blocks share the KV head.
#define G (GROUP / PASSES)
#define MOST_PARTS 1025

// Halves a lane's N numbers with its partner at each distance in turn, adding the partner's; what is left is one number
// (N = 8: lanes 2 apart share it).
template <int N>
DEVICE float fold(float* x, int lane) {
#pragma unroll
    for (int n = N / 2, d = WARP / 2; n > 0; n /= 2, d /= 2) {
        const bool high = lane & d;
        for (int i = 0; i < n; i++) {
            const float give = high ? x[i] : x[i + n], keep = high ? x[i + n] : x[i];
            x[i] = keep + __shfl_xor_sync(ALL, give, d);
        }
    }
    return x[0];
}

// The token whose score a lane has in the end: of `float_scores`, and of scores of codes.
DEVICE int float_token(int lane) {
    return lane % 2 * 8 + (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
}
DEVICE int code_token(int lane) { return lane % 4 * 4 + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0); }

// Scores of a strip of 16 float keys of `dim` numbers under queries `stride` apart: the lane with the result of token t
// calls `out(t, query head, score)`.
template <class F>
DEVICE void float_scores(const void* strip, int kind, const float* q, int dim, int stride, int lane, F out) {
    float sums[G][8];
#pragma unroll
    for (int g = 0; g < G; g++)
        for (int i = 0; i < 8; i++) sums[g][i] = 0.0f;
    const int octet = lane % 2;
#pragma unroll 4
    for (int c = lane / 2; c < dim; c += WARP / 2) {
        float x[8];
        load8(strip, kind, c * LANES + octet * 8, x);
#pragma unroll
        for (int g = 0; g < G; g++) {
            const float w = q[g * stride + c];
#pragma unroll
            for (int i = 0; i < 8; i++) sums[g][i] += w * x[i];
        }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
        float x = fold<8>(sums[g], lane);
        x += __shfl_xor_sync(ALL, x, 2);
        if ((lane & 2) == 0) out(float_token(lane), g, x);
    }
}

#ifndef DIGITS
#define DIGITS 2
#endif
// The largest integer weight, of so many bytes (DIGITS): a weight of one byte has nothing in its high one.
#define UNITS (DIGITS == 1 ? 127.0f : 32639.0f)
// What turns weights of at most `most` into integers, and back.
DEVICE float units_of(float most) { return most > 1e-30f ? UNITS / most : 0.0f; }
DEVICE float step_of(float most) { return most > 1e-30f ? most / UNITS : 0.0f; }

// Two signed bytes for each of four weights: words of the low and of the high bytes.
DEVICE uint2 digits(const float* w, float units) {
    u32 whole[4];
    // Rounded by what a sum with 1.5 * 2^23 has in its last bits.
#pragma unroll
    for (int i = 0; i < 4; i++) whole[i] = to_bits(w[i] * units + 12582912.0f) + 0x8080;
    uint2 y;
    y.x = (whole[0] & 255) | (whole[1] & 255) << 8 | (whole[2] & 255) << 16 | whole[3] << 24;
    y.y = (whole[0] >> 8 & 255) | (whole[1] & 0xff00) | (whole[2] & 0xff00) << 8 | (whole[3] & 0xff00) << 16;
    y.x ^= 0x80808080u, y.y ^= 0x80808080u;
    return y;
}

DEVICE void four_halves(const u16* from, float* y) {
    const uint2 x = read8(from);
    y[0] = from_half((u16)x.x), y[1] = from_half((u16)(x.x >> 16));
    y[2] = from_half((u16)x.y), y[3] = from_half((u16)(x.y >> 16));
}

// A vector of fours for four lanes of a strip (`unit`: vector, then lane quad), as it lies: plane by plane.
template <int BITS> struct Raw {
    uint4 planes[BITS == 3 ? 2 : 1];
};

template <int BITS>
DEVICE Raw<BITS> load_codes(const u8* strip, int steps, int width, int unit) {
    const int quads = width / 4, vector = unit / quads, quad = unit % quads;
    Raw<BITS> raw;
    raw.planes[0] = read16(strip + (vector * width + quad * 4) * 4);
    if (BITS == 3 && vector * 8 < ceil_div(steps, 4))
        raw.planes[BITS == 3 ? 1 : 0] =
            read16(strip + plane_bytes(2, steps, width) + (vector * width + quad * 4) * 4);
    return raw;
}

// Adds the sums of four lanes over a four, of which each has a word of bytes.
DEVICE void add_four(const u32* bytes, const uint2* fours, int stride, int four, int (*low)[4], int (*high)[4]) {
#pragma unroll
    for (int g = 0; g < G; g++) {
        const uint2 w = fours[g * stride + four];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            low[g][i] = dot4(bytes[i], w.x, low[g][i]);
            if (DIGITS > 1) high[g][i] = dot4(bytes[i], w.y, high[g][i]);
        }
    }
}

// Adds the sums of four lanes over a vector of fours: `fours` holds the digits of the strip's steps, a row of `stride` for
// each query head.
template <int BITS>
DEVICE void code_sums(const Raw<BITS>& raw, int steps, int width, int unit, const uint2* fours, int stride, int (*low)[4],
                      int (*high)[4]) {
    const int vector = unit / (width / 4), count = ceil_div(steps, 4);
#pragma unroll
    for (int plane = 0; plane < (BITS == 3 ? 2 : 1); plane++) {
        const int bits = plane == 0 ? FIRST_PLANE(BITS) : 1, shift = plane == 0 ? 0 : 2, per = 8 / bits;
        if (vector * per >= count) continue;
        const uint4 x = raw.planes[plane];
        const u32 words[4] = {x.x, x.y, x.z, x.w};
        const u32 mask = (0xffu >> (8 - bits)) * 0x01010101u;
#pragma unroll
        for (int k = 0; k < per; k++) {
            const int four = vector * per + k;
            if (four >= count) break;
            u32 codes[4];
#pragma unroll
            for (int i = 0; i < 4; i++) codes[i] = (words[i] >> k * bits & mask) << shift;
            add_four(codes, fours, stride, four, low, high);
        }
    }
}

// Units of a strip: of its first plane, which is the longest.
FIXED int code_units(int bits, int steps, int width) {
    return ceil_div(ceil_div(steps, 4), 8 / FIRST_PLANE(bits)) * (width / 4);
}

// How the parts of a query join: those from `first` to `last`, and the token itself where it is alone in its step.
struct Joined {
    const float* parts;
    int first, last;
    bool alone;
    float itself, total;  // what the token itself weighs, and all together
};

// Of the row and head of this block, with parts of NUMBERS numbers (the largest score and the sum first): what each part
// weighs goes to `chances`. What every warp needs every warp computes.
template <int NUMBERS, class P>
DEVICE Joined join_parts(const P& p, float* chances) {
    const u64 row = blockIdx.x;
    const int head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    const float* k = (const float*)p.k + (row * KV_HEADS + head / GROUP) * DIM;
    const float* q = (const float*)p.q + (row * HEADS + head) * DIM;
    Joined joined;
    joined.alone = sequence.rows == 1;
    joined.parts = (const float*)p.parts + (row * HEADS + head) * (p.splits + 1) * NUMBERS;
    joined.first = sequence.len > 0 ? 0 : p.splits, joined.last = joined.alone ? p.splits : p.splits + 1;
    float own = NONE, most = NONE;
    if (joined.alone) {
        own = 0.0f;
        for (int c = lane; c < DIM; c += WARP) own += q[c] * k[c];
        own = most = capped(warp_sum(own) * p.scale, p.softcap);
    }
    for (int s = joined.first + lane; s < joined.last; s += WARP) most = fmaxf(most, joined.parts[s * NUMBERS]);
    most = warp_max(most);
    float total = 0.0f;
    for (int s = joined.first + lane; s < joined.last; s += WARP) {
        const float held = joined.parts[s * NUMBERS + 1];
        const float chance = held > 0.0f ? expf(joined.parts[s * NUMBERS] - most) : 0.0f;
        if (warp == 0) chances[s] = chance;
        total += held * chance;
    }
    joined.itself = joined.alone ? expf(own - most) : 0.0f;
    joined.total = warp_sum(total) + joined.itself;
    __syncthreads();
    return joined;
}
