// Attention: of every query over what its sequence's cache holds (`attend_held`, split over positions), of the queries of
// a prefill over their own step (`attend_step`), and the two joined (`join`). Softmax parts (largest score m, sum l of
// exp(s - m), weighed values) join by rescaling, as in FlashAttention and Flash-Decoding.
//
// Codes meet weights as on the host: queries and probabilities become two signed bytes relative to their largest, and
// byte dot products are exact.

#define WARPS (THREADS / WARP)
#define TILE (WARPS * LANES)
#define HEADS (KV_HEADS * GROUP)
#define NONE (-1e30f)
// Numbers of a part beside its values: m and l.
#define PART (DIM + 2)

DEVICE void load8(const void* x, int kind, int i, float* y) {
    if (kind == F32) {
        const float4 a = ((const float4*)x)[i / 4], b = ((const float4*)x)[i / 4 + 1];
        y[0] = a.x, y[1] = a.y, y[2] = a.z, y[3] = a.w, y[4] = b.x, y[5] = b.y, y[6] = b.z, y[7] = b.w;
    } else {
        const uint4 a = ((const uint4*)x)[i / 8];
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

// Scores of a strip of 16 float keys: the lane with the result of token t calls `out(t, group row, score)`.
template <class F>
DEVICE void float_scores(const void* strip, int kind, const float* q, int lane, F out) {
    float sums[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < 8; i++) sums[g][i] = 0.0f;
    const int octet = lane % 2;
    for (int c = lane / 2; c < DIM; c += WARP / 2) {
        float x[8];
        load8(strip, kind, c * LANES + octet * 8, x);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float w = q[g * DIM + c];
#pragma unroll
            for (int i = 0; i < 8; i++) sums[g][i] += w * x[i];
        }
    }
    const int token = octet * 8 + (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        float x = fold<8>(sums[g], lane);
        x += __shfl_xor_sync(ALL, x, 2);
        if ((lane & 2) == 0) out(token, g, x);
    }
}

// Two signed bytes for each of four weights, in units of `unit`: words of the low and of the high bytes.
DEVICE uint2 digits(const float* w, float units) {
    uint2 y = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 whole = (u32)(__float2int_rn(w[i] * units) + 0x8080);
        y.x |= ((whole & 255) ^ 128) << 8 * i;
        y.y |= ((whole >> 8 & 255) ^ 128) << 8 * i;
    }
    return y;
}

#define UNITS 32639.0f
// What turns weights of at most `most` into integers, and back.
DEVICE float units_of(float most) { return most > 1e-30f ? UNITS / most : 0.0f; }
DEVICE float step_of(float most) { return most > 1e-30f ? most / UNITS : 0.0f; }

// Sums of four lanes of a strip over a vector of fours (`unit`: vector, then lane quad): `sums[g][lane]` += digits times
// codes. `fours` holds the digits of the strip's steps, `count` of them, a row of `stride` for each of GROUP.
template <int BITS>
DEVICE void code_sums(const u8* strip, int steps, int width, int unit, const uint2* fours, int stride, int (*low)[4],
                      int (*high)[4]) {
    const int quads = width / 4, vector = unit / quads, quad = unit % quads;
    const int count = ceil_div(steps, 4);
#pragma unroll
    for (int plane = 0; plane < (BITS == 3 ? 2 : 1); plane++) {
        constexpr int FIRST = BITS == 3 ? 2 : BITS;
        const int bits = plane == 0 ? FIRST : 1, shift = plane == 0 ? 0 : 2, per = 8 / bits;
        if (vector * per >= count) continue;
        const u8* from = strip + (plane == 0 ? 0 : plane_bytes(2, steps, width));
        const uint4 x = *(const uint4*)(from + (vector * width + quad * 4) * 4);
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
            for (int g = 0; g < GROUP; g++) {
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

// Units of a strip that `code_sums` takes: of its first plane, which is the longest.
template <int BITS>
DEVICE int code_units(int steps, int width) {
    return ceil_div(ceil_div(steps, 4), 8 / (BITS == 3 ? 2 : BITS)) * (width / 4);
}

struct HeldParams {
    u64 q;                 // f32 (rows, HEADS, DIM)
    u64 sequences, rows;   // Sequence, Row
    u64 parts;             // f32 (rows, HEADS, splits + 1, PART)
    Place places[2];
    int splits, length;    // parts, and tokens of each: a multiple of TILE
    int window;            // 0: none
    float scale, softcap;  // softcap 0: none
};

DEVICE float capped(float score, float softcap) {
    return softcap > 0.0f ? softcap * tanhf(score / softcap) : score;
}

// The kept tokens of a column with positions in from..to.
template <int S>
DEVICE void kept_within(const Kept& kept, int from, int to, int* first, int* last) {
    int bounds[2] = {from, to}, found[2];
    for (int b = 0; b < 2; b++) {
        int low = 0, high = kept.count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (*kept_position<S>(kept.blocks, middle) < bounds[b])
                low = middle + 1;
            else
                high = middle;
        }
        found[b] = low;
    }
    *first = found[0], *last = found[1];
}

KERNEL(attend_held, HeldParams) {
    typedef Layout<0> K;
    typedef Layout<1> V;
    constexpr int FOURS = (DIM > TILE ? DIM : TILE) / 4;
    // Warps that share the tokens of a tile, each with strips of its own; the tile's blocks go round the parts.
    constexpr int AROUND = V::STRIPS < WARPS ? WARPS / V::STRIPS : 1;
    constexpr int BESIDE = WARPS / AROUND;
    constexpr int EACH = (V::STRIPS + BESIDE - 1) / BESIDE;

    SHARED float q[GROUP * DIM];
    SHARED float scores[GROUP][TILE];
    SHARED float most[GROUP], total[GROUP], factor[GROUP];
    SHARED uint2 fours[K::KIND == CODES || V::KIND == CODES ? WARPS : 1][GROUP * FOURS];

    const int row = blockIdx.x / p.splits, split = blockIdx.x % p.splits, head = blockIdx.y;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    const Tables& tables = sequence.tables;
    const int len = sequence.len;
    const int seen = p.window > 0 && place.position + 1 > p.window ? place.position + 1 - p.window : 0;
    const int origin = seen / TILE * TILE;
    const int begin = origin + split * p.length, end = begin + p.length < len ? begin + p.length : len;
    float* part = (float*)p.parts + (((u64)row * HEADS + head * GROUP) * (p.splits + 1) + split) * PART;
    const u64 apart = (u64)(p.splits + 1) * PART;
    if (begin >= end) {
        if (threadIdx.x < GROUP) part[threadIdx.x * apart] = NONE, part[threadIdx.x * apart + 1] = 0.0f;
        return;
    }
    const float* queries = (const float*)p.q + ((u64)row * HEADS + head * GROUP) * DIM;
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) q[i] = queries[i] * p.scale;
    if (threadIdx.x < GROUP) most[threadIdx.x] = NONE, total[threadIdx.x] = 0.0f;

    const int packed_keys = K::packed(len), packed_values = V::packed(len);
    const Place key = p.places[0], value = p.places[1];
    const Kept* kept_keys =
        key.pair >= 0 && tables.kept[0]
            ? (const Kept*)tables.kept[0] + key.pair * K::COLUMNS + (K::COLUMNS > 1 ? head : 0)
            : 0;
    const Kept* kept_values =
        value.pair >= 0 && tables.kept[1]
            ? (const Kept*)tables.kept[1] + value.pair * V::COLUMNS + (V::COLUMNS > 1 ? head : 0)
            : 0;

    float sums[EACH][GROUP][8];       // of eight channels, from floats
    float code[EACH][GROUP][4];       // of four channels, from codes
#pragma unroll
    for (int e = 0; e < EACH; e++)
        for (int g = 0; g < GROUP; g++) {
            for (int i = 0; i < 8; i++) sums[e][g][i] = 0.0f;
            for (int i = 0; i < 4; i++) code[e][g][i] = 0.0f;
        }
    __syncthreads();

    for (int tile = begin; tile < end; tile += TILE) {
        // Scores: a strip of 16 tokens to a warp.
        const int first = tile + warp * LANES;
        auto write = [&](int t, int g, float score) { scores[g][first - tile + t] = score; };
        if (K::KIND == CODES && first < packed_keys && first < end) {
            const u8* block = head_of<0>(tables.blocks[0], first, key.store, head);
            const int slot = first % K::SLOTS;
            const u16* scales = (const u16*)(block + K::scales_at());
            uint2* mine = fours[warp];
            float out[GROUP][4], bias[GROUP];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                bias[g] = 0.0f;
                for (int i = 0; i < 4; i++) out[g][i] = 0.0f;
            }
            for (int section = 0; section < K::SECTIONS; section++) {
                const int from = section * K::SECTION;
                const int size = DIM - from < K::SECTION ? DIM - from : K::SECTION;
                float step[GROUP], sum[GROUP];
                for (int g = 0; g < GROUP; g++) {
                    float top = 0.0f;
                    float w[ceil_div(K::SECTION, 4 * WARP)][4];
                    sum[g] = 0.0f;
#pragma unroll
                    for (int n = 0; n < ceil_div(K::SECTION, 4 * WARP); n++) {
                        const int c = (n * WARP + lane) * 4;
                        for (int i = 0; i < 4; i++) {
                            const bool inside = c + i < size;
                            const float x = inside ? q[g * DIM + from + c + i] : 0.0f;
                            const float s = K::ALONG && inside ? from_half(scales[c + i]) : 1.0f;
                            const float z = K::ALONG && inside ? from_half(scales[K::ENTRIES + c + i]) : 1.0f;
                            w[n][i] = x * s;
                            sum[g] += x * z;
                            top = fmaxf(top, fabsf(w[n][i]));
                        }
                    }
                    top = warp_max(top);
                    sum[g] = warp_sum(sum[g]);
                    step[g] = step_of(top);
#pragma unroll
                    for (int n = 0; n < ceil_div(K::SECTION, 4 * WARP); n++) {
                        const int four = n * WARP + lane;
                        if (four * 4 < size) mine[g * FOURS + four] = digits(w[n], units_of(top));
                    }
                }
                __syncwarp();
                int low[GROUP][4], high[GROUP][4];
#pragma unroll
                for (int g = 0; g < GROUP; g++)
                    for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
                const u8* strip = block + K::code_bytes(from) + slot / LANES * strip_bytes(K::BITS, size, LANES);
                const int units = code_units<K::BITS>(size, LANES);
                for (int unit = lane; unit < units; unit += WARP)
                    code_sums<K::BITS>(strip, size, LANES, unit, mine, FOURS, low, high);
                __syncwarp();
                const int token = slot + lane % 4 * 4;
                const u16* own = scales + section * 2 * K::ENTRIES + token;
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    if (K::ALONG) bias[g] += sum[g];
                    for (int i = 0; i < 4; i++) {
                        const float x = ((float)high[g][i] * 256.0f + (float)low[g][i]) * step[g];
                        out[g][i] += K::ALONG ? x : x * from_half(own[i]);
                        // Once, of the eight lanes that share a token.
                        if (!K::ALONG && lane < 4) out[g][i] += sum[g] * from_half(own[K::ENTRIES + i]);
                    }
                }
            }
            const int token = lane % 4 * 4 + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float x = fold<4>(out[g], lane);
                x += __shfl_xor_sync(ALL, x, 4);
                if ((lane & 4) == 0) write(token, g, x + bias[g]);
            }
        }
        if (K::KIND == CODES && first + LANES > packed_keys && first < end && packed_keys < end) {
            const u8* strip = recent_of<0>(tables.recent[0], first, key.store, head);
            float_scores(strip, K::EXACT, q, lane, [&](int t, int g, float score) {
                if (first + t >= packed_keys) write(t, g, score);
            });
        }
        if (K::KIND != CODES && first < end) {
            const u8* block = head_of<0>(tables.blocks[0], first, key.store, head);
            const u8* strip = block + first % K::SLOTS * DIM * bytes_of(K::KIND);
            float_scores(strip, K::KIND, q, lane, write);
        }
        __syncthreads();
        // Kept keys come in the place of merged ones, whose scores are scaled first.
        if (key.pair >= 0) {
            if (tables.magnitudes[0])
                for (int t = threadIdx.x; t < TILE && tile + t < end; t += THREADS) {
                    const float m = magnitude<0>(tables.magnitudes[0], key, head, tile + t);
                    for (int g = 0; g < GROUP; g++) scores[g][t] *= m;
                }
            if (kept_keys) {
                __syncthreads();
                int from, to;
                kept_within<0>(*kept_keys, tile, tile + TILE < end ? tile + TILE : end, &from, &to);
                for (int i = from / LANES + warp; i * LANES < to; i += WARPS) {
                    const int inner = head % K::TOGETHER;
                    const u8* strip = kept_of<0>(kept_keys->blocks, i * LANES, key.member, inner);
                    float_scores(strip, K::EXACT, q, lane, [&](int t, int g, float score) {
                        const int index = i * LANES + t;
                        if (index >= from && index < to)
                            scores[g][*kept_position<0>(kept_keys->blocks, index) - tile] = score;
                    });
                }
            }
            __syncthreads();
        }
        // Softmax: a row to a warp.
        for (int g = warp; g < GROUP; g += WARPS) {
            float top = most[g];
            for (int t = lane; t < TILE; t += WARP) {
                const bool visible = tile + t < end && tile + t >= seen;
                const float score = visible ? capped(scores[g][t], p.softcap) : NONE;
                scores[g][t] = score;
                top = fmaxf(top, score);
            }
            top = warp_max(top);
            float sum = 0.0f;
            for (int t = lane; t < TILE; t += WARP) {
                const float x = scores[g][t] > NONE ? expf(scores[g][t] - top) : 0.0f;
                scores[g][t] = x;
                sum += x;
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                factor[g] = expf(most[g] - top);
                total[g] = total[g] * factor[g] + sum;
                most[g] = top;
            }
        }
        __syncthreads();

        // Values. Probabilities of merged ones are weighed by magnitudes, which are zero for kept ones.
        const int around = warp / BESIDE, beside = warp % BESIDE;
        auto weight = [&](int g, int t) {
            const float x = scores[g][t];
            if (value.pair < 0 || !tables.magnitudes[1]) return x;
            return x == 0.0f ? 0.0f : x * magnitude<1>(tables.magnitudes[1], value, head, tile + t);
        };
        auto float_values = [&](const u8* block, int kind, int slots, int slot, int strip, int e, int count, auto w) {
            const int width = V::width(strip), octets = width / 8;
            const int octet = lane % 2, t = lane / 2;
            if (octet >= octets || t >= count) return;
            float x[8];
            load8(block, kind, strip * LANES * slots + (slot + t) * width + octet * 8, x);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float y = w(g, t);
#pragma unroll
                for (int i = 0; i < 8; i++) sums[e][g][i] += y * x[i];
            }
        };
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int strip = beside + e * BESIDE;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float f = factor[g];
                for (int i = 0; i < 8; i++) sums[e][g][i] *= f;
                for (int i = 0; i < 4; i++) code[e][g][i] *= f;
            }
            if (around >= AROUND || strip >= V::STRIPS) continue;
            if (V::KIND != CODES) {
                for (int t = around * LANES; t < TILE && tile + t < end; t += AROUND * LANES) {
                    const u8* block = head_of<1>(tables.blocks[1], tile + t, value.store, head);
                    float_values(block, V::KIND, V::SLOTS, (tile + t) % V::SLOTS, strip, e, end - tile - t,
                                 [&](int g, int i) { return weight(g, t + i); });
                }
            } else {
                if (tile < packed_values) {
                    const int width = V::width(strip);
                    const int section = V::ALONG ? 0 : strip * LANES / V::SECTION;
                    uint2* mine = fours[warp];
                    float step[GROUP], bias[GROUP];
                    // A lane has the digits of one four of tokens: those of the blocks of this part.
                    const int t = lane * 4, at = tile + t;
                    const bool used = t < TILE && at < packed_values && at < end && t / V::SLOTS % AROUND == around;
                    const u16* scales =
                        used ? (const u16*)(head_of<1>(tables.blocks[1], at, value.store, head) + V::scales_at()) +
                                   section * 2 * V::ENTRIES
                             : 0;
                    for (int g = 0; g < GROUP; g++) {
                        float w[4], top = 0.0f, sum = 0.0f;
                        for (int i = 0; i < 4; i++) {
                            const bool inside = used && at + i < packed_values && at + i < end;
                            const float x = inside ? weight(g, t + i) : 0.0f;
                            const int slot = (at + i) % V::SLOTS;
                            w[i] = V::ALONG || !inside ? x : x * from_half(scales[slot]);
                            if (!V::ALONG && inside) sum += x * from_half(scales[V::ENTRIES + slot]);
                            top = fmaxf(top, fabsf(w[i]));
                        }
                        top = warp_max(top);
                        step[g] = step_of(top);
                        bias[g] = V::ALONG ? 0.0f : warp_sum(sum);
                        mine[g * FOURS + lane] = digits(w, units_of(top));
                    }
                    __syncwarp();
                    int low[GROUP][4], high[GROUP][4];
#pragma unroll
                    for (int g = 0; g < GROUP; g++)
                        for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
                    for (int b = around; b * V::SLOTS < TILE; b += AROUND) {
                        const int from = tile + b * V::SLOTS;
                        if (from >= packed_values || from >= end) break;
                        const u8* block = head_of<1>(tables.blocks[1], from, value.store, head);
                        const u8* codes = block + V::code_bytes(strip * LANES);
                        const int units = code_units<V::BITS>(V::SLOTS, width);
                        for (int unit = lane; unit < units; unit += WARP)
                            code_sums<V::BITS>(codes, V::SLOTS, width, unit, mine + b * (V::SLOTS / 4), FOURS, low, high);
                        if (V::ALONG) {
                            // Scales and zeros are the channels' own, in each block.
                            const u16* own = (const u16*)(block + V::scales_at()) + strip * LANES + lane % (width / 4) * 4;
                            for (int g = 0; g < GROUP; g++) {
                                float sum = 0.0f;
                                for (int i = lane; i < V::SLOTS; i += WARP)
                                    if (from + i < end) sum += weight(g, from - tile + i);
                                sum = warp_sum(sum);
                                for (int i = 0; i < 4; i++) {
                                    const float x = ((float)high[g][i] * 256.0f + (float)low[g][i]) * step[g];
                                    code[e][g][i] += x * from_half(own[i]);
                                    if (lane < width / 4) code[e][g][i] += sum * from_half(own[V::ENTRIES + i]);
                                    low[g][i] = high[g][i] = 0;
                                }
                            }
                        }
                    }
                    if (!V::ALONG) {
#pragma unroll
                        for (int g = 0; g < GROUP; g++)
                            for (int i = 0; i < 4; i++) {
                                code[e][g][i] += ((float)high[g][i] * 256.0f + (float)low[g][i]) * step[g];
                                if (lane < width / 4) code[e][g][i] += bias[g];
                            }
                    }
                    __syncwarp();
                }
                // Those that wait.
                const int waiting = packed_values > tile ? packed_values / LANES * LANES - tile : 0;
                for (int t = waiting; packed_values < end && t < TILE && tile + t < end; t += LANES) {
                    if (t / LANES % AROUND != around) continue;
                    const u8* block = recent_of<1>(tables.recent[1], tile + t, value.store, head);
                    float_values(block, V::EXACT, RECENT, 0, strip, e, end - tile - t, [&](int g, int i) {
                        return tile + t + i < packed_values ? 0.0f : weight(g, t + i);
                    });
                }
            }
            if (kept_values && around == 0) {
                int from, to;
                kept_within<1>(*kept_values, tile, tile + TILE < end ? tile + TILE : end, &from, &to);
                for (int i = from / RECENT * RECENT; i < to; i += RECENT) {
                    const u8* block = kept_of<1>(kept_values->blocks, i, value.member, head % V::TOGETHER);
                    float_values(block, V::EXACT, RECENT, 0, strip, e, to - i, [&](int g, int j) {
                        return i + j < from ? 0.0f : scores[g][*kept_position<1>(kept_values->blocks, i + j) - tile];
                    });
                }
            }
        }
        __syncthreads();
    }

    // The lanes' sums together: one after the other of the parts of a tile writes to shared memory.
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) q[i] = 0.0f;
    __syncthreads();
    for (int around = 0; around < AROUND; around++) {
        if (warp / BESIDE == around)
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int strip = warp % BESIDE + e * BESIDE;
                if (strip >= V::STRIPS) continue;
                const int width = V::width(strip);
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    for (int i = 0; i < 8; i++)
                        for (int d = 2; d < WARP; d *= 2) sums[e][g][i] += __shfl_xor_sync(ALL, sums[e][g][i], d);
                    if (lane < width / 8)
                        for (int i = 0; i < 8; i++) q[g * DIM + strip * LANES + lane * 8 + i] += sums[e][g][i];
                    __syncwarp();
                    if (V::KIND == CODES) {
                        for (int i = 0; i < 4; i++)
                            for (int d = width / 4; d < WARP; d *= 2)
                                code[e][g][i] += __shfl_xor_sync(ALL, code[e][g][i], d);
                        if (lane < width / 4)
                            for (int i = 0; i < 4; i++) q[g * DIM + strip * LANES + lane * 4 + i] += code[e][g][i];
                    }
                }
            }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) part[i / DIM * apart + 2 + i % DIM] = q[i];
    if (threadIdx.x < GROUP)
        part[threadIdx.x * apart] = most[threadIdx.x], part[threadIdx.x * apart + 1] = total[threadIdx.x];
}

struct StepParams {
    u64 q, k, v;             // f32 (rows, HEADS, DIM), f32 (rows, KV_HEADS, DIM)
    u64 sequences, tiles;    // Sequence; Row: a sequence, and the first of its rows in the tile
    u64 parts;
    int splits, window;
    float scale, softcap;
};

// Rows and columns of a tile of scores, and how its states and probabilities are held.
#if PRECISE
#define SQUARE (DIM <= 128 ? 32 : 16)
typedef float Number;
DEVICE Number to_number(float x) { return x; }
DEVICE float from_number(Number x) { return x; }
#else
#define SQUARE (DIM <= 128 ? 64 : 32)
typedef u16 Number;
DEVICE Number to_number(float x) { return to_half(x); }
DEVICE float from_number(Number x) { return from_half(x); }
#endif

DEVICE void pair(const Number* x, float* y) {
#if PRECISE
    y[0] = x[0], y[1] = x[1];
#else
    const u32 both = *(const u32*)x;
    y[0] = from_half((u16)both), y[1] = from_half((u16)(both >> 16));
#endif
}

// Causal attention of a prefill's tokens to each other. A block has SQUARE queries of one head.
KERNEL(attend_step, StepParams) {
    constexpr int N = SQUARE, M = N / 16, C = (DIM + 15) / 16, WIDE = DIM + 2;
    SHARED Number queries[N * WIDE], states[N * WIDE], chances[N * (N + 2)];
    const Row tile = ((const Row*)p.tiles)[blockIdx.x];
    const Sequence& sequence = ((const Sequence*)p.sequences)[tile.sequence];
    const int head = blockIdx.y, kv = head / GROUP, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int first = tile.position, rows = sequence.rows - first < N ? sequence.rows - first : N;
    const u64 base = sequence.first;
    for (int i = threadIdx.x; i < N * DIM; i += THREADS) {
        const int r = i / DIM, c = i % DIM;
        const float q = r < rows ? ((const float*)p.q)[((base + first + r) * HEADS + head) * DIM + c] : 0.0f;
        queries[r * WIDE + c] = to_number(q * p.scale);
    }
    float out[M][C], most[M], total[M];
#pragma unroll
    for (int i = 0; i < M; i++) {
        most[i] = NONE, total[i] = 0.0f;
        for (int c = 0; c < C; c++) out[i][c] = 0.0f;
    }
    const int start = p.window > 0 && first + 1 > p.window ? (first + 1 - p.window) / N * N : 0;
    for (int at = start; at < first + rows; at += N) {
        __syncthreads();
        for (int i = threadIdx.x; i < N * DIM; i += THREADS) {
            const int r = i / DIM, c = i % DIM;
            const bool inside = at + r < sequence.rows;
            states[r * WIDE + c] =
                to_number(inside ? ((const float*)p.k)[((base + at + r) * KV_HEADS + kv) * DIM + c] : 0.0f);
        }
        __syncthreads();
        float s[M][M];
#pragma unroll
        for (int i = 0; i < M; i++)
            for (int j = 0; j < M; j++) s[i][j] = 0.0f;
        for (int c = 0; c < DIM; c += 2) {
            float a[M][2], b[M][2];
#pragma unroll
            for (int i = 0; i < M; i++) {
                pair(&queries[(y * M + i) * WIDE + c], a[i]);
                pair(&states[(x + 16 * i) * WIDE + c], b[i]);
            }
#pragma unroll
            for (int i = 0; i < M; i++)
                for (int j = 0; j < M; j++) s[i][j] += a[i][0] * b[j][0] + a[i][1] * b[j][1];
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
            const int row = first + y * M + i;
            float top = most[i];
#pragma unroll
            for (int j = 0; j < M; j++) {
                const int column = at + x + 16 * j;
                const bool visible = column <= row && (p.window == 0 || column + p.window > row);
                s[i][j] = visible ? capped(s[i][j], p.softcap) : NONE;
                top = fmaxf(top, s[i][j]);
            }
            for (int d = 8; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
            const float factor = expf(most[i] - top);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < M; j++) {
                const float e = s[i][j] > NONE ? expf(s[i][j] - top) : 0.0f;
                chances[(y * M + i) * (N + 2) + x + 16 * j] = to_number(e);
                sum += e;
            }
            for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
            total[i] = total[i] * factor + sum;
            most[i] = top;
            for (int c = 0; c < C; c++) out[i][c] *= factor;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < N * DIM; i += THREADS) {
            const int r = i / DIM, c = i % DIM;
            const bool inside = at + r < sequence.rows;
            states[r * WIDE + c] =
                to_number(inside ? ((const float*)p.v)[((base + at + r) * KV_HEADS + kv) * DIM + c] : 0.0f);
        }
        __syncthreads();
        for (int r = 0; r < N; r++) {
            float e[M];
#pragma unroll
            for (int i = 0; i < M; i++) e[i] = from_number(chances[(y * M + i) * (N + 2) + r]);
#pragma unroll
            for (int c = 0; c < C; c++) {
                if (DIM % 16 != 0 && x + 16 * c >= DIM) continue;
                const float v = from_number(states[r * WIDE + x + 16 * c]);
                for (int i = 0; i < M; i++) out[i][c] += e[i] * v;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        const int row = first + y * M + i;
        if (y * M + i >= rows) continue;
        float* part = (float*)p.parts + (((base + row) * HEADS + head) * (p.splits + 1) + p.splits) * PART;
        if (x == 0) part[0] = most[i], part[1] = total[i];
#pragma unroll
        for (int c = 0; c < C; c++)
            if (x + 16 * c < DIM) part[2 + x + 16 * c] = out[i][c];
    }
}

struct JoinParams {
    u64 parts, q, k, v, sequences, rows;
    u64 out, low;  // act (rows, HEADS, DIM)
    int splits;
    float scale, softcap;
};

// The parts of a query together; a token that is alone in its step sees itself here. A warp to a head.
KERNEL(join, JoinParams) {
    const int head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= HEADS) return;
    const u64 row = blockIdx.x;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    const bool alone = sequence.rows == 1;
    const float* parts = (const float*)p.parts + (row * HEADS + head) * (p.splits + 1) * PART;
    const float* k = (const float*)p.k + (row * KV_HEADS + head / GROUP) * DIM;
    const float* v = (const float*)p.v + (row * KV_HEADS + head / GROUP) * DIM;
    const float* q = (const float*)p.q + (row * HEADS + head) * DIM;
    float own = 0.0f;
    if (alone) {
        for (int c = lane; c < DIM; c += WARP) own += q[c] * k[c];
        own = capped(warp_sum(own) * p.scale, p.softcap);
    }
    const int first = sequence.len > 0 ? 0 : p.splits, last = alone ? p.splits : p.splits + 1;
    float most = alone ? own : NONE;
    for (int s = first; s < last; s++) most = fmaxf(most, parts[s * PART]);
    float total = alone ? expf(own - most) : 0.0f;
    for (int s = first; s < last; s++)
        if (parts[s * PART + 1] > 0.0f) total += parts[s * PART + 1] * expf(parts[s * PART] - most);
    for (int c = lane; c < DIM; c += WARP) {
        float sum = alone ? expf(own - most) * v[c] : 0.0f;
        for (int s = first; s < last; s++)
            if (parts[s * PART + 1] > 0.0f) sum += expf(parts[s * PART] - most) * parts[s * PART + 2 + c];
        put_act(p.out, p.low, (row * HEADS + head) * DIM + c, sum / total);
    }
}
