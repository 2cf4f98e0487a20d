// Slots: what a KV head of a layer holds in caches of methods that drop tokens. They lie in blocks of 16, which have those of
// all KV heads and layers; a token may have any slot.

#define NUMBER_BYTES (K_KIND == F32 ? 4 : 2)

// Which slots a layer has.
struct SlotPlace {
    int table;      // of the sequence's two tables of blocks
    int layer;      // in a block
    int counts;     // of the sequence's counts, times KV_HEADS
    int remembers;  // whether the attention received is kept beside the tokens
};

// What a sequence drops in a step.
struct Ranking {
    int from, to;  // positions that are ranked; the others stay
    int most;      // how many of them stay
    int counted;   // first row whose attention counts; as many as there are rows: none does
    int offset;    // where its candidates (slots, then rows) begin in working memory
    int expected;  // whether scores are those of `expect`
};

// The slots of a KV head.
struct Slots {
    u64 blocks;
    int* count;
    u64 offset;

    DEVICE_METHOD void open(const Sequence& s, const SlotPlace& place, int head) {
        const u64 bytes = 2 * RECENT * DIM * NUMBER_BYTES + (place.remembers ? 2 : 1) * RECENT * 4;
        blocks = s.tables.blocks[place.table];
        count = (int*)s.tables.kept[0] + place.counts * KV_HEADS + head;
        offset = (u64)(place.layer * KV_HEADS + head) * bytes;
    }
    DEVICE_METHOD u8* block(int slot) const { return entry<u8>(blocks, slot / RECENT) + offset; }
    DEVICE_METHOD u8* key(int slot) const { return block(slot) + slot % RECENT * DIM * NUMBER_BYTES; }
    DEVICE_METHOD u8* value(int slot) const { return key(slot) + RECENT * DIM * NUMBER_BYTES; }
    DEVICE_METHOD int* position(int slot) const {
        return (int*)(block(slot) + 2 * RECENT * DIM * NUMBER_BYTES) + slot % RECENT;
    }
    DEVICE_METHOD float* attention(int slot) const { return (float*)position(slot) + RECENT; }
};

// The first position that a query at `position` sees.
DEVICE int first_seen(int window, int position) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}
