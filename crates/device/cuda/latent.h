// How latents lie in memory, see `minicache_core::latent`. Of a sequence's tokens the first SINKS are exact, and so are the
// newest RESIDUAL; those between are latents. Indices of tokens count from the first that is no sink: blocks of latents and
// of the newest tokens go by them. In a block of SLOTS tokens there is a part for each set (the KV heads of a group of layers
// that share latents); in a block of exact tokens one for each layer and KV head.

// A side. KIND: how latents are held. CENTRED: scales are bytes, and zero is in the middle of the codes. RANK, SECTIONS: the
// most of any set. FORMS: a bit for each number of bits that codes have, and TRELLIS above it that those of a trellis have; the
// lowest for strips that are read lane by lane.
#define TRELLIS 8
template <int S> struct Latents;
template <> struct Latents<0> {
    CONST KIND = K_KIND, CENTRED = K_CENTRED, SLOTS = K_SLOTS, RANK = K_RANK, SECTIONS = K_SECTIONS, FORMS = K_FORMS;
};
template <> struct Latents<1> {
    CONST KIND = V_KIND, CENTRED = V_CENTRED, SLOTS = V_SLOTS, RANK = V_RANK, SECTIONS = V_SECTIONS, FORMS = V_FORMS;
};

// The largest number whose window is a byte of six bits: see `minicache_core::store`.
#define WINDOW 6

// Consecutive components with the same number of bits, and a scale of their own for each token.
struct Section {
    int first, size, bits;
    int codes;    // the first byte of its codes in a set's part of a block
    int alike;    // sections from this one on that are as large, with as many bits, and lie one after the other
    int trellis;  // whether codes stand for levels, by those before them
    float unit, middle;
};

// 16 components of values, or the last ones of a section.
struct Strip {
    int section, first, width, codes;
};

// The KV heads of a group of layers that share latents.
struct Set {
    u64 mean;      // f32 (members, DIM), un-rotated
    u64 encode;    // f32 (members, DIM, rank)
    u64 restore;   // f32: keys (members, DIM, rank), values (members, rank, DIM)
    u64 sections, strips;
    int rank, section_count, strip_count;
    int at, scales_at;  // the set's part of a block, and the scales in it
    int layers, head, heads;
};

// What is exact of a layer's KV head: the first tokens, as values lie, and the newest.
DEVICE u8* sink_of(u64 sinks, int position, int layer, int head) {
    return entry<u8>(sinks, position / SINK_SLOTS) +
           (u64)(layer * KV_HEADS + head) * lines(DIM * SINK_SLOTS * bytes_of(EXACT));
}

DEVICE int sink_index(int position, int channel) { return float_at<1>(DIM, SINK_SLOTS, position % SINK_SLOTS, channel); }

DEVICE u8* newest_of(u64 recent, int index, int layer, int head) {
    return entry<u8>(recent, index / RECENT) + (u64)(layer * KV_HEADS + head) * lines(DIM * RECENT * bytes_of(EXACT));
}

// Tokens that are latents, of so many in all.
FIXED int latents_of(int len) { return len > SINKS + RESIDUAL ? len - SINKS - RESIDUAL : 0; }

// A set's part of the block of a latent.
template <int S>
DEVICE u8* latents_at(u64 blocks, int index, const Set& set) {
    return entry<u8>(blocks, index / Latents<S>::SLOTS) + set.at;
}

// Scale and zero of a token's section.
template <int S>
DEVICE void scale_of(const u8* block, const Set& set, const Section& section, int number, int slot, float* scale, float* zero) {
    typedef Latents<S> L;
    const u8* scales = block + set.scales_at;
    if (L::CENTRED) {
        *scale = from_half((u16)(scales[number * L::SLOTS + slot] << 7));
        *zero = -section.middle * *scale;
    } else {
        const u16* own = (const u16*)scales + number * 2 * L::SLOTS + slot;
        *scale = from_half(own[0]), *zero = from_half(own[L::SLOTS]);
    }
}

// The codes of a lane at the four steps of a four, a byte each.
DEVICE u32 codes_of(const u8* strip, int bits, int steps, int width, int four, int lane) {
    const int first = FIRST_PLANE(bits), per = 8 / first;
    const u32 mask = (0xffu >> (8 - first)) * 0x01010101u;
    u32 x = *(const u32*)(strip + (four / per * width + lane) * 4) >> four % per * first & mask;
    if (bits == 3) {
        const u8* plane = strip + plane_bytes(2, steps, width);
        x |= (*(const u32*)(plane + (four / 8 * width + lane) * 4) >> four % 8 & 0x01010101u) << 2;
    }
    return x;
}

// The windows of a lane's codes at four steps: each with those before it, which for the first ones are in the four `before`
// and, of one bit, in the `first`, the one before that.
DEVICE u32 windows_along(int bits, u32 now, u32 before, u32 first) {
    if (bits == 3) return now | (now << 8 | before >> 24) << 3;
    const u32 windows = now | (now << 8 | before >> 24) << bits | (now << 16 | before >> 16) << 2 * bits;
    if (bits == 2) return windows;
    return windows | (now << 24 | before >> 8) << 3 | before << 4 | (before << 8 | first >> 24) << 5;
}

// As `codes_of` the windows of a trellis: each code with those before it. Those of keys follow each other along the steps of a
// strip, those of values along the lanes of a section's full strips.
template <int S>
DEVICE u32 windows_of(const Section& section, const u8* strip, int number, int steps, int width, int four, int lane) {
    const int bits = section.bits;
    u32 window = codes_of(strip, bits, steps, width, four, lane);
    if (S == 0) {
        const u32 before = four > 0 ? codes_of(strip, bits, steps, width, four - 1, lane) : 0;
        const u32 first = bits == 1 && four > 1 ? codes_of(strip, bits, steps, width, four - 2, lane) : 0;
        return windows_along(bits, window, before, first);
    }
    for (int back = 1; back < WINDOW / bits; back++) {
        int at = lane - back;
        const u8* from = strip;
        if (at < 0) {
            // The strip before it, unless this one is the first or narrow: that begins anew.
            if (number == 0 || width < LANES) break;
            from -= strip_bytes(bits, steps, LANES), at += LANES;
        }
        window |= codes_of(from, bits, steps, width, four, at) << back * bits;
    }
    return window;
}

// What four windows stand for.
DEVICE u32 levels_of(const u8* levels, u32 windows) {
    return (u32)levels[windows & 63] | (u32)levels[windows >> 8 & 63] << 8 | (u32)levels[windows >> 16 & 63] << 16 |
           (u32)levels[windows >> 24 & 63] << 24;
}

// A table of levels for each number of bits from 1 to 3.
#define LEVELS 64

// A component of a latent as attention sees it. `levels`: of all bits.
template <int S>
DEVICE float latent_number(const u8* block, const Set& set, const Section& section, int number, int slot, int component,
                           const u8* levels) {
    typedef Latents<S> L;
    if (L::KIND != CODES) return load(block, L::KIND, float_at<S>(set.rank, L::SLOTS, slot, component));
    const int place = component - section.first, strip = S == 0 ? slot / LANES : place / LANES;
    const int steps = S == 0 ? section.size : L::SLOTS, left = section.size - place / LANES * LANES;
    const int width = S == 0 || left > LANES ? LANES : left;
    const int step = S == 0 ? place : slot, lane = S == 0 ? slot % LANES : place % LANES;
    const u8* from = block + section.codes + strip * strip_bytes(section.bits, steps, LANES);
    u32 four = section.trellis ? levels_of(levels + (section.bits - 1) * LEVELS,
                                           windows_of<S>(section, from, strip, steps, width, step / 4, lane))
                               : codes_of(from, section.bits, steps, width, step / 4, lane);
    float scale, zero;
    scale_of<S>(block, set, section, number, slot, &scale, &zero);
    return scale * (float)(four >> step % 4 * 8 & 255) + zero;
}

// A number of the phases of a latent's position: cosines, then sines.
DEVICE float phase_of(u64 phases, int index, int channel) { return load((const void*)phases, EXACT, float_at<0>(DIM, 1, index, channel)); }

// The mean of a member's keys, rotated to a latent's position.
DEVICE float rotated(const float* mean, u64 phases, int index, int channel) {
    const int half = DIM / 2, j = channel % half;
    const float cosine = phase_of(phases, index, j), sine = phase_of(phases, index, j + half);
    return channel < half ? mean[j] * cosine - mean[j + half] * sine : mean[j] * sine + mean[j + half] * cosine;
}

// Of a layer's group, what a KV head shares latents in.
DEVICE const Set& set_of(u64 sets, int head) {
    const Set* all = (const Set*)sets;
    return all[head / all[0].heads];
}
