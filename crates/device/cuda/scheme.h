// How a side (0: keys, 1: values) of a cache lies in memory. In a block of SLOTS tokens there is a part for each store (a
// layer of its own, or what a pair of layers shares) and in it one for each KV head, with a scale for each group of codes.

#define PAGE 256  // tokens of a page of magnitudes

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

// Tokens kept exact of a pair's column: a table of blocks.
struct Kept {
    u64 blocks;
    int count;
    float least, most, least_kept;  // running extremes of the distances
    int settled;                    // tokens of the rule up to the last that moved these, or that came with others
    int from;                       // the first that no window has left behind
    // What a step has changed, to go back to: of the step after so many tokens.
    int before, settled_before;
    float least_before, most_before, least_kept_before;
    int pad;
};

// Where a layer finds its states on one side.
struct Place {
    int store;   // its part of a block
    int pair;    // of magnitudes and kept tokens; -1: the layer has states of its own
    int member;  // which layer of the pair
};

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

// The first of the kept tokens of a column at or after a position.
template <int S>
DEVICE int kept_from(const Kept& kept, int position) {
    int low = kept.from, high = kept.count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (*kept_position<S>(kept.blocks, middle) < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Index of a number in a head's floats in a block of `slots` tokens.
template <int S>
DEVICE int float_index(int slots, int slot, int channel) {
    return float_at<S>(DIM, slots, slot, channel);
}

// A token's magnitude.
template <int S>
DEVICE float magnitude(u64 pages, const Place& place, int head, int position) {
    typedef Side<S> L;
    const int column = (place.pair * 2 + place.member) * L::COLUMNS + (L::COLUMNS > 1 ? head : 0);
    return read(entry<u8>(pages, position / PAGE), L::MAGNITUDE, column * PAGE + position % PAGE);
}
