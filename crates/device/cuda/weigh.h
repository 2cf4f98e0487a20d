// Weighing: queries meet keys and probabilities meet values, in strips of floats or of codes.
//
// Codes meet weights as on the host: queries and probabilities become two signed bytes relative to their largest, and
// byte dot products are exact.

#define WARPS (THREADS / WARP)
// Strips of 16 tokens that a warp takes of a tile: what does not depend on the tokens is made once for them.
#define STRIPS_EACH 2
#define TILE (WARPS * LANES * STRIPS_EACH)
// Query heads of a KV head that a block takes; PASSES blocks share the KV head.
#define G (GROUP / PASSES)
#define MOST_PARTS 1025

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

#define UNITS 32639.0f
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
#pragma unroll
            for (int g = 0; g < G; g++) {
                const uint2 w = fours[g * stride + four];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    low[g][i] = dot4(codes[i], w.x, low[g][i]);
                    high[g][i] = dot4(codes[i], w.y, high[g][i]);
                }
            }
        }
    }
}

// Units of a strip: of its first plane, which is the longest.
FIXED int code_units(int bits, int steps, int width) {
    return ceil_div(ceil_div(steps, 4), 8 / FIRST_PLANE(bits)) * (width / 4);
}
