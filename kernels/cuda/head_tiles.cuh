// The work of a head attention launch: tiles of 128 queries of one head, and in which order CTAs take them.
//
// Lengths stay on the device, so each CTA finds its tiles itself, a warp looking at 32 sequences at a time.

#pragma once

#include "head_units.cuh"

constexpr int ROWS = 128;  // queries of a tile
constexpr int KEYS = 128;  // of a block
constexpr int WIDTH = 128;  // of a value
// Of one head, keys and values that stay in the L2 cache while all tiles that read them are computed: 24 MiB of them.
constexpr int CACHED_KEYS = (24 << 20) / (2 * (128 + WIDTH));

struct Heads {
    const void* query_starts;
    const void* key_starts;
    u16* out;  // bf16 [queries, heads, WIDTH]
    int query_starts_wide, key_starts_wide;  // 64-bit integers
    int sequences, heads;
    float scale;  // of scores, in units of log 2
};

struct Tile {
    int rows;  // 0: no tile is left
    int head;
    int first_query, first_key;  // of the tile and of its sequence, in q and in k
    int first_position;          // of the first query in its sequence
    int visible;                 // keys that some row sees
};

// Where in the launch the search for tiles stands.
struct Search {
    int first;   // of the 32 sequences looked at
    int before;  // tiles before them
};

__device__ __forceinline__ int integer(const void* array, int wide, int index) {
    return wide ? (int)((const long long*)array)[index] : ((const int*)array)[index];
}

// This CTA's tile of a round. Tiles come by descending length, so that every second round goes backwards.
__device__ __forceinline__ int number_in(int round) {
    const int place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + place;
}

// Tile `number`, by a whole warp; numbers ascend from call to call. Of each sequence, heads whose keys fit the cache
// come one such group after the other; in a group the last queries, which see the most keys, come first.
__device__ __forceinline__ Tile find_tile(const Heads& heads, Search& search, int number, int lane) {
    Tile tile = {};
    for (; search.first < heads.sequences; search.first += 32) {
        const int sequence = search.first + lane;
        int start = 0, queries = 0, first_key = 0, keys = 0;
        if (sequence < heads.sequences) {
            start = integer(heads.query_starts, heads.query_starts_wide, sequence);
            queries = integer(heads.query_starts, heads.query_starts_wide, sequence + 1) - start;
            first_key = integer(heads.key_starts, heads.key_starts_wide, sequence);
            keys = integer(heads.key_starts, heads.key_starts_wide, sequence + 1) - first_key;
        }
        const int count = (queries + ROWS - 1) / ROWS * heads.heads;
        int through = count;
        for (int i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(~0u, through, i);
            if (lane >= i) through += other;
        }
        const u32 behind = __ballot_sync(~0u, number < search.before + through);
        if (behind) {
            const int source = __ffs(behind) - 1;
            start = __shfl_sync(~0u, start, source);
            queries = __shfl_sync(~0u, queries, source);
            keys = __shfl_sync(~0u, keys, source);
            const int local = number - search.before - __shfl_sync(~0u, through - count, source);
            const int tiles = (queries + ROWS - 1) / ROWS;
            const int group = max(1, min(heads.heads, CACHED_KEYS / keys));
            const int first_head = local / (tiles * group) * group, together = min(group, heads.heads - first_head);
            const int in_group = local - first_head * tiles;
            const int row = (tiles - 1 - in_group / together) * ROWS;
            tile.rows = min(ROWS, queries - row);
            tile.head = first_head + in_group % together;
            tile.first_query = start + row;
            tile.first_key = __shfl_sync(~0u, first_key, source);
            tile.first_position = keys - queries + row;
            tile.visible = min(keys, tile.first_position + ROWS);
            return tile;
        }
        search.before += __shfl_sync(~0u, through, 31);
    }
    return tile;
}
