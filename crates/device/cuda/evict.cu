// Which tokens of slots and of a step stay, and where they move.

struct KeepParams {
    u64 q, k, v;                   // f32 (rows, HEADS, DIM), f32 (rows, KV_HEADS, DIM); q 0: there are no queries
    u64 sequences, rankings;       // Sequence, Ranking
    u64 scores;                    // of single rows, from `attend_slots`
    u64 received, ranked;          // f32 (KV_HEADS, total): what candidates received, and by what they are ranked
    u64 sources, movers;           // i32 (KV_HEADS, total): the candidate of each slot; those that move to another
    u64 kept;                      // i32 (sequences, KV_HEADS, 2): slots after and before
    SlotPlace place;
    int window, total, stride, saved;
    int kernel;                    // candidates that scores are summed over; 1: each has its own
    float scale, softcap;
    int pad;
};

// Candidates: the slots of a KV head, then the rows of the step.
struct Candidates {
    Slots slots;
    int count, len, rows;

    DEVICE_METHOD void open(const KeepParams& p, const Sequence& s, int kv) {
        slots.open(s, p.place, kv);
        len = s.len, rows = s.rows;
    }
    DEVICE_METHOD int position(int i) const { return i < count ? *slots.position(i) : len + i - count; }
};

// The sum over the block of each thread's number.
DEVICE int block_count(int x) {
    SHARED int parts[WARPS];
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    return sum;
}

// The least over the block of each thread's number.
DEVICE u64 block_first(u64 x) {
    SHARED u64 parts[WARPS];
    for (int d = WARP / 2; d > 0; d /= 2) {
        const u64 other = __shfl_xor_sync(ALL, x, d);
        x = other < x ? other : x;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) x = parts[i] < x ? parts[i] : x;
    return x;
}

// Of how many ranked candidates the last are looked for one by one.
#define FEW 8
#define EVERY 0xffffffffffffffffull

// By what candidates are ranked: the score, which is not negative, then age. All are different.
DEVICE u64 rank_of(float score, int position) { return (u64)to_bits(score) << 32 | (u32)~position; }

// The rank of the `excess`-th of the `some` candidates in `range`, from the least on; below it are those that go.
template <class F>
DEVICE u64 last_dropped(int n, int some, int excess, F ranked) {
    if (excess <= 0) return 0;
    if (excess >= some) return EVERY;
    u64 limit = 0;
    if (excess <= FEW) {
        for (int round = 0; round < excess; round++) {
            u64 least = EVERY;
            for (int i = threadIdx.x; i < n; i += THREADS) {
                const u64 rank = ranked(i);
                if (rank > limit && rank < least) least = rank;
            }
            limit = block_first(least);
        }
        return limit;
    }
    // Bit by bit: the largest number that fewer than `excess` are below.
    for (int b = 62; b >= 0; b--) {
        const u64 tried = limit | 1ull << b;
        int below = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) below += ranked(i) < tried;
        if (block_count(below) < excess) limit = tried;
    }
    return limit;
}

// Moves what a KV head keeps to its slots: those of a warp out of `warps`, 32 slots at a time.
DEVICE void move(const KeepParams& p, const Sequence& s, const Ranking& ranking, int kv, int after, int before, int warp,
                 int warps) {
    Slots slots;
    slots.open(s, p.place, kv);
    const int lane = threadIdx.x % WARP;
    const u64 at = (u64)kv * p.total + ranking.offset;
    const int* sources = (const int*)p.sources + at;
    const float* ranked = (const float*)p.ranked + at;
    for (int first = warp * WARP; first < after; first += warps * WARP) {
        const int own = first + lane, source = own < after ? sources[own] : -1;
        const bool moved = source >= 0 && (source != own || source >= before);
        if (source >= 0 && p.place.remembers) *slots.attention(own) = ranked[source];
        if (moved) *slots.position(own) = source < before ? *slots.position(source) : s.len + source - before;
        const u32 all = __ballot_sync(ALL, moved);
        for (int other = 0; other < WARP; other++) {
            if (!(all >> other & 1)) continue;
            const int to = first + other, from = __shfl_sync(ALL, source, other);
            u8 *key = slots.key(to), *value = slots.value(to);
            if (from < before) {
                const u32 *old_key = (const u32*)slots.key(from), *old_value = (const u32*)slots.value(from);
                for (int i = lane; i < DIM * NUMBER_BYTES / 4; i += WARP)
                    ((u32*)key)[i] = old_key[i], ((u32*)value)[i] = old_value[i];
            } else {
                const u64 row = ((u64)(s.first + from - before) * KV_HEADS + kv) * DIM;
                for (int i = lane; i < DIM; i += WARP) {
                    store(key, K_KIND, i, ((const float*)p.k)[row + i]);
                    store(value, K_KIND, i, ((const float*)p.v)[row + i]);
                }
            }
        }
    }
}

// What the candidates receive from a row that is alone in its step, whose scores of the slots have been kept.
DEVICE void receive_alone(const KeepParams& p, const Sequence& s, int sequence, int kv, int count, float* received) {
    SHARED float own[GROUP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float* q = (const float*)p.q + ((u64)s.first * HEADS + kv * GROUP) * DIM;
    const float* k = (const float*)p.k + ((u64)s.first * KV_HEADS + kv) * DIM;
    for (int g = warp; g < GROUP; g += WARPS) {
        float sum = 0.0f;
        for (int c = lane; c < DIM; c += WARP) sum += q[g * DIM + c] * p.scale * k[c];
        sum = warp_sum(sum);
        if (lane == 0) own[g] = capped(sum, p.softcap);
    }
    for (int i = threadIdx.x; i <= count; i += THREADS) received[i] = 0.0f;
    __syncthreads();
    for (int g = 0; g < GROUP; g++) {
        const float* scores = (const float*)p.scores + ((u64)sequence * HEADS + kv * GROUP + g) * p.stride;
        float top = own[g];
        for (int i = threadIdx.x; i < count; i += THREADS) top = fmaxf(top, scores[i]);
        top = -block_least(-top);
        float sum = 0.0f;
        for (int i = threadIdx.x; i < count; i += THREADS) sum += expf(scores[i] - top);
        const float factor = 1.0f / (block_sum(sum) + expf(own[g] - top));
        for (int i = threadIdx.x; i <= count; i += THREADS)
            received[i] += expf((i < count ? scores[i] : own[g]) - top) * factor;
    }
}

// Whether `keep_slots` moves what it keeps: single rows leave little to move.
DEVICE bool moves_at_once(const Sequence& s) { return s.rows == 1; }

// Chooses what stays. A block to a sequence and KV head.
KERNEL(keep_slots, KeepParams) {
    const int sequence = blockIdx.x, kv = blockIdx.y;
    const Sequence& s = ((const Sequence*)p.sequences)[sequence];
    const Ranking ranking = ((const Ranking*)p.rankings)[sequence];
    Candidates all;
    all.open(p, s, kv);
    all.count = *all.slots.count;
    const int count = all.count, n = count + s.rows, start = first_seen(p.window, s.len + s.rows);
    const u64 at = (u64)kv * p.total + ranking.offset;
    float *received = (float*)p.received + at, *ranked = (float*)p.ranked + at;
    int *sources = (int*)p.sources + at, *movers = (int*)p.movers + at;

    const bool counted = ranking.expected || (p.q && ranking.counted < s.rows);
    if (counted && p.saved && s.rows == 1) receive_alone(p, s, sequence, kv, count, received);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float score = p.place.remembers && i < count ? *all.slots.attention(i) : 0.0f;
        if (counted) {
            // Only a first step's are summed over neighbours, and its candidates are rows.
            const int from = i > p.kernel / 2 ? i - p.kernel / 2 : 0, to = i + p.kernel / 2 + 1;
            float sum = 0.0f;
            for (int j = from; j < to && (j == i || j < ranking.to); j++) sum += received[j];
            score += sum;
        }
        ranked[i] = score;
    }
    __syncthreads();

    auto is_ranked = [&](int position) { return position >= ranking.from && position < ranking.to; };
    int some = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) some += is_ranked(all.position(i));
    some = block_count(some);
    const u64 limit = last_dropped(n, some, some - ranking.most, [&](int i) {
        const int position = all.position(i);
        return is_ranked(position) ? rank_of(ranked[i], position) : EVERY;
    });
    auto keeps = [&](int i) {
        const int position = all.position(i);
        return position >= start && !(is_ranked(position) && rank_of(ranked[i], position) <= limit);
    };
    int after = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) after += keeps(i);
    after = block_count(after);

    // The slots are the first places; who stays beyond them moves to where somebody goes.
    int seen = 0;
    for (int i = after; i < n; i += THREADS) {
        const int j = i + threadIdx.x;
        const bool mover = j < n && keeps(j);
        const int place = rank(mover, &seen);
        if (mover) movers[place] = j;
    }
    __syncthreads();
    seen = 0;
    for (int i = 0; i < after; i += THREADS) {
        const int j = i + threadIdx.x;
        const bool stays = j < after && keeps(j);
        const int place = rank(j < after && !stays, &seen);
        if (j < after) sources[j] = stays ? j : movers[place];
    }
    int* kept = (int*)p.kept + (sequence * KV_HEADS + kv) * 2;
    if (threadIdx.x == 0) kept[0] = after, kept[1] = count;
    if (!moves_at_once(s)) return;
    __syncthreads();
    move(p, s, ranking, kv, after, count, threadIdx.x / WARP, WARPS);
    if (threadIdx.x == 0) *all.slots.count = after;
}

// Moves what stays of longer steps. Blocks to a sequence and KV head share the slots.
KERNEL(move_slots, KeepParams) {
    const int kv = blockIdx.y, sequence = blockIdx.z;
    const Sequence& s = ((const Sequence*)p.sequences)[sequence];
    if (moves_at_once(s)) return;
    const Ranking ranking = ((const Ranking*)p.rankings)[sequence];
    const int* kept = (const int*)p.kept + (sequence * KV_HEADS + kv) * 2;
    move(p, s, ranking, kv, kept[0], kept[1], blockIdx.x * WARPS + threadIdx.x / WARP, gridDim.x * WARPS);
    if (blockIdx.x > 0 || threadIdx.x > 0) return;
    Slots slots;
    slots.open(s, p.place, kv);
    *slots.count = kept[0];
}
