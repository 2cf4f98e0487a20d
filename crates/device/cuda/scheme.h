// How a side (0: keys, 1: values) of a cache lies in memory: the host's layout, see `minicache_core::store`.
//
// Blocks of SLOTS tokens; in a block a part for each store (a layer of its own, or what a pair of layers shares) and in
// it one for each KV head. Keys lie in strips of 16 tokens with a step for each channel, values in strips of 16 channels
// (the last may be narrower) with a step for each token. Floats: a number for each step and lane. Codes: steps in
// fours, a byte for each lane and step of a four; codes below 8 bits share bytes, see `place`.

enum { F16, F32, CODES };

#define LANES 16
#define RECENT 16       // tokens of a block of those that wait to be quantised, and of kept ones
#define PAGE 256        // tokens of a page of magnitudes
#define CONST static constexpr int

// A side of all sequences. KIND: how its stores hold numbers. RUN: numbers that share a scale and a zero. ALONG: whether
// they are of one channel (else of one token). RESIDUAL: newest tokens kept exact. EXACT: the type of these and of kept
// tokens. COLUMNS: columns of magnitudes, 1 or one for each KV head, of type MAGNITUDE.
template <int S> struct Side;
template <> struct Side<0> {
    CONST KIND = K_KIND, BITS = K_BITS, RUN = K_RUN, ALONG = K_ALONG, RESIDUAL = K_RESIDUAL, EXACT = K_EXACT;
    CONST STORES = K_STORES, COLUMNS = K_COLUMNS, MAGNITUDE = K_MAGNITUDE;
};
template <> struct Side<1> {
    CONST KIND = V_KIND, BITS = V_BITS, RUN = V_RUN, ALONG = V_ALONG, RESIDUAL = V_RESIDUAL, EXACT = V_EXACT;
    CONST STORES = V_STORES, COLUMNS = V_COLUMNS, MAGNITUDE = V_MAGNITUDE;
};

#define FIXED DEVICE constexpr

FIXED int ceil_div(int a, int b) { return (a + b - 1) / b; }
FIXED int lines(int bytes) { return ceil_div(bytes, 64) * 64; }
FIXED int bytes_of(int kind) { return kind == F32 ? 4 : 2; }
// Bytes of a plane of `bits` of a strip.
FIXED int plane_bytes(int bits, int steps, int width) { return ceil_div(ceil_div(steps, 4), 8 / bits) * 4 * width; }
FIXED int strip_bytes(int bits, int steps, int width) {
    return bits == 3 ? plane_bytes(2, steps, width) + plane_bytes(1, steps, width) : plane_bytes(bits, steps, width);
}

template <int S> struct Layout : Side<S> {
    using Side<S>::KIND;
    using Side<S>::BITS;
    using Side<S>::RUN;
    using Side<S>::ALONG;
    using Side<S>::RESIDUAL;
    CONST SLOTS = KIND != CODES ? 32 : ALONG ? RUN : 64;
    // Channels of a section, which has scales of its own, and their number.
    CONST SECTION = ALONG || RUN > DIM ? DIM : RUN;
    CONST SECTIONS = (DIM + SECTION - 1) / SECTION;
    CONST STRIPS = (DIM + LANES - 1) / LANES;
    CONST NARROW = DIM % LANES;
    // Bytes of the codes of the first `channels` channels, a whole number of sections or strips.
    FIXED int code_bytes(int channels) {
        return S == 0 ? (channels / SECTION) * (SLOTS / LANES) * strip_bytes(BITS, SECTION, LANES) +
                            (channels % SECTION ? SLOTS / LANES * strip_bytes(BITS, channels % SECTION, LANES) : 0)
                      : (channels / LANES) * strip_bytes(BITS, SLOTS, LANES) +
                            (channels % LANES ? strip_bytes(BITS, SLOTS, channels % LANES) : 0);
    }
    FIXED int scales_at() { return ceil_div(code_bytes(DIM), 2) * 2; }
    // Numbers of an array of scales; each section has one of them, then one of zeros.
    CONST ENTRIES = ALONG ? DIM : SLOTS;
    FIXED int head_bytes() {
        return KIND == CODES ? lines(scales_at() + SECTIONS * 2 * ENTRIES * 2) : lines(DIM * SLOTS * bytes_of(KIND));
    }
    FIXED int recent_bytes() { return lines(DIM * RECENT * bytes_of(Side<S>::EXACT)); }
    // Heads of the vectors of a column of magnitudes.
    CONST TOGETHER = KV_HEADS / Side<S>::COLUMNS;
    // A block of kept tokens: both layers' states, then the positions.
    FIXED int kept_positions() { return 2 * TOGETHER * recent_bytes(); }
    // How many of the first `len` tokens are in blocks.
    DEVICE int packed(int len) {
        if (KIND != CODES) return len;
        if (len <= RESIDUAL) return 0;
        return ALONG ? (len - RESIDUAL) / RUN * RUN : len - RESIDUAL;
    }
    // The channels of a strip of values, and the first byte of its codes in a head.
    DEVICE int width(int strip) { return DIM - strip * LANES < LANES ? DIM - strip * LANES : LANES; }
};

// One sequence's tables: for each side those of the blocks, of the waiting tokens' and of the magnitudes' pages.
struct Tables {
    u64 blocks[2], recent[2], magnitudes[2], kept[2];
};

struct Sequence {
    Tables tables;
    int len;         // tokens held before the step
    int first, rows; // its rows in the step
    int pad;
};

// Tokens kept exact of a pair's column: a table of blocks.
struct Kept {
    u64 blocks;
    int count;
    float least, most, least_kept;  // running extremes of the distances
};

// Where a layer finds its states on one side.
struct Place {
    int store;   // its part of a block
    int pair;    // of magnitudes and kept tokens; -1: the layer has states of its own
    int member;  // which layer of the pair
};

struct Row {
    int sequence, position;
};

template <class T>
DEVICE T* entry(u64 table, int i) {
    return (T*)read_address((const u64*)table + i);
}

// A head's part of the block of a token, and of a block of waiting ones.
template <int S>
DEVICE u8* head_of(u64 blocks, int position, int store, int head) {
    typedef Layout<S> L;
    return entry<u8>(blocks, position / L::SLOTS) + (u64)(store * KV_HEADS + head) * L::head_bytes();
}

template <int S>
DEVICE u8* recent_of(u64 recent, int position, int store, int head) {
    typedef Layout<S> L;
    return entry<u8>(recent, position / RECENT) + (u64)(store * KV_HEADS + head) * L::recent_bytes();
}

template <int S>
DEVICE u8* kept_of(u64 blocks, int index, int member, int inner) {
    typedef Layout<S> L;
    return entry<u8>(blocks, index / RECENT) + (member * L::TOGETHER + inner) * L::recent_bytes();
}

template <int S>
DEVICE int* kept_position(u64 blocks, int index) {
    return (int*)(entry<u8>(blocks, index / RECENT) + Layout<S>::kept_positions()) + index % RECENT;
}

// Index of a number in a head's floats in a block of `slots` tokens.
template <int S>
DEVICE int float_index(int slots, int slot, int channel) {
    if (S == 0) return (slot / LANES * DIM + channel) * LANES + slot % LANES;
    const int strip = channel / LANES;
    return strip * LANES * slots + slot * Layout<S>::width(strip) + channel % LANES;
}

DEVICE float load(const void* x, int kind, int i) {
    return kind == F32 ? ((const float*)x)[i] : from_half(((const u16*)x)[i]);
}

DEVICE void store(void* x, int kind, int i, float y) {
    if (kind == F32)
        ((float*)x)[i] = y;
    else
        ((u16*)x)[i] = to_half(y);
}

// The same of what a kernel only reads.
DEVICE float read(const void* x, int kind, int i) {
    return kind == F32 ? from_bits(read4((const float*)x + i)) : from_half(read2((const u16*)x + i));
}

// A token's magnitude.
template <int S>
DEVICE float magnitude(u64 pages, const Place& place, int head, int position) {
    typedef Side<S> L;
    const int column = (place.pair * 2 + place.member) * L::COLUMNS + (L::COLUMNS > 1 ? head : 0);
    return read(entry<u8>(pages, position / PAGE), L::MAGNITUDE, column * PAGE + position % PAGE);
}
