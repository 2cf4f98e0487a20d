// Attention of the queries of a prefill over their own step. What is held of earlier tokens comes to it in `join`.

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

