// The shared memory of a head attention CTA: its operands, what its warps tell each other, and their barriers.

#pragma once

#include "head_tiles.cuh"

constexpr int DEPTH = 192;  // of queries and keys: 128 numbers of a head, then 64 rotary ones
// All lie in columns of 64 numbers: keys of 128 rows, the queries of a warpgroup and half of the values of 64 (TILE).
constexpr int COLUMNS = DEPTH / 64;
constexpr int COLUMN_BYTES = KEYS * 128;
constexpr int KEY_BYTES = COLUMNS * COLUMN_BYTES;
constexpr int QUERY_BYTES = COLUMNS * TILE;
constexpr int HALF_BYTES = WIDTH / 64 * TILE;
constexpr int VALUE_BYTES = 2 * HALF_BYTES;

struct Shared {
    alignas(1024) char q[2][QUERY_BYTES];
    alignas(1024) char keys[2][KEY_BYTES];
    alignas(1024) char values[2][VALUE_BYTES];
    Tile tile[2];
    u64 q_full[2], q_empty[2];  // of each warpgroup, with its `tile`
    u64 keys_full[2], keys_empty[2];
    u64 values_full[2], values_empty[2];
};

// A ring's place: the stage, and the parity of its barriers' phase.
struct Place {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        parity ^= stage;
        stage ^= 1;
    }
};
