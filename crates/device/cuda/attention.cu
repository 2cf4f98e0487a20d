// Attention of every query over what its sequence's cache holds (`attend_held`, split over positions), and its parts with
// that of a prefill's own tokens (`attend_step`) joined (`join`). Softmax parts (largest score m, sum l of exp(s - m), weighed
// values) join by rescaling, as in FlashAttention and Flash-Decoding.

// Numbers of a part: m, l and its values.
#define PART (DIM + 2)

struct HeldParams {
    u64 q;                 // f32 (rows, HEADS, DIM)
    u64 sequences, rows;   // Sequence, Row
    u64 parts;             // f32 (rows, HEADS, splits + 1, PART)
    Place places[2];
    int splits, length;    // parts, and tokens of each: a multiple of TILE
    int window;            // 0: none
    float scale, softcap;  // softcap 0: none
};

// Goes through the kept tokens of a part, tile by tile: what is looked at next is asked for before it is needed.
template <int S> struct Walk {
    const Kept* kept;
    int from, to, last, ahead;

    DEVICE_METHOD void begin(const Kept* column, int first, int end) {
        kept = column, from = to = uniform(first), last = uniform(end);
    }
    DEVICE_METHOD void ask(int lane) {
        from = to;
        ahead = to + lane < last ? *kept_position<S>(kept->blocks, to + lane) : 0x7fffffff;
    }
    // Of a tile that ends at `end`: `from..to` are the tokens in it.
    DEVICE_METHOD void take(int lane, int end) {
        for (;;) {
            const int count = uniform(__popc(__ballot_sync(ALL, ahead < end)));
            to += count;
            if (count < WARP) return;
            ahead = to + lane < last ? *kept_position<S>(kept->blocks, to + lane) : 0x7fffffff;
        }
    }
};

// Blocks at a time on a multiprocessor: what hides the latency of memory is others' work. Codes of 3 and of 8 bits come in
// two loads each, which want registers.
#define TWO_LOADS(kind, bits) ((kind) == 2 && ((bits) == 3 || (bits) == 8))
#define AT_A_TIME ((G <= 1 ? 3 : 2) - (TWO_LOADS(K_KIND, K_BITS) || TWO_LOADS(V_KIND, V_BITS) ? 1 : 0))

KERNEL_OF(AT_A_TIME, attend_held, HeldParams) {
    typedef Layout<0> K;
    typedef Layout<1> V;
    constexpr int FOURS = (DIM > TILE ? DIM : TILE) / 4;
    // Warps that share the tokens of a tile, each with strips of its own; the tile's blocks go round the parts.
    constexpr int AROUND = V::STRIPS < WARPS ? WARPS / V::STRIPS : 1;
    constexpr int BESIDE = WARPS / AROUND;
    constexpr int EACH = (V::STRIPS + BESIDE - 1) / BESIDE;
    // Loads of codes: of a section of keys, and of a block of values; blocks of values of a part in a tile.
    constexpr int KEY_LOADS = ceil_div(code_units(K::BITS, K::SECTION, LANES), WARP);
    constexpr int VALUE_LOADS = ceil_div(code_units(V::BITS, V::SLOTS, LANES), WARP);
    constexpr int BLOCKS = V::KIND == CODES ? ceil_div(ceil_div(TILE, V::SLOTS), AROUND) : 1;
    constexpr int KEY_FOURS = ceil_div(K::SECTION, 4 * WARP);

    SHARED float q[G * DIM];
    SHARED float scores[G][TILE], weights[G][TILE];
    SHARED float warp_most[G][WARPS], weight_most[G][WARPS], factor[G], query_most[G], totals[G][WARPS];
    SHARED int kept_bounds[4];
    SHARED uint2 fours[K::KIND == CODES || V::KIND == CODES ? WARPS : 1][G * FOURS];

    const int row = blockIdx.x / p.splits, split = blockIdx.x % p.splits, head = blockIdx.y / PASSES;
    const int first_head = head * GROUP + blockIdx.y % PASSES * G;
    // Shuffles where the compiler does not know that all threads of a warp come are many times as slow.
    const int warp = uniform(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const Row place = ((const Row*)p.rows)[row];
    const Sequence& sequence = ((const Sequence*)p.sequences)[place.sequence];
    const Tables& tables = sequence.tables;
    const int len = uniform(sequence.len), position = uniform(place.position);
    const int seen = p.window > 0 && position + 1 > p.window ? position + 1 - p.window : 0;
    // Blocks of which no token is seen may be gone.
    const int origin = seen / TILE * TILE;
    const int begin = origin + split * p.length, end = begin + p.length < len ? begin + p.length : len;
    float* part = (float*)p.parts + (((u64)row * HEADS + first_head) * (p.splits + 1) + split) * PART;
    const u64 apart = (u64)(p.splits + 1) * PART;
    if (begin >= end) {
        if (threadIdx.x < G) part[threadIdx.x * apart] = NONE, part[threadIdx.x * apart + 1] = 0.0f;
        return;
    }
    const Place key = p.places[0], value = p.places[1];
    const bool scaled_keys = key.pair >= 0 && uniform(tables.magnitudes[0] != 0);
    const bool scaled_values = value.pair >= 0 && uniform(tables.magnitudes[1] != 0);
    const bool some_keys = key.pair >= 0 && uniform(tables.kept[0] != 0);
    const bool some_values = value.pair >= 0 && uniform(tables.kept[1] != 0);
    const Kept* key_column = (const Kept*)tables.kept[0] + key.pair * K::COLUMNS + (K::COLUMNS > 1 ? head : 0);
    const Kept* value_column = (const Kept*)tables.kept[1] + value.pair * V::COLUMNS + (V::COLUMNS > 1 ? head : 0);

    const float* queries = (const float*)p.q + ((u64)row * HEADS + first_head) * DIM;
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) q[i] = queries[i] * p.scale;
    // The largest score so far, and the lane's part of the sum.
    float most[G], total[G];
#pragma unroll
    for (int g = 0; g < G; g++) most[g] = NONE, total[g] = 0.0f;
    if (some_keys && threadIdx.x < 2) kept_bounds[threadIdx.x] = kept_from<0>(*key_column, threadIdx.x ? end : begin);
    if (some_values && threadIdx.x >= WARP && threadIdx.x < WARP + 2)
        kept_bounds[threadIdx.x - WARP + 2] = kept_from<1>(*value_column, threadIdx.x > WARP ? end : begin);
    __syncthreads();
    for (int g = warp; g < G; g += WARPS) {
        float top = 0.0f;
        for (int i = lane; i < DIM; i += WARP) top = fmaxf(top, fabsf(q[g * DIM + i]));
        top = warp_max(top);
        if (lane == 0) query_most[g] = top;
    }
    Walk<0> key_walk;
    Walk<1> value_walk;
    if (some_keys) key_walk.begin(key_column, kept_bounds[0], kept_bounds[1]);
    if (some_values) value_walk.begin(value_column, kept_bounds[2], kept_bounds[3]);

    const int packed_keys = K::packed(len), packed_values = V::packed(len);
    const int around = warp / BESIDE, beside = warp % BESIDE;
    float sums[EACH][G][8];  // of eight channels, from floats
    float code[EACH][G][4];  // of four channels, from codes
    float zeros[EACH][G];    // of all channels of a section: weights times zeros
#pragma unroll
    for (int e = 0; e < EACH; e++)
        for (int g = 0; g < G; g++) {
            for (int i = 0; i < 8; i++) sums[e][g][i] = 0.0f;
            for (int i = 0; i < 4; i++) code[e][g][i] = 0.0f;
            zeros[e][g] = 0.0f;
        }
    __syncthreads();

    for (int tile = begin; tile < end; tile += TILE) {
        if (some_keys) key_walk.ask(lane);
        if (some_values) value_walk.ask(lane);
        // Codes of values are asked for before they are needed.
        Raw<V::BITS> raw_values[EACH][BLOCKS][VALUE_LOADS];
        if (V::KIND == CODES)
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int strip = beside + e * BESIDE;
                if (around >= AROUND || strip >= V::STRIPS) continue;
                const int width = V::width(strip);
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
                    const int from = tile + (around + b * AROUND) * V::SLOTS;
                    if (from >= packed_values || from >= end || from >= tile + TILE || from + V::SLOTS <= seen) continue;
                    const u8* block = head_of<1>(tables.blocks[1], from, value.store, head);
#pragma unroll
                    for (int n = 0; n < VALUE_LOADS; n++)
                        if (n * WARP + lane < code_units(V::BITS, V::SLOTS, width))
                            raw_values[e][b][n] = load_codes<V::BITS>(block + V::code_bytes(strip * LANES), V::SLOTS,
                                                                      width, n * WARP + lane);
                }
            }

        // Scores: two strips of 16 tokens to a warp.
        const int own_first = tile + warp * LANES * STRIPS_EACH;
        auto key_size = [&](int position) {
            return scaled_keys && position < end ? magnitude<0>(tables.magnitudes[0], key, head, position) : 1.0f;
        };
        if (K::KIND == CODES && own_first < packed_keys && own_first < end) {
            // Strips of one block have the digits of queries in common, those of other blocks have not.
            constexpr int TOGETHER = !K::ALONG || K::SLOTS % (LANES * STRIPS_EACH) == 0 ? STRIPS_EACH : 1;
            uint2* mine = fours[warp];
#pragma unroll
            for (int s = 0; s < STRIPS_EACH; s += TOGETHER) {
                const int first = own_first + s * LANES;
                if (first >= packed_keys || first >= end) break;
                if (first + TOGETHER * LANES <= seen) continue;
                const u8* block = head_of<0>(tables.blocks[0], first, key.store, head);
                const int slot = first % K::SLOTS;
                const u16* scales = (const u16*)(block + K::scales_at());
                float size_of_key[TOGETHER], out[TOGETHER][G][4];
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    size_of_key[j] = key_size(first + j * LANES + code_token(lane));
#pragma unroll
                    for (int g = 0; g < G; g++)
                        for (int i = 0; i < 4; i++) out[j][g][i] = 0.0f;
                }
#pragma unroll 1
                for (int section = 0; section < K::SECTIONS; section++) {
                    const int from = section * K::SECTION;
                    const int size = DIM - from < K::SECTION ? DIM - from : K::SECTION;
                    const int bytes = strip_bytes(K::BITS, size, LANES), units = code_units(K::BITS, size, LANES);
                    const u8* strip = block + K::code_bytes(from) + slot / LANES * bytes;
                    Raw<K::BITS> raw[TOGETHER][KEY_LOADS];
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                        for (int n = 0; n < KEY_LOADS; n++)
                            if (n * WARP + lane < units)
                                raw[j][n] = load_codes<K::BITS>(strip + j * bytes, size, LANES, n * WARP + lane);
                    float scale[KEY_FOURS][4], zero[KEY_FOURS][4], top = K::ALONG ? 0.0f : 1.0f;
#pragma unroll
                    for (int n = 0; n < KEY_FOURS; n++) {
                        const int c = (n * WARP + lane) * 4;
                        for (int i = 0; i < 4; i++) scale[n][i] = zero[n][i] = K::ALONG || c >= size ? 0.0f : 1.0f;
                        if (K::ALONG && c < size) {
                            four_halves(scales + c, scale[n]);
                            four_halves(scales + K::ENTRIES + c, zero[n]);
                            for (int i = 0; i < 4; i++) top = fmaxf(top, scale[n][i]);
                        }
                    }
                    if (K::ALONG) top = warp_max(top);
                    float offset[G];
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        const float units_each = units_of(query_most[g] * top);
                        offset[g] = 0.0f;
#pragma unroll
                        for (int n = 0; n < KEY_FOURS; n++) {
                            const int c = (n * WARP + lane) * 4;
                            if (c >= size) continue;
                            const float4 x = *(const float4*)&q[g * DIM + from + c];
                            const float w[4] = {x.x * scale[n][0], x.y * scale[n][1], x.z * scale[n][2], x.w * scale[n][3]};
                            offset[g] += x.x * zero[n][0] + x.y * zero[n][1] + x.z * zero[n][2] + x.w * zero[n][3];
                            mine[g * FOURS + c / 4] = digits(w, units_each);
                        }
                        // Of the lanes that share four tokens one of each four; adding up scores adds the rest.
                        offset[g] += __shfl_xor_sync(ALL, offset[g], 1);
                        offset[g] += __shfl_xor_sync(ALL, offset[g], 2);
                    }
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) {
                        int low[G][4], high[G][4];
#pragma unroll
                        for (int g = 0; g < G; g++)
                            for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
#pragma unroll
                        for (int n = 0; n < KEY_LOADS; n++)
                            if (n * WARP + lane < units)
                                code_sums<K::BITS>(raw[j][n], size, LANES, n * WARP + lane, mine, FOURS, low, high);
                        float own_scale[4] = {1.0f, 1.0f, 1.0f, 1.0f}, own_zero[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                        if (!K::ALONG) {
                            const u16* own = scales + section * 2 * K::ENTRIES + slot + j * LANES + lane % 4 * 4;
                            four_halves(own, own_scale);
                            four_halves(own + K::ENTRIES, own_zero);
                        }
#pragma unroll
                        for (int g = 0; g < G; g++) {
                            const float step = step_of(query_most[g] * top);
                            for (int i = 0; i < 4; i++)
                                out[j][g][i] += ((float)high[g][i] * 256.0f + (float)low[g][i]) * step * own_scale[i] +
                                                offset[g] * own_zero[i];
                        }
                    }
                    __syncwarp();
                }
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        float x = fold<4>(out[j][g], lane);
                        x += __shfl_xor_sync(ALL, x, 4);
                        if ((lane & 4) == 0)
                            scores[g][first - tile + j * LANES + code_token(lane)] = x * size_of_key[j];
                    }
            }
        }
#pragma unroll
        for (int s = 0; s < STRIPS_EACH; s++) {
            const int first = own_first + s * LANES;
            if (first >= end || first + LANES <= seen) continue;
            if (K::KIND == CODES && first + LANES > packed_keys && packed_keys < end) {
                const u8* strip = recent_of<0>(tables.recent[0], first, key.store, head);
                const float size_of_key = key_size(first + float_token(lane));
                __syncwarp();
                float_scores(strip, K::EXACT, q, DIM, DIM, lane, [&](int t, int g, float score) {
                    if (first + t >= packed_keys) scores[g][first - tile + t] = score * size_of_key;
                });
            }
            if (K::KIND != CODES) {
                const u8* block = head_of<0>(tables.blocks[0], first, key.store, head);
                const u8* strip = block + first % K::SLOTS * DIM * bytes_of(K::KIND);
                const float size_of_key = key_size(first + float_token(lane));
                float_scores(strip, K::KIND, q, DIM, DIM, lane,
                             [&](int t, int g, float score) { scores[g][first - tile + t] = score * size_of_key; });
            }
        }
        __syncthreads();
        // Kept keys come in the place of merged ones.
        if (some_keys) {
            key_walk.take(lane, tile + TILE < end ? tile + TILE : end);
            const int from = key_walk.from, to = key_walk.to;
            for (int i = from / LANES + warp; i * LANES < to; i += WARPS) {
                const u8* strip = kept_of<0>(key_column->blocks, i * LANES, key.member, head % K::TOGETHER);
                float_scores(strip, K::EXACT, q, DIM, DIM, lane, [&](int t, int g, float score) {
                    const int index = i * LANES + t;
                    if (index >= from && index < to)
                        scores[g][*kept_position<0>(key_column->blocks, index) - tile] = score;
                });
            }
            __syncthreads();
        }
        // Softmax: the largest scores by warp, then all together. Probabilities of merged values are weighed by magnitudes,
        // zero for kept ones. A lane has a token of its warp's strips.
        const int own = warp * WARP + lane;
        const bool visible = tile + own < end && tile + own >= seen;
        const float size = scaled_values && visible ? magnitude<1>(tables.magnitudes[1], value, head, tile + own) : 1.0f;
        float score[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            score[g] = visible ? capped(scores[g][own], p.softcap) : NONE;
            const float top = warp_max(score[g]);
            if (lane == 0) warp_most[g][warp] = top;
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++) {
            float top = most[g];
#pragma unroll
            for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_most[g][w]);
            const float x = score[g] > NONE ? expf(score[g] - top) : 0.0f;
            const float weight = x * size, f = expf(most[g] - top);
            scores[g][own] = x, weights[g][own] = weight;
            total[g] = total[g] * f + x;
            most[g] = top;
            if (threadIdx.x == 0) factor[g] = f;
            if (V::KIND == CODES) {
                const float largest = warp_max(fabsf(weight));
                if (lane == 0) weight_most[g][warp] = largest;
            }
        }
        __syncthreads();

        auto float_values = [&](const u8* block, int kind, int slots, int slot, int strip, int e, int count, auto w) {
            const int width = V::width(strip), octets = width / 8;
            const int octet = lane % 2, t = lane / 2;
            if (octet >= octets || t >= count) return;
            float x[8];
            load8(block, kind, strip * LANES * slots + (slot + t) * width + octet * 8, x);
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float y = w(g, t);
#pragma unroll
                for (int i = 0; i < 8; i++) sums[e][g][i] += y * x[i];
            }
        };
        if (some_values) value_walk.take(lane, tile + TILE < end ? tile + TILE : end);
        float largest[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            largest[g] = 0.0f;
            if (V::KIND == CODES)
                for (int w = 0; w < WARPS; w++) largest[g] = fmaxf(largest[g], weight_most[g][w]);
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int strip = beside + e * BESIDE;
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float f = factor[g];
                for (int i = 0; i < 8; i++) sums[e][g][i] *= f;
                for (int i = 0; i < 4; i++) code[e][g][i] *= f;
                zeros[e][g] *= f;
            }
            if (around >= AROUND || strip >= V::STRIPS) continue;
            if (V::KIND != CODES) {
#pragma unroll 4
                for (int t = around * LANES; t < TILE; t += AROUND * LANES) {
                    if (tile + t >= end) break;
                    if (tile + t + LANES <= seen) continue;
                    const u8* block = head_of<1>(tables.blocks[1], tile + t, value.store, head);
                    float_values(block, V::KIND, V::SLOTS, (tile + t) % V::SLOTS, strip, e, end - tile - t,
                                 [&](int g, int i) { return weights[g][t + i]; });
                }
            } else {
                if (tile < packed_values) {
                    const int width = V::width(strip);
                    const int section = V::ALONG ? 0 : strip * LANES / V::SECTION;
                    uint2* mine = fours[warp];
                    // A lane has the digits of some fours of tokens: those of the blocks of this part.
                    constexpr int OWN = TILE / 4 / WARP;
                    float scale[OWN][4], zero[OWN][4], top = V::ALONG ? 1.0f : 0.0f;
                    bool used[OWN];
#pragma unroll
                    for (int m = 0; m < OWN; m++) {
                        const int t = (m * WARP + lane) * 4, at = tile + t;
                        used[m] = at < packed_values && at < end && t / V::SLOTS % AROUND == around &&
                                  at / V::SLOTS >= seen / V::SLOTS;
                        for (int i = 0; i < 4; i++) scale[m][i] = 1.0f, zero[m][i] = 0.0f;
                        if (!V::ALONG && used[m]) {
                            const u16* scales =
                                (const u16*)(head_of<1>(tables.blocks[1], at, value.store, head) + V::scales_at()) +
                                section * 2 * V::ENTRIES + at % V::SLOTS;
                            four_halves(scales, scale[m]);
                            four_halves(scales + V::ENTRIES, zero[m]);
                            for (int i = 0; i < 4; i++)
                                if (at + i < packed_values) top = fmaxf(top, scale[m][i]);
                        }
                    }
                    if (!V::ALONG) top = warp_max(top);
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        const float units_each = units_of(largest[g] * top);
#pragma unroll
                        for (int m = 0; m < OWN; m++) {
                            const int t = (m * WARP + lane) * 4, at = tile + t;
                            const float4 x = *(const float4*)&weights[g][t];
                            const float xs[4] = {x.x, x.y, x.z, x.w};
                            float w[4];
                            for (int i = 0; i < 4; i++) {
                                const bool inside = used[m] && at + i < packed_values && at + i < end;
                                w[i] = inside ? xs[i] * scale[m][i] : 0.0f;
                                if (!V::ALONG && inside) zeros[e][g] += xs[i] * zero[m][i];
                            }
                            mine[g * FOURS + t / 4] = digits(w, units_each);
                        }
                    }
                    __syncwarp();
                    int low[G][4], high[G][4];
#pragma unroll
                    for (int g = 0; g < G; g++)
                        for (int i = 0; i < 4; i++) low[g][i] = high[g][i] = 0;
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++) {
                        const int number = around + b * AROUND, from = tile + number * V::SLOTS;
                        if (from >= packed_values || from >= end || from >= tile + TILE || from + V::SLOTS <= seen)
                            continue;
                        const int units = code_units(V::BITS, V::SLOTS, width);
#pragma unroll
                        for (int n = 0; n < VALUE_LOADS; n++)
                            if (n * WARP + lane < units)
                                code_sums<V::BITS>(raw_values[e][b][n], V::SLOTS, width, n * WARP + lane,
                                                   mine + number * (V::SLOTS / 4), FOURS, low, high);
                        if (V::ALONG) {
                            // Scales and zeros are the channels' own, in each block.
                            const u8* block = head_of<1>(tables.blocks[1], from, value.store, head);
                            const u16* own = (const u16*)(block + V::scales_at()) + strip * LANES + lane % (width / 4) * 4;
                            float own_scale[4], own_zero[4];
                            four_halves(own, own_scale);
                            four_halves(own + V::ENTRIES, own_zero);
                            for (int g = 0; g < G; g++) {
                                const float step = step_of(largest[g] * top);
                                float sum = 0.0f;
                                for (int i = lane; i < V::SLOTS; i += WARP)
                                    if (from + i < end) sum += weights[g][from - tile + i];
                                sum = warp_sum(sum);
                                for (int i = 0; i < 4; i++) {
                                    const float x = ((float)high[g][i] * 256.0f + (float)low[g][i]) * step;
                                    code[e][g][i] += x * own_scale[i];
                                    if (lane < width / 4) code[e][g][i] += sum * own_zero[i];
                                    low[g][i] = high[g][i] = 0;
                                }
                            }
                        }
                    }
                    if (!V::ALONG) {
#pragma unroll
                        for (int g = 0; g < G; g++) {
                            const float step = step_of(largest[g] * top);
                            for (int i = 0; i < 4; i++)
                                code[e][g][i] += ((float)high[g][i] * 256.0f + (float)low[g][i]) * step;
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
                        return tile + t + i < packed_values ? 0.0f : weights[g][t + i];
                    });
                }
            }
            if (some_values && around == 0) {
                const int from = value_walk.from, to = value_walk.to;
                for (int i = from / RECENT * RECENT; i < to; i += RECENT) {
                    const u8* block = kept_of<1>(value_column->blocks, i, value.member, head % V::TOGETHER);
                    float_values(block, V::EXACT, RECENT, 0, strip, e, to - i, [&](int g, int j) {
                        return i + j < from ? 0.0f : scores[g][*kept_position<1>(value_column->blocks, i + j) - tile];
                    });
                }
            }
        }
        __syncthreads();
    }

    // The lanes' sums together: one after the other of the parts of a tile writes to shared memory.
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) q[i] = 0.0f;
#pragma unroll
    for (int g = 0; g < G; g++) {
        const float sum = warp_sum(total[g]);
        if (lane == 0) totals[g][warp] = sum;
        if (threadIdx.x == 0) warp_most[g][0] = most[g];
    }
    __syncthreads();
    for (int turn = 0; turn < AROUND; turn++) {
        if (around == turn)
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int strip = beside + e * BESIDE;
                if (strip >= V::STRIPS) continue;
                const int width = V::width(strip);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    float* to = q + g * DIM + strip * LANES;
                    for (int i = 0; i < 8; i++)
                        for (int d = 2; d < WARP; d *= 2) sums[e][g][i] += __shfl_xor_sync(ALL, sums[e][g][i], d);
                    if (lane < width / 8)
                        for (int i = 0; i < 8; i++) to[lane * 8 + i] += sums[e][g][i];
                    __syncwarp();
                    if (V::KIND == CODES) {
                        const float all = warp_sum(zeros[e][g]);
                        for (int i = 0; i < 4; i++)
                            for (int d = width / 4; d < WARP; d *= 2)
                                code[e][g][i] += __shfl_xor_sync(ALL, code[e][g][i], d);
                        if (lane < width / 4)
                            for (int i = 0; i < 4; i++) to[lane * 4 + i] += code[e][g][i] + all;
                    }
                }
            }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < G * DIM; i += THREADS) part[i / DIM * apart + 2 + i % DIM] = q[i];
    if (threadIdx.x < G) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += totals[threadIdx.x][w];
        part[threadIdx.x * apart] = warp_most[threadIdx.x][0], part[threadIdx.x * apart + 1] = sum;
    }
}

struct JoinParams {
    u64 parts, q, k, v, sequences, rows;
    u64 out, low;  // act (rows, HEADS, DIM)
    int splits;
    float scale, softcap;
};

// The parts of a query together; a token that is alone in its step sees itself here. A block to a row and head: parts go
// round its warps.
KERNEL(join, JoinParams) {
    constexpr int C = (DIM + WARP - 1) / WARP;
    SHARED float chances[MOST_PARTS], sums[WARPS][DIM];
    const u64 row = blockIdx.x;
    const int head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Joined joined = join_parts<PART>(p, chances);
    const float *parts = joined.parts, *v = (const float*)p.v + (row * KV_HEADS + head / GROUP) * DIM;
    const int first = joined.first, last = joined.last;
    float sum[C];
#pragma unroll
    for (int n = 0; n < C; n++) sum[n] = 0.0f;
#pragma unroll 4
    for (int s = first + warp; s < last; s += WARPS) {
        const float chance = chances[s];
        if (chance == 0.0f) continue;
#pragma unroll
        for (int n = 0; n < C; n++)
            if (DIM % WARP == 0 || n * WARP + lane < DIM) sum[n] += chance * parts[s * PART + 2 + n * WARP + lane];
    }
#pragma unroll
    for (int n = 0; n < C; n++)
        if (n * WARP + lane < DIM) sums[warp][n * WARP + lane] = sum[n];
    __syncthreads();
    for (int c = threadIdx.x; c < DIM; c += THREADS) {
        float x = joined.alone ? joined.itself * v[c] : 0.0f;
        for (int w = 0; w < WARPS; w++) x += sums[w][c];
        put_act(p.out, p.low, (row * HEADS + head) * DIM + c, x / joined.total);
    }
}
