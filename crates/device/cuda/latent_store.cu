// What becomes of a step's states in a cache of latents: the first and the newest tokens are written as they are
// (`keep_exact`), those that are neither any more are encoded (`encode`) and written as codes or floats (`write_latents`).

#define KV_DIM (KV_HEADS * DIM)

// Tokens that become latents together: of one block, counted from the first that is no sink, and the row of the first
// latent.
struct Task {
    int sequence, first, count, row;
};

struct KeepExactParams {
    u64 sequences, rows;
    u64 states[2];  // f32 (rows, KV_DIM); 0: not this side
    int layer, pad;
};

template <int S>
DEVICE void keep_exact_side(const KeepExactParams& p) {
    const Row place = ((const Row*)p.rows)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[place.sequence];
    const int index = place.position - SINKS;
    if (index >= 0 && index < latents_of(s.len + s.rows)) return;
    const float* x = (const float*)p.states[S] + (u64)blockIdx.x * KV_DIM;
    for (int i = threadIdx.x; i < KV_DIM; i += THREADS) {
        const int head = i / DIM, channel = i % DIM;
        if (index < 0)
            store(sink_of(s.tables.sinks[S], place.position, p.layer, head), EXACT, sink_index(place.position, channel), x[i]);
        else
            store(newest_of(s.tables.recent[S], index, p.layer, head), EXACT,
                  float_at<S>(DIM, RECENT, index % RECENT, channel), x[i]);
    }
}

// A block to a row and side.
KERNEL(keep_exact, KeepExactParams) {
    if (blockIdx.y == 0 && p.states[0]) keep_exact_side<0>(p);
    if (blockIdx.y == 1 && p.states[1]) keep_exact_side<1>(p);
}

struct EncodeParams {
    u64 sequences, tasks;
    u64 states;  // f32 (layers of the group, rows, KV_DIM)
    u64 sets;    // Set, of the group
    u64 phases;
    u64 out;     // f32 (sets, latents, RANK)
    int side, rows, latents, layer;  // `layer`: the group's first among those of exact tokens
};

#define TOGETHER 8
#define INPUTS 64

// A block to a task, a set and some components: z += (state - mean) encode, token by token.
template <int S>
DEVICE void encode_side(const EncodeParams& p) {
    SHARED float x[INPUTS][TOGETHER];
    const Task task = ((const Task*)p.tasks)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[task.sequence];
    const Set& set = ((const Set*)p.sets)[blockIdx.y];
    const int n = set.layers * set.heads * DIM, component = blockIdx.z * THREADS + threadIdx.x;
    const bool mine = component < set.rank;
    const float *encode = (const float*)set.encode + component, *mean = (const float*)set.mean;
    for (int token = 0; token < task.count; token += TOGETHER) {
        float z[TOGETHER];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) z[t] = 0.0f;
        for (int from = 0; from < n; from += INPUTS) {
            __syncthreads();
            for (int i = threadIdx.x; i < INPUTS * TOGETHER; i += THREADS) {
                const int t = i / INPUTS, number = from + i % INPUTS, index = task.first + token + t;
                float y = 0.0f;
                if (number < n && token + t < task.count) {
                    const int member = number / DIM, channel = number % DIM;
                    const int layer = member / set.heads, head = set.head + member % set.heads, position = index + SINKS;
                    if (position < s.len) {
                        y = load(newest_of(s.tables.recent[S], index, p.layer + layer, head), EXACT,
                                 float_at<S>(DIM, RECENT, index % RECENT, channel));
                    } else {
                        const u64 row = (u64)layer * p.rows + s.first + position - s.len;
                        y = ((const float*)p.states)[row * KV_DIM + head * DIM + channel];
                        // As if it had been among the newest.
                        if (RESIDUAL > 0 && EXACT == F16) y = from_half(to_half(y));
                    }
                    y -= S == 0 ? rotated(mean + member * DIM, p.phases, index, channel) : mean[number];
                }
                x[i % INPUTS][t] = y;
            }
            __syncthreads();
            const int end = n - from < INPUTS ? n - from : INPUTS;
            if (mine)
#pragma unroll 4
                for (int i = 0; i < end; i++) {
                    const float w = encode[(u64)(from + i) * set.rank];
#pragma unroll
                    for (int t = 0; t < TOGETHER; t++) z[t] += w * x[i][t];
                }
        }
        float* out = (float*)p.out + ((u64)blockIdx.y * p.latents + task.row + token) * Latents<S>::RANK + component;
        if (mine)
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (token + t < task.count) out[(u64)t * Latents<S>::RANK] = z[t];
    }
}

KERNEL(encode, EncodeParams) {
    if (p.side == 0)
        encode_side<0>(p);
    else
        encode_side<1>(p);
}

struct WriteLatentsParams {
    u64 sequences, tasks, sets, z, levels;  // z as `encode` leaves it
    int side, latents;
};

// Writes the code of a component and token; codes of others, which share its byte, stay.
template <int S>
DEVICE void put_code(u8* block, const Section& section, int slot, int component, int code) {
    const int place = component - section.first, strip = S == 0 ? slot / LANES : place / LANES;
    const int steps = S == 0 ? section.size : Latents<S>::SLOTS, left = section.size - place / LANES * LANES;
    const int width = S == 0 || left > LANES ? LANES : left;
    const int step = S == 0 ? place : slot, lane = S == 0 ? slot % LANES : place % LANES;
    u8* bytes = block + section.codes + strip * strip_bytes(section.bits, steps, LANES);
    for (int plane = 0; plane < (section.bits == 3 ? 2 : 1); plane++) {
        const int bits = section.bits == 3 ? 2 - plane : section.bits, per = 8 / bits, mask = (1 << bits) - 1;
        u8* byte = &bytes[(step / 4 / per * width + lane) * 4 + step % 4];
        const int shift = step / 4 % per * bits;
        *byte = (u8)((*byte & ~(mask << shift)) | (code >> plane * 2 & mask) << shift);
        bytes += plane_bytes(bits, steps, width);
    }
}

// The scale that is stored of a byte: the upper bits of a half, to the nearest, or to the next one `up`.
DEVICE int scale_byte(float scale, bool up) {
    const int top = 0x7c00 - 128, bits = (int)to_half(scale);
    const int rounded = ((bits < top ? bits : top) + (up ? 127 : 64)) >> 7;
    return rounded < 1 ? 1 : rounded > top >> 7 ? top >> 7 : rounded;
}

// The codes of a trellis that come nearest to a warp's numbers (Viterbi 1967), as `minicache_core::store` finds them: a lane
// has a state, the window without its oldest code. `back`: for each number which of the states that lead to each was the best.
DEVICE void nearest(int bits, const u8* levels, const float* x, int count, float inverse, u32* back, u8* codes, int lane) {
    const int states = 64 >> bits, ways = 1 << bits, state = lane & (states - 1);
    float cost = state == 0 ? 0.0f : 3e38f;
    for (int i = 0; i < count; i++) {
        const float number = x[i] * inverse;
        float best = 3.4e38f;
        int way = 0;
        for (int k = 0; k < ways; k++) {
            const int from = bits < 3 ? state >> bits | k << (6 - 2 * bits) : k;
            const float off = number - ((float)levels[state + states * k] - 128.0f);
            const float now = __shfl_sync(ALL, cost, from) + off * off;
            if (now < best) best = now, way = k;
        }
        // Sums stay small, however long the section; as on the host, so that codes are the same.
        cost = i % 16 == 15 ? best + warp_max(-best) : best;
        u32 word = __ballot_sync(ALL, way & 1) & (states == 32 ? ALL : (1u << states) - 1);
        if (bits > 1) word |= (__ballot_sync(ALL, way >> 1 & 1) & ((1u << states) - 1)) << states;
        if (bits > 2) word |= (__ballot_sync(ALL, way >> 2 & 1) & ((1u << states) - 1)) << 2 * states;
        if (lane == 0) back[i] = word;
    }
    // The least cost, of equal ones that of the first state.
    int last = state;
    for (int d = WARP / 2; d > 0; d /= 2) {
        const float other = __shfl_xor_sync(ALL, cost, d);
        const int place = __shfl_xor_sync(ALL, last, d);
        if (other < cost || (other == cost && place < last)) cost = other, last = place;
    }
    __syncwarp();
    if (lane == 0)
        for (int i = count - 1; i >= 0; i--) {
            codes[i] = (u8)(last & (ways - 1));
            int way = 0;
            for (int b = 0; b < bits; b++) way |= (int)(back[i] >> (b * states + last) & 1) << b;
            last = bits < 3 ? last >> bits | way << (6 - 2 * bits) : way;
        }
    __syncwarp();
}

template <int S>
DEVICE void write_side(const WriteLatentsParams& p) {
    typedef Latents<S> L;
    SHARED float steps[L::SECTIONS], zeros[L::SECTIONS];
    SHARED u8 codes[L::KIND == CODES ? L::RANK : 1];
    SHARED u32 backs[L::CENTRED ? L::RANK : 1];
    SHARED u8 levels[3 * LEVELS];
    const Task task = ((const Task*)p.tasks)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[task.sequence];
    const Set& set = ((const Set*)p.sets)[blockIdx.y];
    const Section* sections = (const Section*)set.sections;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = threadIdx.x; i < 3 * LEVELS; i += THREADS) levels[i] = ((const u8*)p.levels)[i];
    u8* block = latents_at<S>(s.tables.blocks[S], task.first, set);
    for (int token = 0; token < task.count; token++) {
        const int slot = (task.first + token) % L::SLOTS;
        const float* z = (const float*)p.z + ((u64)blockIdx.y * p.latents + task.row + token) * L::RANK;
        if (L::KIND != CODES) {
            for (int c = threadIdx.x; c < set.rank; c += THREADS) store(block, L::KIND, float_at<S>(set.rank, L::SLOTS, slot, c), z[c]);
            continue;
        }
        __syncthreads();
        for (int n = warp; n < set.section_count; n += WARPS) {
            const Section section = sections[n];
            float least = 3e38f, most = -3e38f, square = 0.0f;
            for (int i = lane; i < section.size; i += WARP) {
                float x = z[section.first + i];
                if (!L::CENTRED && EXACT == F16) x = from_half(to_half(x));
                least = fminf(least, x), most = fmaxf(most, x), square += x * x;
            }
            if (L::CENTRED) {
                const float size = sqrtf(warp_sum(square) / section.size) * section.unit;
                const int byte = scale_byte(size, section.bits == 8 && !section.trellis);
                const float inverse = 1.0f / from_half((u16)(byte << 7));
                if (section.trellis) {
                    // The last strip of values, if narrow, begins anew.
                    const int chain = S == 0 ? section.size : section.size / LANES * LANES;
                    const u8* own = levels + (section.bits - 1) * LEVELS;
                    const float* x = z + section.first;
                    nearest(section.bits, own, x, chain, inverse, backs + section.first, codes + section.first, lane);
                    nearest(section.bits, own, x + chain, section.size - chain, inverse, backs + section.first + chain,
                            codes + section.first + chain, lane);
                }
                if (lane == 0) {
                    block[set.scales_at + n * L::SLOTS + slot] = (u8)byte;
                    steps[n] = inverse;
                }
            } else {
                least = fmaxf(-warp_max(-least), -65504.0f), most = fminf(warp_max(most), 65504.0f);
                const u16 scale = to_half((most - least) / (float)((1 << section.bits) - 1)), zero = to_half(least);
                if (lane == 0) {
                    u16* to = (u16*)(block + set.scales_at) + n * 2 * L::SLOTS + slot;
                    to[0] = scale, to[L::SLOTS] = zero;
                    steps[n] = from_half(scale) > 0.0f ? 1.0f / from_half(scale) : 0.0f, zeros[n] = from_half(zero);
                }
            }
        }
        __syncthreads();
        for (int n = 0; n < set.section_count; n++) {
            const Section section = sections[n];
            const float top = (float)((1 << section.bits) - 1);
            auto write = [&](int place) {
                const int c = section.first + place;
                float x = z[c];
                int code;
                if (section.trellis) {
                    code = codes[c];
                } else if (L::CENTRED) {
                    code = (int)fminf(fmaxf(x * steps[n] + section.middle + 0.5f, 0.0f), top);
                } else {
                    if (EXACT == F16) x = from_half(to_half(x));
                    code = (int)fminf(fmaxf((x - zeros[n]) * steps[n] + 0.5f, 0.0f), top);
                }
                put_code<S>(block, section, slot, c, code);
            };
            // Components that share bytes are one thread's: of keys those 4 apart.
            const int run = S == 0 ? (section.bits == 3 ? 8 : 8 / section.bits) : 1, apart = S == 0 ? 4 : 1;
            const int all = ceil_div(section.size, apart * run) * apart;
            for (int i = threadIdx.x; i < all; i += THREADS)
                for (int k = 0; k < run; k++) {
                    const int place = (i / apart * run + k) * apart + i % apart;
                    if (place < section.size) write(place);
                }
        }
    }
}

// A block to a task and set.
KERNEL(write_latents, WriteLatentsParams) {
    if (p.side == 0)
        write_side<0>(p);
    else
        write_side<1>(p);
}

struct RestoreLatentsParams {
    u64 sequence;  // one Sequence
    u64 out[2];    // f32 (tokens, KV_HEADS, DIM)
    u64 sets[2];   // Set, of the layer's groups
    u64 phases, levels;
    int layers[2]; // of the groups
    int layer;     // among those of exact tokens
    int first;     // the first position
};

// A number as attention sees it.
template <int S>
DEVICE float restored_number(const RestoreLatentsParams& p, int head, int position, int channel, const float* z) {
    const Sequence& s = *(const Sequence*)p.sequence;
    if (position < SINKS)
        return load(sink_of(s.tables.sinks[S], position, p.layer, head), EXACT, sink_index(position, channel));
    const int index = position - SINKS;
    if (index >= latents_of(s.len))
        return load(newest_of(s.tables.recent[S], index, p.layer, head), EXACT, float_at<S>(DIM, RECENT, index % RECENT, channel));
    const Set& set = set_of(p.sets[S], head);
    const int member = p.layers[S] * set.heads + head - set.head;
    const float *mean = (const float*)set.mean + member * DIM, *map = (const float*)set.restore + (u64)member * DIM * set.rank;
    float x = S == 0 ? rotated(mean, p.phases, index, channel) : mean[channel];
    for (int c = 0; c < set.rank; c++) x += z[c] * (S == 0 ? map[(u64)channel * set.rank + c] : map[(u64)c * DIM + channel]);
    return x;
}

template <int S>
DEVICE void restore_side(const RestoreLatentsParams& p) {
    SHARED float z[Latents<S>::RANK];
    const Sequence& s = *(const Sequence*)p.sequence;
    const int position = p.first + blockIdx.x, index = position - SINKS;
    for (int head = 0; head < KV_HEADS; head++) {
        const Set& set = set_of(p.sets[S], head);
        const Section* sections = (const Section*)set.sections;
        __syncthreads();
        if (index >= 0 && index < latents_of(s.len)) {
            const u8* block = latents_at<S>(s.tables.blocks[S], index, set);
            for (int n = 0; n < set.section_count; n++)
                for (int i = threadIdx.x; i < sections[n].size; i += THREADS) {
                    const int c = sections[n].first + i;
                    z[c] = latent_number<S>(block, set, sections[n], n, index % Latents<S>::SLOTS, c, (const u8*)p.levels);
                }
        }
        __syncthreads();
        for (int c = threadIdx.x; c < DIM; c += THREADS)
            ((float*)p.out[S])[(u64)blockIdx.x * KV_DIM + head * DIM + c] = restored_number<S>(p, head, position, c, z);
    }
}

KERNEL(restore_latents, RestoreLatentsParams) {
    restore_side<0>(p);
    restore_side<1>(p);
}
