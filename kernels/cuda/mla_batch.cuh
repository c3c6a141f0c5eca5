// The batch of an attention launch, and how its CTAs find their work in it.
//
// Lengths stay on the device: each CTA counts tiles and splits itself, a warp looking at 32 requests at a time.

#pragma once

#include "mla_units.cuh"

constexpr int ROWS = 64;
constexpr int KEYS = 64;
constexpr int RANK = 512;
constexpr int HALF = RANK / 2;
constexpr int TILES = 9;
constexpr int TILES_A_COPY = 3;  // of one TMA copy, and that one barrier waits for
constexpr int COPIES = TILES / TILES_A_COPY;
constexpr int HALF_TILES = 4;
constexpr int BLOCK_BYTES = TILES * TILE;
constexpr int SCORE_REGISTERS = 72;
constexpr int VALUE_REGISTERS = 184;

struct Batch {
    const void* block_table;
    const void* seq_lens;
    const void* query_start_loc;
    long long table_stride;
    int table_wide, lens_wide, starts_wide;  // 64-bit integers
    int requests;
    int heads;
    int block_size;
    int box_rows;    // keys of one copy: the largest power of two that divides block_size, 64 at most
    float scale;     // of scores, in units of log 2
    u16* out;        // bf16 [tokens * heads, 512]
    float* prefixes; // fp32 [CTAs, 64 * 512], what a tile's earlier splits were combined to
    float* partials; // fp32 [capacity, 64, 512], outputs of splits that `combine` puts together
    float2* stats;   // fp32 [capacity, 64], their maxima and sums
    int capacity;
    int* split_kv;  // set where splits are stored for `combine`
};

// One piece of work: rows of one tile and a range of their keys.
struct Work {
    int q_row;           // first row in q and out
    int rows;            // 0: no work is left
    int first_position;  // of the request's first query
    int tile_row;        // rows of the request before this tile
    int key_begin, key_end;
    int slot;            // where the split is stored; -1: the output is written
    int visible;         // keys that some row of the tile sees
    int request;
};

// Where in the batch the search for works stands.
struct Works {
    bool split_kv;  // every split is a work of its own
    int number;     // of the work that comes next
    int first;      // of the 32 requests looked at
    int before;     // works before them
};

__device__ __forceinline__ long long integer(const void* array, int wide, long long index) {
    return wide ? ((const long long*)array)[index] : (long long)((const int*)array)[index];
}

// What of a request's lengths every schedule needs; lane i of a warp looks at request `first + i`.
struct Lane {
    int start, queries, length, tiles, splits;
};

__device__ __forceinline__ Lane look_at(const Batch& batch, int request) {
    Lane lane = {0, 0, 0, 0, 0};
    if (request < batch.requests) {
        lane.start = (int)integer(batch.query_start_loc, batch.starts_wide, request);
        lane.queries = (int)integer(batch.query_start_loc, batch.starts_wide, request + 1) - lane.start;
        lane.length = (int)integer(batch.seq_lens, batch.lens_wide, request);
        lane.tiles = (lane.queries * batch.heads + ROWS - 1) / ROWS;
        lane.splits = (lane.length + SPLIT_KEYS - 1) / SPLIT_KEYS;
    }
    return lane;
}

// Whether every split is work of its own: where that keeps the card busy for a shorter time, and there is room. Times
// are in blocks of keys, as measured: a prefix combined in place takes as long as three, `combine` as two, and one more
// for every 24 splits.
__device__ bool use_split_kv(const Batch& batch, int lane, int processors) {
    if (batch.capacity == 0) return false;
    constexpr int BLOCKS = SPLIT_KEYS / KEYS;
    int tiles = 0, works = 0, longest = 0;
    for (int first = 0; first < batch.requests; first += 32) {
        const Lane own = look_at(batch, first + lane);
        tiles += own.tiles;
        works += min(own.tiles * own.splits, 1 << 20);
        longest = max(longest, own.tiles > 0 ? (own.length + KEYS - 1) / KEYS : 0);
    }
    tiles = __reduce_add_sync(~0u, tiles);
    works = __reduce_add_sync(~0u, works);
    longest = __reduce_max_sync(~0u, longest);
    const int together = (tiles + processors - 1) / processors * (longest + 3 * ((longest - 1) / BLOCKS));
    const int split = (works + processors - 1) / processors * min(longest, BLOCKS) + 2 + works / 24;
    return works <= batch.capacity && split < together;
}

// Finds the next work of this CTA, by a whole warp.
__device__ __forceinline__ Work find_work(const Batch& batch, Works& works, int lane) {
    Work work = {};
    int before = works.before;
    const int number = works.number;
    for (int first = works.first; first < batch.requests; first += 32) {
        const Lane own = look_at(batch, first + lane);
        const int count = own.tiles * (works.split_kv ? own.splits : 1);
        int through = count;
        for (int i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(~0u, through, i);
            if (lane >= i) through += other;
        }
        const u32 behind = __ballot_sync(~0u, number < before + through);
        if (behind) {
            const int source = __ffs(behind) - 1;
            const int start = __shfl_sync(~0u, own.start, source), queries = __shfl_sync(~0u, own.queries, source);
            const int length = __shfl_sync(~0u, own.length, source), tiles = __shfl_sync(~0u, own.tiles, source);
            const int local = number - before - __shfl_sync(~0u, through - count, source);
            const int tile = works.split_kv ? local % tiles : local, split = works.split_kv ? local / tiles : 0;
            work.tile_row = tile * ROWS;
            work.q_row = start * batch.heads + work.tile_row;
            work.rows = min(queries * batch.heads - work.tile_row, ROWS);
            work.first_position = length - queries;
            work.visible = work.first_position + (work.tile_row + work.rows - 1) / batch.heads + 1;
            work.key_begin = split * SPLIT_KEYS;
            work.key_end = works.split_kv ? min(work.visible, work.key_begin + SPLIT_KEYS) : work.visible;
            work.slot = works.split_kv && work.visible > SPLIT_KEYS ? number : -1;
            work.request = first + source;
            __syncwarp();
            if (lane == 0) {
                works.number = number + gridDim.x;
                works.first = first;
                works.before = before;
            }
            __syncwarp();
            return work;
        }
        before += __shfl_sync(~0u, through, 31);
    }
    return work;
}
