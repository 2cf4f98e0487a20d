// Attention over latents: queries are mapped to them once (`map_queries`), scores and sums are of latents
// (`attend_latents`, split over positions), and what comes of all parts is mapped back to values (`join_latents`).
//
// <q, k> = <q, k's rotated mean> + <q~, z>, where the mean meets a table of phases; sum_i p_i v_i = (sum_i p_i) mean +
// B sum_i p_i z_i. Exact tokens, the first and the newest, meet the query itself.

// Numbers of a mapped query: itself, its part for the mean, its part for latents.
#define MAPPED (2 * DIM + K_RANK)
// Numbers of a sum: of exact values, the weight of all latents, of latents.
#define SUM (DIM + 1 + V_RANK)
// Numbers of a part: m, l and its sum.
#define PART (2 + SUM)
#define KEY_FOURS ceil_div(K_RANK, 4)
#define TILE_FOURS (TILE / 4)

struct MapParams {
    u64 q, out;    // f32 (rows, HEADS, DIM), f32 (rows, HEADS, MAPPED)
    u64 sets;      // Set, of the layer's group
    int layer;     // of the group
    float scale;
};

// A block to a row and query head.
KERNEL(map_queries, MapParams) {
    SHARED float q[DIM];
    const u64 row = (u64)blockIdx.x * HEADS + blockIdx.y;
    const int head = blockIdx.y / GROUP, half = DIM / 2;
    const Set& set = set_of(p.sets, head);
    const int member = p.layer * set.heads + head - set.head;
    const float *mean = (const float*)set.mean + member * DIM, *map = (const float*)set.restore + (u64)member * DIM * set.rank;
    float* out = (float*)p.out + row * MAPPED;
    for (int i = threadIdx.x; i < DIM; i += THREADS) q[i] = out[i] = ((const float*)p.q)[row * DIM + i] * p.scale;
    __syncthreads();
    for (int i = threadIdx.x; i < DIM; i += THREADS) {
        const int j = i % half;
        // Re(conj(q) mean e^{i phase}) = a cos - b sin.
        out[DIM + i] = i < half ? q[j] * mean[j] + q[j + half] * mean[j + half] : q[j + half] * mean[j] - q[j] * mean[j + half];
    }
    for (int c = threadIdx.x; c < K_RANK; c += THREADS) {
        float sum = 0.0f;
        if (c < set.rank)
#pragma unroll 8
            for (int i = 0; i < DIM; i++) sum += q[i] * map[(u64)i * set.rank + c];
        out[2 * DIM + c] = sum;
    }
}

struct LatentParams {
    u64 q;                // f32 (rows, HEADS, MAPPED)
    u64 sequences, rows;  // Sequence, Row
    u64 parts;            // f32 (rows, HEADS, splits + 1, PART)
    u64 sets[2];          // Set, of the layer's groups
    u64 phases;           // EXACT, strips of 16 positions by DIM
    u64 levels;           // u8 (3, LEVELS)
    int layer;            // among those of exact tokens
    int splits, length;   // parts, and indices of each: a multiple of TILE
    int window;           // 0: none
    float softcap;        // 0: none
};

// Adds the byte sums of four lanes of a strip over a vector of fours, of any width, or of a narrow strip of a trellis.
template <int S>
DEVICE void slow_sums(const Section& section, const u8* strip, int number, int steps, int width, int vector, int quad,
                      const u8* levels, const uint2* fours, int stride, int (*low)[4], int (*high)[4]) {
    const int per = 8 / FIRST_PLANE(section.bits), count = ceil_div(steps, 4);
    const int end = (vector + 1) * per < count ? (vector + 1) * per : count;
#pragma unroll 1
    for (int four = vector * per; four < end; four++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int lane = quad * 4 + i;
            if (lane >= width) continue;
            const u32 x = section.trellis
                              ? levels_of(levels, windows_of<S>(section, strip, number, steps, width, four, lane))
                              : codes_of(strip, section.bits, steps, width, four, lane);
#pragma unroll
            for (int g = 0; g < G; g++) {
                const uint2 w = fours[g * stride + four];
                low[g][i] = dot4(x, w.x, low[g][i]);
                if (DIGITS > 1) high[g][i] = dot4(x, w.y, high[g][i]);
            }
        }
    }
}

template <int BITS>
DEVICE void fast_sums(const u8* strip, int steps, int width, int unit, const uint2* fours, int stride, int (*low)[4],
                      int (*high)[4]) {
    code_sums<BITS>(load_codes<BITS>(strip, steps, width, unit), steps, width, unit, fours, stride, low, high);
}

// The codes of four lanes of a full strip over a vector of fours of the first plane.
template <int BITS> struct Quad {
    u32 words[4], third[4];  // the words of the first plane, and of three bits the last bit's, shifted to the vector
    DEVICE_METHOD void load(const u8* strip, int steps, int vector, int quad) {
        const uint4 x = read16(strip + (vector * LANES + quad * 4) * 4);
        words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
        if (BITS != 3) return;
        const uint4 y = read16(strip + plane_bytes(2, steps, LANES) + (vector / 2 * LANES + quad * 4) * 4);
        const int shift = vector % 2 * 4;
        third[0] = y.x >> shift, third[1] = y.y >> shift, third[2] = y.z >> shift, third[3] = y.w >> shift;
    }
    DEVICE_METHOD void none() {
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = third[i] = 0;
    }
    // Those of a lane at a four of the vector, a byte each.
    DEVICE_METHOD u32 at(int i, int four) const {
        constexpr int FIRST = FIRST_PLANE(BITS);
        const u32 x = words[i] >> four * FIRST & (0xffu >> (8 - FIRST)) * 0x01010101u;
        return BITS == 3 ? x | (third[i] >> four & 0x01010101u) << 2 : x;
    }
};

// Windows of a trellis moved on by a code.
template <int BITS>
DEVICE u32 moved(u32 windows, u32 codes) {
    return (windows & (63u >> BITS) * 0x01010101u) << BITS | codes;
}

// `fast_sums` of a full strip of a trellis. The codes before the first of a vector are in the vector before it (keys, along
// the steps of a strip) or in the lanes before (values, along those of all strips of a section).
template <int S, int BITS>
DEVICE void trellis_sums(const u8* strip, int number, int steps, int vector, int quad, const u8* levels, const uint2* fours,
                         int stride, int (*low)[4], int (*high)[4]) {
    constexpr int PER = 8 / FIRST_PLANE(BITS), BACK = WINDOW / BITS - 1, QUADS = S == 0 ? 1 : ceil_div(BACK, 4);
    const int count = ceil_div(steps, 4);
    Quad<BITS> own, before[QUADS];
    own.load(strip, steps, vector, quad);
#pragma unroll
    for (int n = 0; n < QUADS; n++) {
        const int place = quad - 1 - n;
        if (S == 0 ? vector == 0 : place < 0 && number == 0)
            before[n].none();
        else if (S == 0)
            before[n].load(strip, steps, vector - 1, quad);
        else
            before[n].load(place < 0 ? strip - strip_bytes(BITS, steps, LANES) : strip, steps, vector, place & 3);
    }
#pragma unroll
    for (int k = 0; k < PER; k++) {
        const int four = vector * PER + k;
        if (four >= count) break;
        u32 windows = 0;
        if (S == 1)
#pragma unroll
            for (int back = BACK; back > 0; back--)
                windows = moved<BITS>(windows, before[(back - 1) / 4].at(3 - (back - 1) % 4, k));
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 now = own.at(i, k);
            if (S == 1) {
                windows = moved<BITS>(windows, now);
            } else {
                const u32 last = k > 0 ? own.at(i, k > 0 ? k - 1 : 0) : before[0].at(i, PER - 1);
                const u32 first = BITS > 1 ? 0 : k > 1 ? own.at(i, k > 1 ? k - 2 : 0) : before[0].at(i, PER - 2 + k);
                windows = windows_along(BITS, now, last, first);
            }
            x[i] = levels_of(levels, windows);
        }
        add_four(x, fours, stride, four, low, high);
    }
}

template <int S>
DEVICE void sums_of(const Section& section, const u8* strip, int number, int steps, int width, int vector, int quad,
                    const u8* levels, const uint2* fours, int stride, int (*low)[4], int (*high)[4]) {
    constexpr int FORMS = Latents<S>::FORMS;
    const int unit = vector * (width / 4) + quad, form = section.bits + (section.trellis ? TRELLIS : 0);
    const u8* own = levels + (section.bits - 1) * LEVELS;
    if ((FORMS & 1) && (width % 4 != 0 || (section.trellis && width != LANES)))
        slow_sums<S>(section, strip, number, steps, width, vector, quad, own, fours, stride, low, high);
    else if ((FORMS >> (TRELLIS + 1) & 1) && form == TRELLIS + 1)
        trellis_sums<S, 1>(strip, number, steps, vector, quad, own, fours, stride, low, high);
    else if ((FORMS >> (TRELLIS + 2) & 1) && form == TRELLIS + 2)
        trellis_sums<S, 2>(strip, number, steps, vector, quad, own, fours, stride, low, high);
    else if ((FORMS >> (TRELLIS + 3) & 1) && form == TRELLIS + 3)
        trellis_sums<S, 3>(strip, number, steps, vector, quad, own, fours, stride, low, high);
    else if ((FORMS >> 2 & 1) && form == 2)
        fast_sums<2>(strip, steps, width, unit, fours, stride, low, high);
    else if ((FORMS >> 3 & 1) && form == 3)
        fast_sums<3>(strip, steps, width, unit, fours, stride, low, high);
    else if ((FORMS >> 4 & 1) && form == 4)
        fast_sums<4>(strip, steps, width, unit, fours, stride, low, high);
    else if (FORMS >> 8 & 1)
        fast_sums<8>(strip, steps, width, unit, fours, stride, low, high);
}

// A weight as its digits have it. Zeros are weighed so too: codes and their zeros nearly cancel, and what rounding adds to
// one it has to add to the other.
DEVICE float rounded_weight(float w, float units) { return w * units + 12582912.0f - 12582912.0f; }

// Vectors of fours of a strip.
DEVICE int vectors_of(int bits, int steps) { return ceil_div(ceil_div(steps, 4), 8 / FIRST_PLANE(bits)); }

KERNEL_OF(2, attend_latents, LatentParams) {
    typedef Latents<0> K;
    typedef Latents<1> V;
    SHARED float q[G * MAPPED];
    SHARED uint2 digits_of_keys[K::KIND == CODES ? G * KEY_FOURS : 1];
    SHARED float section_step[G][K::SECTIONS], section_sum[G][K::SECTIONS];
    SHARED float scores[G][TILE], exact[G * DIM], latents[G * V_RANK];
    SHARED float warp_most[G][WARPS], totals[G][WARPS], weights_all[G][WARPS];
    SHARED uint2 fours[V::KIND == CODES ? WARPS : 1][G * TILE_FOURS];
    SHARED u8 levels[3 * LEVELS];

    const int row = blockIdx.x / p.splits, split = blockIdx.x % p.splits, head = blockIdx.y / PASSES;
    const int first_head = head * GROUP + blockIdx.y % PASSES * G;
    const int warp = uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    const Tables& tables = sequence.tables;
    const int len = uniform(sequence.len), position = uniform(place.position);
    const int visible_from = p.window > 0 && position + 1 > p.window ? position + 1 - p.window : 0;
    // Of indices; sinks are apart.
    const int count = len > SINKS ? len - SINKS : 0, seen = visible_from > SINKS ? visible_from - SINKS : 0;
    const int packed = latents_of(len);
    const int begin = seen / TILE * TILE + split * p.length, end = begin + p.length < count ? begin + p.length : count;
    const int sinks = len < SINKS ? len : SINKS;
    const bool has_sinks = split == 0 && visible_from < sinks;
    float* part = (float*)p.parts + (((u64)row * HEADS + first_head) * (p.splits + 1) + split) * PART;
    const u64 apart = (u64)(p.splits + 1) * PART;
    if (begin >= end && !has_sinks) {
        if (threadIdx.x < G) part[threadIdx.x * apart] = NONE, part[threadIdx.x * apart + 1] = 0.0f;
        return;
    }
    const Set &keys = set_of(p.sets[0], head), &values = set_of(p.sets[1], head);
    const Section* key_sections = (const Section*)keys.sections;

    const float* queries = (const float*)p.q + ((u64)row * HEADS + first_head) * MAPPED;
    for (int i = threadIdx.x; i < G * MAPPED; i += THREADS) q[i] = queries[i];
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) exact[i] = 0.0f;
    for (int i = threadIdx.x; i < G * V_RANK; i += THREADS) latents[i] = 0.0f;
    for (int i = threadIdx.x; i < 3 * LEVELS; i += THREADS) levels[i] = ((const u8*)p.levels)[i];
    __syncthreads();
    // Mapped queries in two bytes, relative to the largest number of a section.
    if (K::KIND == CODES)
        for (int s = warp; s < keys.section_count; s += WARPS) {
            const Section section = key_sections[s];
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float* x = q + g * MAPPED + 2 * DIM + section.first;
                float top = 0.0f, sum = 0.0f;
                for (int i = lane; i < section.size; i += WARP) top = fmaxf(top, fabsf(x[i]));
                top = warp_max(top);
                const float units = units_of(top);
                for (int f = lane; f < ceil_div(section.size, 4); f += WARP) {
                    float w[4];
                    for (int i = 0; i < 4; i++) {
                        w[i] = f * 4 + i < section.size ? x[f * 4 + i] : 0.0f;
                        sum += rounded_weight(w[i], units);
                    }
                    digits_of_keys[g * KEY_FOURS + section.first / 4 + f] = digits(w, units);
                }
                sum = warp_sum(sum) * step_of(top);
                if (lane == 0) section_step[g][s] = step_of(top), section_sum[g][s] = sum;
            }
        }

    float most[G], total[G], weight_all[G];
#pragma unroll
    for (int g = 0; g < G; g++) most[g] = NONE, total[g] = 0.0f, weight_all[g] = 0.0f;
    if (has_sinks) {
        for (int t = warp; t < sinks; t += WARPS) {
            const u8* from = sink_of(tables.sinks[0], t, p.layer, head);
#pragma unroll
            for (int g = 0; g < G; g++) {
                float sum = 0.0f;
                for (int c = lane; c < DIM; c += WARP) sum += q[g * MAPPED + c] * load(from, EXACT, sink_index(t, c));
                sum = warp_sum(sum);
                if (lane == 0) scores[g][t] = t >= visible_from ? capped(sum, p.softcap) : NONE;
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++)
            for (int t = 0; t < sinks; t++) most[g] = fmaxf(most[g], scores[g][t]);
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++)
            for (int t = threadIdx.x; t < sinks; t += THREADS) {
                const float x = scores[g][t] > NONE ? expf(scores[g][t] - most[g]) : 0.0f;
                scores[g][t] = x, total[g] += x;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < G * DIM; i += THREADS) {
            const int c = i % DIM;
            float sum = 0.0f;
            for (int t = visible_from; t < sinks; t++)
                sum += scores[i / DIM][t] * load(sink_of(tables.sinks[1], t, p.layer, head), EXACT, sink_index(t, c));
            exact[i] = sum;
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int tile = begin; tile < end; tile += TILE) {
        // Scores: two strips of 16 tokens to a warp.
#pragma unroll 1
        for (int s = 0; s < STRIPS_EACH; s++) {
            const int first = tile + (warp * STRIPS_EACH + s) * LANES;
            if (first >= end || first + LANES <= seen) continue;
            if (first < packed) {
                const u8* phases = (const u8*)p.phases + (u64)first * DIM * bytes_of(EXACT);
                float_scores(phases, EXACT, q + DIM, DIM, MAPPED, lane,
                             [&](int t, int g, float score) { scores[g][first - tile + t] = score; });
                __syncwarp();
                const u8* block = latents_at<0>(tables.blocks[0], first, keys);
                const int slot = first % K::SLOTS;
                if (K::KIND == CODES) {
                    float out[G][4];
#pragma unroll
                    for (int g = 0; g < G; g++)
                        for (int i = 0; i < 4; i++) out[g][i] = 0.0f;
                    const int quad = lane % 4;
#pragma unroll 1
                    for (int from = 0; from < keys.section_count;) {
                        const Section section = key_sections[from];
                        const int bytes = strip_bytes(section.bits, section.size, LANES);
                        const int vectors = vectors_of(section.bits, section.size);
#pragma unroll 1
                        for (int n = lane / 4; n < section.alike * vectors; n += WARP / 4) {
                            const int ahead = n / vectors, vector = n % vectors, number = from + ahead;
                            const u8* strip = block + section.codes + (ahead * (K::SLOTS / LANES) + slot / LANES) * bytes;
                            int low[G][4], high[G][4];
#pragma unroll
                            for (int g = 0; g < G; g++)
                                for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
                            sums_of<0>(section, strip, 0, section.size, LANES, vector, quad, levels,
                                       digits_of_keys + (section.first + ahead * section.size) / 4, KEY_FOURS, low, high);
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                float scale, zero;
                                scale_of<0>(block, keys, section, number, slot + quad * 4 + i, &scale, &zero);
#pragma unroll
                                for (int g = 0; g < G; g++) {
                                    const float x = (float)high[g][i] * 256.0f + (float)low[g][i];
                                    out[g][i] += x * section_step[g][number] * scale;
                                    if (vector == 0) out[g][i] += section_sum[g][number] * zero;
                                }
                            }
                        }
                        from += section.alike;
                    }
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        float x = fold<4>(out[g], lane);
                        x += __shfl_xor_sync(ALL, x, 4);
                        if ((lane & 4) == 0) scores[g][first - tile + code_token(lane)] += x;
                    }
                } else {
                    float_scores(block + (u64)slot * keys.rank * bytes_of(K::KIND), K::KIND, q + 2 * DIM, keys.rank, MAPPED,
                                 lane, [&](int t, int g, float score) { scores[g][first - tile + t] += score; });
                }
                __syncwarp();
            }
            if (first + LANES > packed && packed < end) {
                const u8* strip = newest_of(tables.recent[0], first, p.layer, head);
                float_scores(strip, EXACT, q, DIM, MAPPED, lane, [&](int t, int g, float score) {
                    if (first + t >= packed) scores[g][first - tile + t] = score;
                });
            }
        }
        __syncthreads();
        // Softmax: the largest scores by warp, then all together. A lane has a token.
        const int own = threadIdx.x, index = tile + own;
        const bool visible = index < end && index >= seen;
        float score[G], factor[G], largest[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            score[g] = visible ? capped(scores[g][own], p.softcap) : NONE;
            const float top = warp_max(score[g]);
            if (lane == 0) warp_most[g][warp] = top;
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++) {
            float here = NONE;
            for (int w = 0; w < WARPS; w++) here = fmaxf(here, warp_most[g][w]);
            const float top = fmaxf(most[g], here);
            largest[g] = here > NONE ? expf(here - top) : 0.0f;
            const float x = score[g] > NONE ? expf(score[g] - top) : 0.0f;
            factor[g] = expf(most[g] - top);
            scores[g][own] = x;
            total[g] = total[g] * factor[g] + x;
            weight_all[g] = weight_all[g] * factor[g] + (index < packed ? x : 0.0f);
            most[g] = top;
        }
        __syncthreads();
        const int stop = packed < end ? packed : end;
#pragma unroll 1
        for (int n = warp; n < values.strip_count; n += WARPS) {
            const Strip strip = ((const Strip*)values.strips)[n];
            if (V::KIND == CODES) {
                const Section section = ((const Section*)values.sections)[strip.section];
                const int number = (strip.first - section.first) / LANES;
                uint2* mine = fours[warp];
                // A lane has the digits of some fours of tokens.
                constexpr int OWN = TILE_FOURS / WARP;
                auto scales = [&](int at, float* scale, float* off) {
                    *scale = *off = 0.0f;
                    if (at < stop && at >= seen)
                        scale_of<1>(latents_at<1>(tables.blocks[1], at, values), values, section, strip.section,
                                    at % V::SLOTS, scale, off);
                };
                float zero[G], top = 0.0f;
#pragma unroll
                for (int g = 0; g < G; g++) zero[g] = 0.0f;
#pragma unroll
                for (int i = 0; i < OWN * 4; i++) {
                    float scale, off;
                    scales(tile + (i / 4 * WARP + lane) * 4 + i % 4, &scale, &off);
                    top = fmaxf(top, scale);
                }
                top = warp_max(top);
                __syncwarp();
                // Scales are read again, which is cheaper than to have registers for them.
#pragma unroll
                for (int m = 0; m < OWN; m++) {
                    float w[G][4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int t = (m * WARP + lane) * 4 + i;
                        float scale, off;
                        scales(tile + t, &scale, &off);
#pragma unroll
                        for (int g = 0; g < G; g++) {
                            const float units = units_of(top * largest[g]), step = step_of(top * largest[g]);
                            w[g][i] = scores[g][t] * scale;
                            // Of a section whose numbers are all the same, the zero is all there is.
                            zero[g] += scale > 0.0f ? rounded_weight(w[g][i], units) * step * (off / scale) : scores[g][t] * off;
                        }
                    }
#pragma unroll
                    for (int g = 0; g < G; g++)
                        mine[g * TILE_FOURS + m * WARP + lane] = digits(w[g], units_of(top * largest[g]));
                }
                __syncwarp();
                int low[G][4], high[G][4];
#pragma unroll
                for (int g = 0; g < G; g++)
                    for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
                const int vectors = vectors_of(section.bits, V::SLOTS), quad = lane % 4;
#pragma unroll 1
                for (int m = lane / 4; m < TILE / V::SLOTS * vectors && quad * 4 < strip.width; m += WARP / 4) {
                    const int block = m / vectors, from = tile + block * V::SLOTS;
                    if (from >= stop || from + V::SLOTS <= seen) continue;
                    sums_of<1>(section, latents_at<1>(tables.blocks[1], from, values) + strip.codes, number, V::SLOTS,
                               strip.width, m % vectors, quad, levels, mine + block * (V::SLOTS / 4), TILE_FOURS, low, high);
                }
                __syncwarp();
#pragma unroll
                for (int g = 0; g < G; g++) {
                    const float all = warp_sum(zero[g]), step = step_of(top * largest[g]);
                    for (int i = 0; i < 4; i++) {
                        float x = (float)high[g][i] * 256.0f + (float)low[g][i];
                        for (int d = 4; d < WARP; d *= 2) x += __shfl_xor_sync(ALL, x, d);
                        float* to = &latents[g * V_RANK + strip.first + lane * 4 + i];
                        if (lane < 4 && lane * 4 + i < strip.width) *to = *to * factor[g] + x * step + all;
                    }
                }
            } else {
                // Floats: a lane has a channel, and every other token.
                const int channel = lane % LANES;
                float sum[G];
#pragma unroll
                for (int g = 0; g < G; g++) sum[g] = 0.0f;
                for (int t = lane / LANES; t < TILE && tile + t < stop; t += WARP / LANES) {
                    if (tile + t < seen || channel >= strip.width) continue;
                    const u8* block = latents_at<1>(tables.blocks[1], tile + t, values);
                    const float x = load(block, V::KIND,
                                         float_at<1>(values.rank, V::SLOTS, (tile + t) % V::SLOTS, strip.first + channel));
#pragma unroll
                    for (int g = 0; g < G; g++) sum[g] += scores[g][t] * x;
                }
#pragma unroll
                for (int g = 0; g < G; g++) {
                    const float x = sum[g] + __shfl_xor_sync(ALL, sum[g], LANES);
                    float* to = &latents[g * V_RANK + strip.first + channel];
                    if (lane < strip.width && lane < LANES) *to = *to * factor[g] + x;
                }
            }
        }
        // Those that are exact.
        for (int i = threadIdx.x; i < G * DIM; i += THREADS) {
            float f = factor[0], sum = 0.0f;
#pragma unroll
            for (int g = 1; g < G; g++)
                if (i / DIM == g) f = factor[g];
            for (int t = packed > tile ? packed - tile : 0; t < TILE && tile + t < end; t++)
                if (tile + t >= seen) {
                    const u8* block = newest_of(tables.recent[1], tile + t, p.layer, head);
                    sum += scores[i / DIM][t] * load(block, EXACT, float_at<1>(DIM, RECENT, (tile + t) % RECENT, i % DIM));
                }
            exact[i] = exact[i] * f + sum;
        }
        __syncthreads();
    }

#pragma unroll
    for (int g = 0; g < G; g++) {
        const float sum = warp_sum(total[g]), all = warp_sum(weight_all[g]);
        if (lane == 0) totals[g][warp] = sum, weights_all[g][warp] = all;
        if (threadIdx.x == 0) part[g * apart] = most[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) part[i / DIM * apart + 2 + i % DIM] = exact[i];
    for (int i = threadIdx.x; i < G * V_RANK; i += THREADS) part[i / V_RANK * apart + 3 + DIM + i % V_RANK] = latents[i];
    if (threadIdx.x < G) {
        float sum = 0.0f, all = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += totals[threadIdx.x][w], all += weights_all[threadIdx.x][w];
        part[threadIdx.x * apart + 1] = sum, part[threadIdx.x * apart + 2 + DIM] = all;
    }
}

struct JoinLatentsParams {
    u64 parts, q, k, v, sequences, rows;
    u64 out, low;  // act (rows, HEADS, DIM)
    u64 sets;      // Set, of the values of the layer's group
    int layer;     // of the group
    int splits;
    float scale, softcap;
};

// The parts of a query together, as `join`, and its sum of latents mapped to values.
KERNEL(join_latents, JoinLatentsParams) {
    SHARED float chances[MOST_PARTS], sum[SUM], halves[WARPS][DIM];
    const u64 row = blockIdx.x;
    const int head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Joined joined = join_parts<PART>(p, chances);
    const float *parts = joined.parts, *v = (const float*)p.v + (row * KV_HEADS + head / GROUP) * DIM;
    const int first = joined.first, last = joined.last;
    for (int i = threadIdx.x; i < SUM; i += THREADS) {
        float x = joined.alone && i < DIM ? joined.itself * v[i] : 0.0f;
        // The part of the step's own tokens has no latents.
        for (int s = first; s < (i < DIM ? last : p.splits); s++)
            if (chances[s] > 0.0f) x += chances[s] * parts[(u64)s * PART + 2 + i];
        sum[i] = x;
    }
    __syncthreads();
    const Set& set = set_of(p.sets, head / GROUP);
    const int member = p.layer * set.heads + head / GROUP - set.head;
    const float *mean = (const float*)set.mean + member * DIM, *map = (const float*)set.restore + (u64)member * DIM * set.rank;
    float mapped[(DIM + WARP - 1) / WARP];
#pragma unroll
    for (int n = 0; n < (DIM + WARP - 1) / WARP; n++) mapped[n] = 0.0f;
#pragma unroll 4
    for (int c = warp; c < set.rank; c += WARPS)
#pragma unroll
        for (int n = 0; n < (DIM + WARP - 1) / WARP; n++)
            if (n * WARP + lane < DIM) mapped[n] += sum[DIM + 1 + c] * map[(u64)c * DIM + n * WARP + lane];
#pragma unroll
    for (int n = 0; n < (DIM + WARP - 1) / WARP; n++)
        if (n * WARP + lane < DIM) halves[warp][n * WARP + lane] = mapped[n];
    __syncthreads();
    for (int c = threadIdx.x; c < DIM; c += THREADS) {
        float x = sum[c] + sum[DIM] * mean[c];
        for (int w = 0; w < WARPS; w++) x += halves[w][c];
        put_act(p.out, p.low, (row * HEADS + head) * DIM + c, x / joined.total);
    }
}
