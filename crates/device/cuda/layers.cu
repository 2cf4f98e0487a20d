// What a decoder does between its linear layers. Rows are tokens; the residual stream and what linear layers give are
// f32, what they take is halves (or bfloat16), and where `low` is not 0 what rounding to these leaves, as large.

struct EmbedParams {
    u64 ids, table, low, out;  // u32 (rows), act (vocab, width) twice, f32 (rows, width)
    int rows, width;
};

KERNEL(embed, EmbedParams) {
    const u32 id = ((const u32*)p.ids)[blockIdx.x];
    const u16 *from = (const u16*)p.table + (u64)id * p.width, *low = (const u16*)p.low + (u64)id * p.width;
    float* to = (float*)p.out + (u64)blockIdx.x * p.width;
    for (int i = threadIdx.x; i < p.width; i += THREADS)
        to[i] = from_act(from[i]) + (p.low ? from_act(low[i]) : 0.0f);
}

struct NormParams {
    u64 x, bias, weight;  // f32 (rows, width), f32 or 0, f32 (width)
    u64 out, low, index;  // act (rows, width), u32 (rows) or 0
    int rows, width;
    float eps;
};

// out = x / sqrt(mean(x^2) + eps) * weight, of the rows that `index` names; a `bias` of the linear layer before is added
// to x first, for good.
KERNEL(rms_norm, NormParams) {
    const u64 row = p.index ? ((const u32*)p.index)[blockIdx.x] : blockIdx.x;
    float* x = (float*)p.x + row * p.width;
    const float* bias = (const float*)p.bias;
    float square = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += THREADS) {
        if (bias) x[i] += bias[i];
        square += x[i] * x[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(square) / p.width + p.eps);
    for (int i = threadIdx.x; i < p.width; i += THREADS)
        put_act(p.out, p.low, (u64)blockIdx.x * p.width + i, x[i] * factor * ((const float*)p.weight)[i]);
}

struct RotateParams {
    u64 qkv, bias, angles;    // f32 (rows, (heads + 2 kv_heads) dim), f32 or 0, f32 (rows, rotary): cosines, sines
    u64 query_norm, key_norm; // f32 (dim) or 0
    u64 q, k, v;              // f32
    int rows, heads, kv_heads, dim, rotary;
    float eps;
};

// Queries, keys and values apart, biased, normed by head where the model does that, and rotated (half-split order).
// A warp to a head.
KERNEL(rotate, RotateParams) {
    const int head = blockIdx.y * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int all = p.heads + 2 * p.kv_heads;
    if (head >= all) return;
    const u64 row = blockIdx.x;
    const float* from = (const float*)p.qkv + (row * all + head) * p.dim;
    const float* bias = p.bias ? (const float*)p.bias + (u64)head * p.dim : 0;
    const int side = head < p.heads ? 0 : head < p.heads + p.kv_heads ? 1 : 2;
    float* to = side == 0   ? (float*)p.q + (row * p.heads + head) * p.dim
                : side == 1 ? (float*)p.k + (row * p.kv_heads + head - p.heads) * p.dim
                            : (float*)p.v + (row * p.kv_heads + head - p.heads - p.kv_heads) * p.dim;
    const float* weight = side == 0 ? (const float*)p.query_norm : side == 1 ? (const float*)p.key_norm : 0;
    float factor = 1.0f;
    if (weight) {
        float square = 0.0f;
        for (int i = lane; i < p.dim; i += WARP) {
            const float x = from[i] + (bias ? bias[i] : 0.0f);
            square += x * x;
        }
        factor = 1.0f / sqrtf(warp_sum(square) / p.dim + p.eps);
    }
    const float* angles = (const float*)p.angles + row * p.rotary;
    const int half = side == 2 ? 0 : p.rotary / 2;
    for (int i = lane; i < p.dim; i += WARP) {
        float x = from[i] + (bias ? bias[i] : 0.0f);
        if (weight) x *= factor * weight[i];
        if (i < 2 * half) {
            const int j = i < half ? i + half : i - half;
            float y = from[j] + (bias ? bias[j] : 0.0f);
            if (weight) y *= factor * weight[j];
            const float cosine = angles[i % half], sine = angles[half + i % half];
            x = i < half ? x * cosine - y * sine : x * cosine + y * sine;
        }
        to[i] = x;
    }
}

struct SwiGluParams {
    u64 wide, bias, out, low;  // f32 (rows, 2 inner), f32 (2 inner) or 0, act (rows, inner)
    int rows, inner;
};

DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

KERNEL(swiglu, SwiGluParams) {
    const u64 row = blockIdx.x;
    const float *gate = (const float*)p.wide + row * 2 * p.inner, *up = gate + p.inner;
    const float* bias = (const float*)p.bias;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i < p.inner; i += THREADS * gridDim.y) {
        const float g = gate[i] + (bias ? bias[i] : 0.0f), u = up[i] + (bias ? bias[p.inner + i] : 0.0f);
        put_act(p.out, p.low, row * p.inner + i, silu(g) * u);
    }
}

struct GatherParams {
    u64 x, index, out;  // act (any, width), u32 (rows), act (rows, width)
    int rows, width;
};

KERNEL(gather, GatherParams) {
    const u16* from = (const u16*)p.x + (u64)((const u32*)p.index)[blockIdx.x] * p.width;
    u16* to = (u16*)p.out + (u64)blockIdx.x * p.width;
    for (int i = threadIdx.x; i < p.width; i += THREADS) to[i] = from[i];
}

struct ScatterParams {
    u64 x, index, weights, out;  // f32 (rows, width), u32 (rows), f32 (rows), f32 (any, width)
    int rows, width;
};

// out[index[row]] += weights[row] x[row]; no index comes twice.
KERNEL(scatter_add, ScatterParams) {
    const float* from = (const float*)p.x + (u64)blockIdx.x * p.width;
    float* to = (float*)p.out + (u64)((const u32*)p.index)[blockIdx.x] * p.width;
    const float weight = ((const float*)p.weights)[blockIdx.x];
    for (int i = threadIdx.x; i < p.width; i += THREADS) to[i] += weight * from[i];
}

struct NoiseParams {
    u64 out;  // act or f32 (count)
    u64 count;
    u32 seed;
    float size;
    int wide;
};

// Numbers spread evenly over -size..size, for models and states that only have to be of the right size.
KERNEL(noise, NoiseParams) {
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < p.count; i += (u64)gridDim.x * THREADS) {
        u64 z = (i + 1) * 0x9e3779b97f4a7c15ull + p.seed;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        const float x = ((float)(u32)(z >> 40) * (1.0f / 8388608.0f) - 1.0f) * p.size;
        if (p.wide)
            ((float*)p.out)[i] = x;
        else
            ((u16*)p.out)[i] = to_act(x);
    }
}

struct BestParams {
    u64 x, out;  // f32 (rows, width), u32 (rows)
    int rows, width;
};

// The largest number of a row and its column, of equal ones the first; `finite`: whether all are numbers.
struct Top {
    float most;
    int at;
    bool finite;
};

DEVICE Top top_of(const float* x, int width) {
    float most = -3.4e38f;
    int at = 0;
    bool finite = true;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        finite = finite && fabsf(x[i]) <= 3.4e38f;
        if (x[i] > most) most = x[i], at = i;
    }
    for (int d = WARP / 2; d > 0; d /= 2) {
        const float other = __shfl_xor_sync(ALL, most, d);
        const int place = __shfl_xor_sync(ALL, at, d);
        if (other > most || (other == most && place < at)) most = other, at = place;
    }
    SHARED float parts[WARPS];
    SHARED int places[WARPS];
    SHARED u32 bad[WARPS];
    const u32 odd = __ballot_sync(ALL, !finite);
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        const int w = threadIdx.x / WARP;
        parts[w] = most, places[w] = at, bad[w] = odd;
    }
    __syncthreads();
    u32 any = 0;
    for (int w = 0; w < WARPS; w++) {
        any |= bad[w];
        if (parts[w] > most || (parts[w] == most && places[w] < at)) most = parts[w], at = places[w];
    }
    return {most, at, any == 0};
}

// The column of the largest number of each row; all ones where a number is none.
KERNEL(best, BestParams) {
    const Top top = top_of((const float*)p.x + (u64)blockIdx.x * p.width, p.width);
    if (threadIdx.x == 0) ((u32*)p.out)[blockIdx.x] = top.finite ? (u32)top.at : 0xffffffffu;
}

struct ScoreParams {
    u64 x, pairs, out;  // f32 (rows, width), u32 (rows, 2): the row that each is compared with, and a column; f32 (rows, 3)
    int rows, width;
};

// Of each row of logits: what the column's probability comes to in nats, KL(the other row || this one), and whether both
// have the same likeliest column. Not a number where a logit is none.
KERNEL(score, ScoreParams) {
    const u32* pair = (const u32*)p.pairs + (u64)blockIdx.x * 2;
    const float *own = (const float*)p.x + (u64)blockIdx.x * p.width, *other = (const float*)p.x + (u64)pair[0] * p.width;
    const Top top = top_of(own, p.width), full = top_of(other, p.width);
    double sums[2] = {0.0, 0.0};
    for (int i = threadIdx.x; i < p.width; i += THREADS)
        sums[0] += (double)expf(own[i] - top.most), sums[1] += (double)expf(other[i] - full.most);
    const float log_own = logf((float)block_sum(sums[0])), log_full = logf((float)block_sum(sums[1]));
    double kl = 0.0;
    for (int i = threadIdx.x; i < p.width; i += THREADS) {
        const float y = other[i] - full.most - log_full;
        kl += (double)expf(y) * (double)(y - (own[i] - top.most - log_own));
    }
    kl = block_sum(kl);
    if (threadIdx.x > 0) return;
    float* out = (float*)p.out + (u64)blockIdx.x * 3;
    const float none = top.finite && full.finite ? 0.0f : from_bits(0x7fc00000u);
    out[0] = log_own - (own[pair[1]] - top.most) + none;
    out[1] = (float)kl + none;
    out[2] = top.at == full.at ? 1.0f : 0.0f;
}
