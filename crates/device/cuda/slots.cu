// Attention over slots, and how much of it each token receives.

// Query heads of a KV head that a block of `attend_slots` takes; PASSES blocks share the KV head.
#define G (GROUP / PASSES)
#define TILE THREADS
// Numbers of a part beside its values: the largest score and the sum.
#define PART (DIM + 2)

struct SlotsParams {
    u64 q;                // f32 (rows, HEADS, DIM)
    u64 sequences, rows;  // Sequence, Row
    u64 parts;            // f32 (rows, HEADS, splits + 1, PART)
    u64 scores;           // f32 (sequences, HEADS, stride): those of rows that are alone in their step; 0: not wanted
    SlotPlace place;
    int splits, length;   // parts, and slots of each: a multiple of TILE
    int window, stride;
    float scale, softcap;
};

// As `attend_held`, over slots: lanes of a warp share a token, eight numbers each.
KERNEL(attend_slots, SlotsParams) {
    constexpr int CHUNKS = DIM / 8;
    constexpr int TOGETHER = CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
    constexpr int TOKENS = WARP / TOGETHER;
    SHARED float scores[G][TILE], warp_most[G][WARPS], totals[G][WARPS], sums[WARPS][G][DIM];

    const int row = blockIdx.x / p.splits, split = blockIdx.x % p.splits, head = blockIdx.y / PASSES;
    const int first_head = head * GROUP + blockIdx.y % PASSES * G;
    const int warp = uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const int chunk = lane % TOGETHER, inner = lane / TOGETHER;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    Slots slots;
    slots.open(sequence, p.place, head);
    const int count = uniform(*slots.count), seen = first_seen(p.window, place.position);
    const int begin = split * p.length, end = begin + p.length < count ? begin + p.length : count;
    float* part = (float*)p.parts + (((u64)row * HEADS + first_head) * (p.splits + 1) + split) * PART;
    const u64 apart = (u64)(p.splits + 1) * PART;
    if (begin >= end) {
        if (threadIdx.x < G) part[threadIdx.x * apart] = NONE, part[threadIdx.x * apart + 1] = 0.0f;
        return;
    }
    float* saved = p.scores && sequence.rows == 1
                       ? (float*)p.scores + ((u64)place.sequence * HEADS + first_head) * p.stride
                       : 0;
    float q[G][8], out[G][8], most[G], total[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        most[g] = NONE, total[g] = 0.0f;
        for (int j = 0; j < 8; j++) {
            const u64 at = ((u64)row * HEADS + first_head + g) * DIM + chunk * 8 + j;
            q[g][j] = chunk < CHUNKS ? ((const float*)p.q)[at] * p.scale : 0.0f, out[g][j] = 0.0f;
        }
    }
    for (int tile = begin; tile < end; tile += TILE) {
        for (int t = warp * TOKENS; t < TILE && tile + t < end; t += WARPS * TOKENS) {
            const int at = t + inner, slot = tile + at;
            const bool inside = slot < end;
            float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
            if (inside && chunk < CHUNKS) load8(slots.key(slot), K_KIND, chunk * 8, x);
#pragma unroll
            for (int g = 0; g < G; g++) {
                float sum = 0.0f;
                for (int j = 0; j < 8; j++) sum += q[g][j] * x[j];
                for (int d = TOGETHER / 2; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
                if (chunk == 0 && inside) {
                    const float score = capped(sum, p.softcap);
                    scores[g][at] = *slots.position(slot) >= seen ? score : NONE;
                    if (saved) saved[(u64)g * p.stride + slot] = score;
                }
            }
        }
        __syncthreads();
        float score[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            score[g] = tile + (int)threadIdx.x < end ? scores[g][threadIdx.x] : NONE;
            const float top = warp_max(score[g]);
            if (lane == 0) warp_most[g][warp] = top;
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++) {
            float top = most[g];
            for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_most[g][w]);
            const float factor = expf(most[g] - top), chance = score[g] > NONE ? expf(score[g] - top) : 0.0f;
            scores[g][threadIdx.x] = chance;
            total[g] = total[g] * factor + chance, most[g] = top;
            for (int j = 0; j < 8; j++) out[g][j] *= factor;
        }
        __syncthreads();
        for (int t = warp * TOKENS; t < TILE && tile + t < end; t += WARPS * TOKENS) {
            const int at = t + inner, slot = tile + at;
            if (slot >= end || chunk >= CHUNKS) continue;
            float x[8];
            load8(slots.value(slot), K_KIND, chunk * 8, x);
#pragma unroll
            for (int g = 0; g < G; g++)
                for (int j = 0; j < 8; j++) out[g][j] += scores[g][at] * x[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
        const float sum = warp_sum(total[g]);
        if (lane == 0) totals[g][warp] = sum;
        for (int j = 0; j < 8; j++)
            for (int d = TOGETHER; d < WARP; d *= 2) out[g][j] += __shfl_xor_sync(ALL, out[g][j], d);
        if (lane < CHUNKS)
            for (int j = 0; j < 8; j++) sums[warp][g][lane * 8 + j] = out[g][j];
        if (threadIdx.x == 0) part[g * apart] = most[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += sums[w][i / DIM][i % DIM];
        part[i / DIM * apart + 2 + i % DIM] = sum;
    }
    if (threadIdx.x < G) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += totals[threadIdx.x][w];
        part[threadIdx.x * apart + 1] = sum;
    }
}

// Rows and columns of a tile of scores.
#define SQUARE (DIM <= 128 ? 32 : 16)
#define EACH (SQUARE / 16)
#define WIDE (DIM + 1)

struct ReceiveParams {
    u64 q, k;                // f32 (rows, HEADS, DIM), f32 (rows, KV_HEADS, DIM)
    u64 sequences, rankings; // Sequence, Ranking
    u64 tiles;               // Row: a sequence, and the first of its rows in the tile
    u64 sums;                // f32 (rows, HEADS, 2): the largest score, and one by the sum of exp(score - largest)
    u64 received;            // f32 (KV_HEADS, total)
    SlotPlace place;
    int window, total, saved;  // saved: single rows are left to `keep_slots`
    float scale, softcap;
    int pad;
};

// What the tiles of scores of a sequence and KV head are made of, whole numbers throughout: which tokens stay is not to
// hang on how halves are rounded.
struct Tiles {
    Slots slots;
    const float *q, *k;  // of the sequence's first row
    int count, len, rows, window;
    float scale, softcap;

    DEVICE_METHOD void open(const ReceiveParams& p, const Sequence& s, int kv) {
        slots.open(s, p.place, kv);
        q = (const float*)p.q + (u64)s.first * HEADS * DIM;
        k = (const float*)p.k + ((u64)s.first * KV_HEADS + kv) * DIM;
        count = *slots.count, len = s.len, rows = s.rows;
        window = p.window, scale = p.scale, softcap = p.softcap;
    }
    DEVICE_METHOD void load_queries(int first, int head, float* to) const {
        for (int i = threadIdx.x; i < SQUARE * DIM; i += THREADS) {
            const int r = i / DIM, c = i % DIM;
            to[r * WIDE + c] = first + r < rows ? q[((u64)(first + r) * HEADS + head) * DIM + c] * scale : 0.0f;
        }
    }
    DEVICE_METHOD void load_keys(int first, float* to) const {
        for (int i = threadIdx.x; i < SQUARE * DIM; i += THREADS) {
            const int at = first + i / DIM, c = i % DIM;
            const int row = at - count;
            float x = 0.0f;
            if (row < 0)
                x = load(slots.key(at), K_KIND, c);
            else if (row < rows)
                x = k[(u64)row * KV_HEADS * DIM + c];
            to[i / DIM * WIDE + c] = x;
        }
    }
    // The scores of rows `row ..` and columns `column ..`, those of a thread: rows y * EACH + i, columns x + 16 * j.
    DEVICE_METHOD void scores(const float* queries, const float* keys, int row, int column, float (*s)[EACH]) const {
        const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < EACH; j++) s[i][j] = 0.0f;
        for (int c = 0; c < DIM; c++) {
            float a[EACH], b[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++)
                a[i] = queries[(y * EACH + i) * WIDE + c], b[i] = keys[(x + 16 * i) * WIDE + c];
#pragma unroll
            for (int i = 0; i < EACH; i++)
                for (int j = 0; j < EACH; j++) s[i][j] += a[i] * b[j];
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int at = column + x + 16 * j, step = at - count;
            const int position = step < 0 ? *slots.position(at) : len + step;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int query = row + y * EACH + i;
                const bool visible =
                    query < rows && step <= query && position >= first_seen(window, len + query);
                s[i][j] = visible ? capped(s[i][j], softcap) : NONE;
            }
        }
    }
};

// Softmax's largest score and sum of a tile of rows of one head. A block to a tile and head.
KERNEL(weigh, ReceiveParams) {
    SHARED float queries[SQUARE * WIDE], keys[SQUARE * WIDE];
    const Row tile = ((const Row*)p.tiles)[blockIdx.x];
    const Sequence& s = ((const Sequence*)p.sequences)[tile.sequence];
    const int head = blockIdx.y, first = tile.position, y = threadIdx.x / 16;
    Tiles tiles;
    tiles.open(p, s, head / GROUP);
    tiles.load_queries(first, head, queries);
    const int last = first + SQUARE < s.rows ? first + SQUARE : s.rows;
    float most[EACH], total[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) most[i] = NONE, total[i] = 0.0f;
    for (int at = 0; at < tiles.count + last; at += SQUARE) {
        __syncthreads();
        tiles.load_keys(at, keys);
        __syncthreads();
        float score[EACH][EACH];
        tiles.scores(queries, keys, first, at, score);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float top = most[i], sum = 0.0f;
            for (int j = 0; j < EACH; j++) top = fmaxf(top, score[i][j]);
            for (int d = 8; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
            for (int j = 0; j < EACH; j++) sum += score[i][j] > NONE ? expf(score[i][j] - top) : 0.0f;
            for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
            total[i] = total[i] * expf(most[i] - top) + sum, most[i] = top;
        }
    }
    if (threadIdx.x % 16 > 0) return;
    for (int i = 0; i < EACH; i++) {
        const int row = first + y * EACH + i;
        if (row >= s.rows) continue;
        float* to = (float*)p.sums + ((u64)(s.first + row) * HEADS + head) * 2;
        to[0] = most[i], to[1] = 1.0f / total[i];
    }
}

// What each candidate receives from the rows that count, summed over them and the query heads of a KV head. A block to a
// tile of candidates, a KV head and a sequence.
KERNEL(receive, ReceiveParams) {
    SHARED float queries[SQUARE * WIDE], keys[SQUARE * WIDE], columns[16][SQUARE];
    const int column = blockIdx.x * SQUARE, kv = blockIdx.y, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const Sequence& s = ((const Sequence*)p.sequences)[blockIdx.z];
    const Ranking ranking = ((const Ranking*)p.rankings)[blockIdx.z];
    if (ranking.counted >= s.rows || (p.saved && s.rows == 1)) return;
    Tiles tiles;
    tiles.open(p, s, kv);
    const int end = tiles.count + s.rows;
    if (column >= end) return;
    tiles.load_keys(column, keys);
    // Rows before a token do not see it.
    const int after = column - tiles.count, from = after > ranking.counted ? after : ranking.counted;
    float received[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) received[j] = 0.0f;
    for (int head = kv * GROUP; head < (kv + 1) * GROUP; head++)
        for (int row = from / SQUARE * SQUARE; row < s.rows; row += SQUARE) {
            __syncthreads();
            tiles.load_queries(row, head, queries);
            __syncthreads();
            float score[EACH][EACH];
            tiles.scores(queries, keys, row, column, score);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int query = row + y * EACH + i;
                if (query < ranking.counted || query >= s.rows) continue;
                const float* sums = (const float*)p.sums + ((u64)(s.first + query) * HEADS + head) * 2;
                for (int j = 0; j < EACH; j++)
                    if (score[i][j] > NONE) received[j] += expf(score[i][j] - sums[0]) * sums[1];
            }
        }
    for (int j = 0; j < EACH; j++) columns[y][x + 16 * j] = received[j];
    __syncthreads();
    if (threadIdx.x < SQUARE && column + (int)threadIdx.x < end) {
        float sum = 0.0f;
        for (int i = 0; i < 16; i++) sum += columns[i][threadIdx.x];
        ((float*)p.received)[(u64)kv * p.total + ranking.offset + column + threadIdx.x] = sum;
    }
}
