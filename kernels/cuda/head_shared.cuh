// The shared memory of a head attention CTA: its operands, what its warps tell each other, and their barriers.

#pragma once

#include "head_tiles.cuh"

constexpr int DEPTH = 192;  // of queries and keys: 128 numbers of a head, then 64 rotary ones
// Queries and keys lie in columns of 64 numbers and 128 rows, values in halves of 64 rows, each in such columns (TILE).
constexpr int COLUMN_BYTES = 128 * 128;
constexpr int QUERY_BYTES = DEPTH / 64 * COLUMN_BYTES;
constexpr int KEY_BYTES = QUERY_BYTES;
constexpr int HALF_BYTES = WIDTH / 64 * TILE;
constexpr int VALUE_BYTES = 2 * HALF_BYTES;

struct Shared {
    alignas(1024) char q[QUERY_BYTES];
    alignas(1024) char keys[2][KEY_BYTES];
    alignas(1024) char values[2][VALUE_BYTES];
    Tile tile;
    u64 q_full, q_empty;  // with the queries, `tile`
    u64 keys_full[2], keys_empty[2];
    u64 values_full[2], values_empty[2];
};
