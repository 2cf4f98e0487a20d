// What becomes of a step's states: merged where layers share them, kept where they are too distinct, written as floats or
// packed as codes.

#define KV_DIM (KV_HEADS * DIM)

enum { SLERP, MEAN, MAX_NORM, RANK_ONE };
enum { MOST_DISTINCT, AS_PRINTED, TOP_FRACTION, NO_RULE };

struct MergeParams {
    u64 a, b;       // f32 (rows, KV_DIM): the shallower layer's states and the deeper one's
    u64 shared;     // f32 (rows, KV_DIM)
    u64 sizes;      // f32 (2, rows, columns)
    u64 distances;  // f32 (columns, rows)
    u64 apart;      // u8 (columns, rows)
    int rows, columns, kind;
    double t;
};

// As `minicache_core::merge`, a block to a vector.
KERNEL(merge, MergeParams) {
    const u64 row = blockIdx.x;
    const int column = blockIdx.y, width = KV_DIM / p.columns;
    const u64 at = row * KV_DIM + (u64)column * width;
    const float *a = (const float*)p.a + at, *b = (const float*)p.b + at;
    float* shared = (float*)p.shared + at;
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        const double x = a[i], y = b[i];
        ab += x * y, aa += x * x, bb += y * y;
    }
    ab = block_sum(ab), aa = block_sum(aa), bb = block_sum(bb);
    const double norm_a = sqrt(aa), norm_b = sqrt(bb);
    const double PI = 3.14159265358979323846;
    double cosine = aa > 0.0 && bb > 0.0 ? ab / (norm_a * norm_b) : 0.0;
    cosine = cosine < -1.0 ? -1.0 : cosine > 1.0 ? 1.0 : cosine;
    const double angle = acos(cosine);
    double size_a = norm_a, size_b = norm_b, weight_a = 0.0, weight_b = 0.0, distance = angle / PI;
    bool apart = false, unit = true;
    if (p.kind == MEAN) {
        weight_a = weight_b = 0.5, size_a = size_b = 1.0, unit = false;
    } else if (p.kind == MAX_NORM) {
        weight_a = aa >= bb && aa > 0.0 ? 1.0 / norm_a : 0.0;
        weight_b = aa >= bb || !(bb > 0.0) ? 0.0 : 1.0 / norm_b;
        unit = false;
    } else if (p.kind == SLERP) {
        apart = aa == 0.0 || bb == 0.0 || angle > PI - 1e-4;
        if (!apart) {
            const double sine = sin(angle);
            weight_a = (sine > 1e-6 ? sin((1.0 - p.t) * angle) / sine : 1.0 - p.t) / norm_a;
            weight_b = (sine > 1e-6 ? sin(p.t * angle) / sine : p.t) / norm_b;
        }
    } else {
        const double half = 0.5 * (aa - bb), root = hypot(half, ab), larger = 0.5 * (aa + bb) + root;
        size_a = size_b = distance = 0.0;
        if (larger > 0.0) {
            double ua = half >= 0.0 ? root + half : ab, ub = half >= 0.0 ? ab : root - half;
            const double length = hypot(ua, ub), singular = sqrt(larger);
            ua = length > 0.0 ? ua / length : 1.0, ub = length > 0.0 ? ub / length : 0.0;
            weight_a = ua / singular, weight_b = ub / singular;
            size_a = singular * ua, size_b = singular * ub;
            const double smaller = 0.5 * (aa + bb) - root;
            distance = 2.0 * (smaller > 0.0 ? smaller : 0.0) / (aa + bb);
        }
    }
    double square = 0.0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        const double e = weight_a * a[i] + weight_b * b[i];
        square += e * e;
        shared[i] = (float)e;
    }
    if (unit) {
        square = block_sum(square);
        const float factor = square > 0.0 ? (float)(1.0 / sqrt(square)) : 0.0f;
        for (int i = threadIdx.x; i < width; i += THREADS) shared[i] *= factor;
    }
    if (threadIdx.x == 0) {
        float* sizes = (float*)p.sizes;
        sizes[row * p.columns + column] = (float)size_a;
        sizes[((u64)p.rows + row) * p.columns + column] = (float)size_b;
        ((float*)p.distances)[(u64)column * p.rows + row] = (float)distance;
        ((u8*)p.apart)[(u64)column * p.rows + row] = apart;
    }
}

struct RetainParams {
    u64 sequences;
    u64 distances[2], apart[2];  // as in MergeParams, of keys and of values; 0: this side is not merged here
    u64 index[2];                // i32 (columns, rows), written: a retained token's index, or -1
    int pairs[2];
    int rows, sinks, joint;
    int rule[2];
    float gamma[2];
};

#define UNMARKED (-1)
#define MARKED 0

// The rule on the distances of a step, as `minicache_core`'s retainer has it: marks in `index`.
DEVICE void mark(const RetainParams& p, int side, const Sequence& s, Kept& kept, const float* d, const u8* apart, int* index) {
    const int sinks = p.sinks > s.len ? (p.sinks - s.len < s.rows ? p.sinks - s.len : s.rows) : 0;
    const int rule = p.rule[side];
    const float gamma = p.gamma[side];
    float least = kept.least, most = kept.most, least_kept = kept.least_kept;
    __syncthreads();
    for (int i = sinks + threadIdx.x; i < s.rows; i += THREADS) least = fminf(least, d[i]), most = fmaxf(most, d[i]);
    least = block_least(least);
    most = -block_least(-most);
    const float span = gamma * (most - least);
    const int ranked = s.rows - sinks;
    const bool moved = ranked > 1 || least != kept.least || most != kept.most;
    float limit = 0.0f;
    int ties = 0;
    const bool one = ranked == 1;
    if (rule == TOP_FRACTION && !one && ranked > 0) {
        // The limit is the least distance that is kept: found bit by bit, distances being positive.
        const int keep = (int)floor((double)gamma * ranked + 1e-9);
        u32 bits = 0;
        int above = 0;
        for (int b = 30; b >= 0; b--) {
            const float tried = from_bits(bits | 1u << b);
            int count = 0;
            for (int i = 0; i < ranked; i += THREADS) {
                const int j = sinks + i + threadIdx.x;
                rank(j < s.rows && d[j] >= tried, &count);
            }
            if (count >= keep) bits |= 1u << b;
        }
        limit = from_bits(bits);
        for (int i = 0; i < ranked; i += THREADS) {
            const int j = sinks + i + threadIdx.x;
            rank(j < s.rows && d[j] > limit, &above);
        }
        ties = keep - above;
        if (keep == 0) limit = 3e38f, ties = 0;
    }
    int seen = 0;
    for (int i = 0; i < s.rows; i += THREADS) {
        const int j = i + threadIdx.x;
        bool keep = false, tie = false;
        if (j < s.rows) {
            const float x = d[j];
            if (j < sinks) {
                keep = true;
            } else if (rule == MOST_DISTINCT) {
                keep = most - x < span;
            } else if (rule == AS_PRINTED) {
                keep = x - least < span;
            } else if (rule == TOP_FRACTION) {
                keep = one ? gamma > 0.0f && x > least_kept : x > limit;
                tie = !one && x == limit;
            }
        }
        if (rule == TOP_FRACTION && !one) {
            // Of equal ones the first.
            const int place = rank(tie, &seen);
            if (tie && place < ties) keep = true;
            if (j < s.rows && j >= sinks && keep) least_kept = fminf(least_kept, d[j]);
        }
        if (j < s.rows) index[j] = keep || (apart[j] && (rule != NO_RULE || p.sinks > 0)) ? MARKED : UNMARKED;
    }
    if (rule == TOP_FRACTION && !one) least_kept = block_least(least_kept);
    __syncthreads();
    if (threadIdx.x == 0) {
        kept.before = s.len, kept.settled_before = kept.settled;
        kept.least_before = kept.least, kept.most_before = kept.most, kept.least_kept_before = kept.least_kept;
        kept.least = least, kept.most = most, kept.least_kept = least_kept;
        if (ranked > 0 && moved) kept.settled = s.len + s.rows - p.sinks;
    }
}

// Which tokens of a step are retained, and at which index. A block to a sequence and column.
KERNEL(retain, RetainParams) {
    const Sequence& s = ((const Sequence*)p.sequences)[blockIdx.x];
    const int columns[2] = {Side<0>::COLUMNS, Side<1>::COLUMNS}, column = blockIdx.y;
    int* index[2];
    Kept* kept[2];
    for (int side = 0; side < 2; side++) {
        index[side] = 0;
        if (!p.distances[side] || column >= columns[side]) continue;
        const u64 at = (u64)column * p.rows + s.first;
        index[side] = (int*)p.index[side] + at;
        kept[side] = (Kept*)s.tables.kept[side] + p.pairs[side] * columns[side] + column;
        mark(p, side, s, *kept[side], (const float*)p.distances[side] + at, (const u8*)p.apart[side] + at, index[side]);
    }
    __syncthreads();
    if (p.joint && index[0] && index[1])
        for (int i = threadIdx.x; i < s.rows; i += THREADS)
            if (index[0][i] == MARKED || index[1][i] == MARKED) index[0][i] = index[1][i] = MARKED;
    for (int side = 0; side < 2; side++) {
        if (!index[side]) continue;
        int count = kept[side]->count;
        for (int i = 0; i < s.rows; i += THREADS) {
            const int j = i + threadIdx.x;
            const bool marked = j < s.rows && index[side][j] == MARKED;
            const int at = rank(marked, &count);
            if (marked) index[side][j] = at;
        }
        __syncthreads();
        if (threadIdx.x == 0) kept[side]->count = count;
    }
}

struct SettleParams {
    u64 sequences, rows;
    u64 a, b, shared, sizes, index;  // index 0: nothing is retained
    int side, pair, row_count;
};

// Retained tokens move to where they are kept and leave zeros; magnitudes go to their pages. A block to a vector.
template <int S>
DEVICE void settle_side(const SettleParams& p) {
    typedef Layout<S> L;
    const int row = blockIdx.x, column = blockIdx.y, width = L::TOGETHER * DIM;
    const Row place = ((const Row*)p.rows)[row];
    const Tables& tables = ((const Sequence*)p.sequences)[place.sequence].tables;
    const int index = p.index ? ((const int*)p.index)[(u64)column * p.row_count + row] : -1;
    const u64 at = (u64)row * KV_DIM + (u64)column * width;
    if (index >= 0) {
        const Kept& kept = ((const Kept*)tables.kept[S])[p.pair * L::COLUMNS + column];
        for (int i = threadIdx.x; i < width; i += THREADS) {
            for (int member = 0; member < 2; member++) {
                const float x = ((const float*)(member ? p.b : p.a))[at + i];
                u8* head = kept_of<S>(kept.blocks, index, member, i / DIM);
                store(head, L::EXACT, float_index<S>(RECENT, index % RECENT, i % DIM), x);
            }
            ((float*)p.shared)[at + i] = 0.0f;
        }
        if (threadIdx.x == 0) *kept_position<S>(kept.blocks, index) = place.position;
    }
    if (threadIdx.x < 2 && tables.magnitudes[S]) {
        const int member = threadIdx.x;
        const float* sizes = (const float*)p.sizes + (u64)member * p.row_count * L::COLUMNS;
        const float size = index >= 0 ? 0.0f : sizes[(u64)row * L::COLUMNS + column];
        u8* page = entry<u8>(tables.magnitudes[S], place.position / PAGE);
        store(page, L::MAGNITUDE, ((p.pair * 2 + member) * L::COLUMNS + column) * PAGE + place.position % PAGE, size);
    }
}

KERNEL(settle, SettleParams) {
    if (p.side == 0)
        settle_side<0>(p);
    else
        settle_side<1>(p);
}

enum { LEFT_BEHIND, TAKEN_BACK };

struct ForgetParams {
    u64 sequence;  // one Sequence
    u64 out;       // i32 (columns of all pairs)
    int side, columns, position, how;
};

// Forgets what is kept of the tokens before a position, which a window has left behind, or of those from it on; tells the
// index of the first one from there on.
template <int S>
DEVICE void forget_side(const ForgetParams& p) {
    Kept* kept = (Kept*)((const Sequence*)p.sequence)->tables.kept[S];
    for (int i = threadIdx.x; i < p.columns; i += THREADS) {
        const int at = kept_from<S>(kept[i], p.position);
        ((int*)p.out)[i] = at;
        if (p.how == LEFT_BEHIND)
            kept[i].from = at;
        else
            kept[i].count = at, kept[i].before = -1;
    }
}

KERNEL(forget, ForgetParams) {
    if (p.side == 0)
        forget_side<0>(p);
    else
        forget_side<1>(p);
}

struct KeepParams {
    u64 sequences, rows;
    u64 states[2];  // f32 (rows, KV_DIM); 0: not this side
    int stores[2];
};

// Writes a row as it is: into a block of floats, or among those that wait to be quantised.
template <int S>
DEVICE void keep_side(const KeepParams& p) {
    typedef Layout<S> L;
    const Row place = ((const Row*)p.rows)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[place.sequence];
    const int position = place.position, packed = L::packed(s.len + s.rows);
    if (L::KIND == CODES && position < packed) return;
    const float* x = (const float*)p.states[S] + (u64)blockIdx.x * KV_DIM;
    for (int i = threadIdx.x; i < KV_DIM; i += THREADS) {
        const int head = i / DIM, channel = i % DIM;
        if (L::KIND == CODES)
            store(recent_of<S>(s.tables.recent[S], position, p.stores[S], head), L::EXACT,
                  float_index<S>(RECENT, position % RECENT, channel), x[i]);
        else
            store(head_of<S>(s.tables.blocks[S], position, p.stores[S], head), L::KIND,
                  float_index<S>(L::SLOTS, position % L::SLOTS, channel), x[i]);
    }
}

KERNEL(keep, KeepParams) {
    if (blockIdx.y == 0 && p.states[0]) keep_side<0>(p);
    if (blockIdx.y == 1 && p.states[1]) keep_side<1>(p);
}

// Tokens that are to be packed together: of one block.
struct Task {
    int sequence, first, count, pad;
};

struct PackParams {
    u64 sequences, tasks, states;
    int side, store;
};

// A block to a task and head: groups of numbers become codes, a warp to a group, and codes are put together to bytes.
template <int S>
DEVICE void pack_side(const PackParams& p) {
    typedef Layout<S> L;
    if (L::KIND != CODES) return;
    SHARED u8 codes[L::KIND == CODES ? L::SLOTS * DIM : 1];
    const Task task = ((const Task*)p.tasks)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[task.sequence];
    const int head = blockIdx.y, lane = threadIdx.x % WARP;
    u8* block = head_of<S>(s.tables.blocks[S], task.first, p.store, head);
    u16* scales = (u16*)(block + L::scales_at());
    const float top = (float)((1 << L::BITS) - 1);
    const int start = task.first % L::SLOTS;
    auto number = [&](int token, int channel) {
        const int position = task.first + token;
        if (position >= s.len) {
            const u64 row = s.first + position - s.len;
            const float x = ((const float*)p.states)[row * KV_DIM + head * DIM + channel];
            return L::EXACT == F16 ? from_half(to_half(x)) : x;
        }
        return load(recent_of<S>(s.tables.recent[S], position, p.store, head), L::EXACT,
                    float_index<S>(RECENT, position % RECENT, channel));
    };
    const int groups = L::ALONG ? DIM : task.count * L::SECTIONS;
    for (int group = threadIdx.x / WARP; group < groups; group += WARPS) {
        const int section = L::ALONG ? 0 : group % L::SECTIONS, from = section * L::SECTION;
        const int size = L::ALONG ? task.count : DIM - from < L::SECTION ? DIM - from : L::SECTION;
        float least = 3e38f, most = -3e38f;
        for (int i = lane; i < size; i += WARP) {
            const float x = L::ALONG ? number(i, group) : number(group / L::SECTIONS, from + i);
            least = fminf(least, x), most = fmaxf(most, x);
        }
        least = fmaxf(-warp_max(-least), -65504.0f), most = fminf(warp_max(most), 65504.0f);
        const u16 scale = to_half((most - least) / top), zero = to_half(least);
        const float inverse = from_half(scale) > 0.0f ? 1.0f / from_half(scale) : 0.0f;
        for (int i = lane; i < size; i += WARP) {
            const int token = L::ALONG ? i : group / L::SECTIONS, channel = L::ALONG ? group : from + i;
            const float steps = (number(token, channel) - from_half(zero)) * inverse + 0.5f;
            codes[(start + token) * DIM + channel] = (u8)fminf(fmaxf(steps, 0.0f), top);
        }
        if (lane == 0) {
            const int at = L::ALONG ? group : section * 2 * L::ENTRIES + start + group / L::SECTIONS;
            scales[at] = scale, scales[at + L::ENTRIES] = zero;
        }
    }
    __syncthreads();
    // Bytes: those of other tokens than the task's stay.
    const int strips = S == 0 ? L::SLOTS / LANES * L::SECTIONS : L::STRIPS;
    for (int strip = 0; strip < strips; strip++) {
        const int section = S == 0 ? strip / (L::SLOTS / LANES) : 0, from = section * L::SECTION;
        const int size = DIM - from < L::SECTION ? DIM - from : L::SECTION, part = strip % (L::SLOTS / LANES);
        const int steps = S == 0 ? size : L::SLOTS, width = S == 0 ? LANES : L::width(strip);
        u8* bytes = S == 0 ? block + L::code_bytes(from) + part * strip_bytes(L::BITS, size, LANES)
                           : block + L::code_bytes(strip * LANES);
        for (int plane = 0; plane < (L::BITS == 3 ? 2 : 1); plane++) {
            const int bits = L::BITS == 3 ? 2 - plane : L::BITS, low = plane * 2, per = 8 / bits;
            const int count = plane_bytes(bits, steps, width);
            for (int i = threadIdx.x; i < count; i += THREADS) {
                const int in_lane = i / 4 % width, vector = i / (4 * width);
                int byte = bytes[i];
                for (int k = 0; k < per; k++) {
                    const int step = (vector * per + k) * 4 + i % 4;
                    const int token = S == 0 ? part * LANES + in_lane : step;
                    const int channel = S == 0 ? from + step : strip * LANES + in_lane;
                    if (step >= steps || token < start || token >= start + task.count) continue;
                    const int mask = (1 << bits) - 1;
                    byte = (byte & ~(mask << k * bits)) | (codes[token * DIM + channel] >> low & mask) << k * bits;
                }
                bytes[i] = (u8)byte;
            }
            bytes += count;
        }
    }
}

KERNEL(pack, PackParams) {
    if (p.side == 0)
        pack_side<0>(p);
    else
        pack_side<1>(p);
}

struct RestoreParams {
    u64 sequence;  // one Sequence
    u64 out[2];    // f32 (tokens, KV_HEADS, DIM)
    Place places[2];
    int first;     // the first position
};

// A number as attention sees it.
template <int S>
DEVICE float number_at(const Sequence& s, const Place& place, int head, int position, int channel) {
    typedef Layout<S> L;
    const Tables& tables = s.tables;
    if (place.pair >= 0 && tables.kept[S]) {
        const int column = L::COLUMNS > 1 ? head : 0;
        const Kept& kept = ((const Kept*)tables.kept[S])[place.pair * L::COLUMNS + column];
        for (int i = kept.from; i < kept.count; i++)
            if (*kept_position<S>(kept.blocks, i) == position)
                return load(kept_of<S>(kept.blocks, i, place.member, head % L::TOGETHER), L::EXACT,
                            float_index<S>(RECENT, i % RECENT, channel));
    }
    float x;
    if (L::KIND != CODES) {
        x = load(head_of<S>(tables.blocks[S], position, place.store, head), L::KIND,
                 float_index<S>(L::SLOTS, position % L::SLOTS, channel));
    } else if (position >= L::packed(s.len)) {
        x = load(recent_of<S>(tables.recent[S], position, place.store, head), L::EXACT,
                 float_index<S>(RECENT, position % RECENT, channel));
    } else {
        const u8* block = head_of<S>(tables.blocks[S], position, place.store, head);
        const int slot = position % L::SLOTS, section = channel / L::SECTION, from = section * L::SECTION;
        const int size = DIM - from < L::SECTION ? DIM - from : L::SECTION, strip = channel / LANES;
        const int steps = S == 0 ? size : L::SLOTS, width = S == 0 ? LANES : L::width(strip);
        const int step = S == 0 ? channel - from : slot, lane = S == 0 ? slot % LANES : channel % LANES;
        const u8* bytes = S == 0 ? block + L::code_bytes(from) + slot / LANES * strip_bytes(L::BITS, size, LANES)
                                 : block + L::code_bytes(strip * LANES);
        int code = 0;
        for (int plane = 0; plane < (L::BITS == 3 ? 2 : 1); plane++) {
            const int bits = L::BITS == 3 ? 2 - plane : L::BITS, per = 8 / bits;
            const int byte = bytes[(step / 4 / per * width + lane) * 4 + step % 4];
            code |= (byte >> step / 4 % per * bits & ((1 << bits) - 1)) << plane * 2;
            bytes += plane_bytes(bits, steps, width);
        }
        const u16* scales = (const u16*)(block + L::scales_at()) + (L::ALONG ? channel : section * 2 * L::ENTRIES + slot);
        x = from_half(scales[0]) * (float)code + from_half(scales[L::ENTRIES]);
    }
    if (place.pair >= 0 && tables.magnitudes[S]) x *= magnitude<S>(tables.magnitudes[S], place, head, position);
    return x;
}

KERNEL(restore, RestoreParams) {
    const Sequence& s = *(const Sequence*)p.sequence;
    const int position = p.first + blockIdx.x;
    for (int i = threadIdx.x; i < KV_DIM; i += THREADS) {
        const u64 at = (u64)blockIdx.x * KV_DIM + i;
        ((float*)p.out[0])[at] = number_at<0>(s, p.places[0], i / DIM, position, i % DIM);
        ((float*)p.out[1])[at] = number_at<1>(s, p.places[1], i / DIM, position, i % DIM);
    }
}
