// How much queries to come are expected to look at each token of a prompt, as the host's `expected_attention` has it: queries
// before RoPE are normal with the mean and the covariance of the prompt's, and are rotated by the average of the positions
// to come. The first tokens are left out of it.

struct ExpectParams {
    u64 q, k, v;              // f32 (rows, HEADS, DIM), f32 (rows, KV_HEADS, DIM); q 0: nothing is expected
    u64 sequences, rankings;  // Sequence, Ranking
    u64 prompts;              // i32: the sequences that are prompts
    u64 angles, averages;     // f32 (total, rotary), f32 (prompts, rotary): cosines, then sines
    u64 means;                // f32 (prompts, HEADS, DIM)
    u64 spreads;              // f32 (prompts, HEADS, DIM, DIM): covariances times the number of queries
    u64 logits;               // f32 (HEADS, total)
    u64 received;             // f32 (KV_HEADS, total)
    int sinks, rotary, total;
    float scale;
};

// A prompt's tokens after the first ones.
struct Prompt {
    const Sequence* s;
    u64 offset;  // of its candidates
    int tokens;

    DEVICE_METHOD void open(const ExpectParams& p, int index) {
        const int sequence = ((const int*)p.prompts)[index];
        s = (const Sequence*)p.sequences + sequence;
        offset = ((const Ranking*)p.rankings)[sequence].offset + p.sinks;
        tokens = s->rows - p.sinks;
    }
    // A number of a token's query, as it was before RoPE. The angles may be scaled; that is divided out.
    DEVICE_METHOD float query(const ExpectParams& p, int token, int head, int channel) const {
        const float* q = (const float*)p.q + ((u64)(s->first + p.sinks + token) * HEADS + head) * DIM;
        if (channel >= p.rotary) return q[channel];
        const int half = p.rotary / 2, pair = channel % half;
        const float* angles = (const float*)p.angles + (offset + token) * p.rotary;
        const float cosine = angles[pair], sine = angles[pair + half], square = cosine * cosine + sine * sine;
        return channel < half ? (q[pair] * cosine + q[pair + half] * sine) / square
                              : (q[pair + half] * cosine - q[pair] * sine) / square;
    }
};

// The mean query. A block to a prompt and head.
KERNEL(expect_mean, ExpectParams) {
    constexpr int C = (DIM + WARP - 1) / WARP;
    SHARED float sums[WARPS][DIM];
    const int head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Prompt prompt;
    prompt.open(p, blockIdx.x);
    float sum[C];
#pragma unroll
    for (int n = 0; n < C; n++) sum[n] = 0.0f;
    for (int token = warp; token < prompt.tokens; token += WARPS)
#pragma unroll
        for (int n = 0; n < C; n++)
            if (n * WARP + lane < DIM) sum[n] += prompt.query(p, token, head, n * WARP + lane);
    for (int n = 0; n < C; n++)
        if (n * WARP + lane < DIM) sums[warp][n * WARP + lane] = sum[n];
    __syncthreads();
    for (int c = threadIdx.x; c < DIM; c += THREADS) {
        float all = 0.0f;
        for (int w = 0; w < WARPS; w++) all += sums[w][c];
        ((float*)p.means)[((u64)blockIdx.x * HEADS + head) * DIM + c] = all / (float)prompt.tokens;
    }
}

// Rows and columns of a tile of a covariance, and queries read at a time.
#define SIDE 64
#define AT_ONCE 32

// A tile of the covariance. A block to a prompt, a head and a tile.
KERNEL(expect_spread, ExpectParams) {
    constexpr int TILES = (DIM + SIDE - 1) / SIDE, EACH = SIDE / 16;
    SHARED float left[AT_ONCE][SIDE], right[AT_ONCE][SIDE];
    const int head = blockIdx.y, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int row = blockIdx.z / TILES * SIDE, column = blockIdx.z % TILES * SIDE;
    Prompt prompt;
    prompt.open(p, blockIdx.x);
    const u64 at = (u64)blockIdx.x * HEADS + head;
    const float* mean = (const float*)p.means + at * DIM;
    float sums[EACH][EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) sums[i][j] = 0.0f;
    for (int first = 0; first < prompt.tokens; first += AT_ONCE) {
        __syncthreads();
        for (int i = threadIdx.x; i < AT_ONCE * SIDE; i += THREADS) {
            const int token = first + i / SIDE, c = i % SIDE;
            auto number = [&](int channel) {
                return token < prompt.tokens && channel < DIM ? prompt.query(p, token, head, channel) - mean[channel] : 0.0f;
            };
            left[i / SIDE][c] = number(row + c);
            right[i / SIDE][c] = number(column + c);
        }
        __syncthreads();
        for (int token = 0; token < AT_ONCE; token++) {
            float a[EACH], b[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) a[i] = left[token][y + 16 * i], b[i] = right[token][x + 16 * i];
#pragma unroll
            for (int i = 0; i < EACH; i++)
                for (int j = 0; j < EACH; j++) sums[i][j] += a[i] * b[j];
        }
    }
    float* to = (float*)p.spreads + at * DIM * DIM;
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            const int r = row + y + 16 * i, c = column + x + 16 * j;
            if (r < DIM && c < DIM) to[(u64)r * DIM + c] = sums[i][j];
        }
}

// Tokens of a block of `expect_logits`, with 16 threads each.
#define TOKENS (THREADS / 16)

// The logarithm of what each key is expected to weigh. A block to a prompt, a head and some tokens.
KERNEL(expect_logits, ExpectParams) {
    constexpr int C = (DIM + 15) / 16;
    SHARED float keys[TOKENS][DIM + 1];
    const int head = blockIdx.y, inner = threadIdx.x / 16, lane = threadIdx.x % 16;
    const int token = blockIdx.z * TOKENS + inner, half = p.rotary / 2;
    Prompt prompt;
    prompt.open(p, blockIdx.x);
    if ((int)blockIdx.z * TOKENS >= prompt.tokens) return;
    const float* averages = (const float*)p.averages + (u64)blockIdx.x * p.rotary;
    const bool inside = token < prompt.tokens;
    const u64 key = ((u64)(prompt.s->first + p.sinks + token) * KV_HEADS + head / GROUP) * DIM;
    // <R m, k> is <m, R^T k>: keys are rotated in place of means and covariances.
    for (int c = lane; c < DIM; c += 16) {
        float x = 0.0f;
        if (inside) {
            const float* k = (const float*)p.k + key;
            const int pair = half > 0 ? c % half : 0;
            x = c >= p.rotary ? k[c]
                : c < half    ? averages[pair] * k[pair] + averages[pair + half] * k[pair + half]
                              : averages[pair] * k[pair + half] - averages[pair + half] * k[pair];
        }
        keys[inner][c] = x;
    }
    __syncthreads();
    float logit = 0.0f;
    if (p.q) {
        const u64 at = (u64)blockIdx.x * HEADS + head;
        const float *mean = (const float*)p.means + at * DIM, *spread = (const float*)p.spreads + at * DIM * DIM;
        float mapped[C];
#pragma unroll
        for (int n = 0; n < C; n++) mapped[n] = 0.0f;
        for (int d = 0; d < DIM; d++) {
            const float x = keys[inner][d];
#pragma unroll
            for (int n = 0; n < C; n++)
                if (DIM % 16 == 0 || n * 16 + lane < DIM) mapped[n] += spread[d * DIM + n * 16 + lane] * x;
        }
        float first = 0.0f, second = 0.0f;
#pragma unroll
        for (int n = 0; n < C; n++) {
            const int c = n * 16 + lane;
            if (DIM % 16 == 0 || c < DIM) first += mean[c] * keys[inner][c], second += mapped[n] * keys[inner][c];
        }
        for (int d = 8; d > 0; d /= 2) {
            first += __shfl_xor_sync(ALL, first, d);
            second += __shfl_xor_sync(ALL, second, d);
        }
        logit = p.scale * first + 0.5f * p.scale * p.scale / (float)prompt.tokens * second;
    }
    if (inside && lane == 0) ((float*)p.logits)[(u64)head * p.total + prompt.offset + token] = logit;
}

// Softmax over the prompt, averaged over the query heads, times the norm of the value. A block to a prompt and KV head.
KERNEL(expect, ExpectParams) {
    const int kv = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Prompt prompt;
    prompt.open(p, blockIdx.x);
    float* received = (float*)p.received + (u64)kv * p.total + prompt.offset;
    for (int g = 0; g < GROUP; g++) {
        const float* logits = (const float*)p.logits + (u64)(kv * GROUP + g) * p.total + prompt.offset;
        float least = 3e38f, sum = 0.0f;
        for (int i = threadIdx.x; i < prompt.tokens; i += THREADS) least = fminf(least, -logits[i]);
        const float top = -block_least(least);
        for (int i = threadIdx.x; i < prompt.tokens; i += THREADS) sum += expf(logits[i] - top);
        sum = block_sum(sum) * (float)GROUP;
        for (int i = threadIdx.x; i < prompt.tokens; i += THREADS) {
            const float before = g > 0 ? received[i] : 0.0f;
            received[i] = before + expf(logits[i] - top) / sum;
        }
    }
    __syncthreads();
    for (int i = warp; i < prompt.tokens; i += WARPS) {
        const float* value = (const float*)p.v + ((u64)(prompt.s->first + p.sinks + i) * KV_HEADS + kv) * DIM;
        float square = 0.0f;
        for (int c = lane; c < DIM; c += WARP) square += value[c] * value[c];
        square = warp_sum(square);
        if (lane == 0) received[i] *= sqrtf(square);
    }
}
