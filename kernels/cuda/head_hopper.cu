// Attention with keys and values of each head, V3's (128 + 64 and 128), on Hopper's asynchronous units.
//
// A CTA takes tiles of 128 queries of one head, one after the other, and walks their keys in blocks of 128. One warp
// copies queries, keys and values by TMA, which lie in two stages; two warpgroups of 64 rows multiply them
// (head_consumer.cuh). While one computes probabilities the tensor core works for the other.
//
// Every product and sum of the contract is an intrinsic that rounds once and is never contracted.

#include "head_consumer.cuh"

constexpr int COPY_REGISTERS = 24;
constexpr int ROW_REGISTERS = 240;

// The warp that copies operands, in the order in which they are read: keys are a block ahead of values.
struct Copies {
    Shared& shared;
    const TensorMap *q_map, *key_map, *rope_map, *value_map;
    Place of_keys, of_values;

    __device__ __forceinline__ void queries(const Tile& tile, int turn) {
        for (int group = 0; group < 2; group++) {
            u64* full = &shared.q_full[group];
            barrier_wait(&shared.q_empty[group], (turn & 1) ^ 1);
            if (elect()) {
                shared.tile[group] = tile;
                barrier_expect(full, tile.rows > 0 ? QUERY_BYTES : 0);
                if (tile.rows > 0) copy_rows(shared.q[group], q_map, full, tile.first_query + group * 64, tile.head);
            }
        }
    }

    __device__ __forceinline__ void keys(const Tile& tile, int block) {
        u64* full = &shared.keys_full[of_keys.stage];
        char* to = shared.keys[of_keys.stage];
        barrier_wait(&shared.keys_empty[of_keys.stage], of_keys.parity ^ 1);
        if (elect()) {
            const int key = tile.first_key + block * KEYS;
            barrier_expect(full, KEY_BYTES);
            copy_rows(to, key_map, full, key, tile.head);
            copy_rows(to + 2 * COLUMN_BYTES, rope_map, full, key, 0);
        }
        of_keys.next();
    }

    __device__ __forceinline__ void values(const Tile& tile, int block) {
        u64* full = &shared.values_full[of_values.stage];
        char* to = shared.values[of_values.stage];
        barrier_wait(&shared.values_empty[of_values.stage], of_values.parity ^ 1);
        if (elect()) {
            const int key = tile.first_key + block * KEYS;
            barrier_expect(full, VALUE_BYTES);
            copy_rows(to, value_map, full, key, tile.head);
            copy_rows(to + HALF_BYTES, value_map, full, key + 64, tile.head);
        }
        of_values.next();
    }
};

__device__ __forceinline__ void copy_operands(Copies& copies, const Heads& heads, int lane) {
    Search search = {0, 0};
    for (int turn = 0;; ++turn) {
        const Tile tile = find_tile(heads, search, number_in(turn), lane);
        const int blocks = (tile.visible + KEYS - 1) / KEYS;
        if (blocks > 0) copies.keys(tile, 0);
        copies.queries(tile, turn);
        if (blocks == 0) return;
        for (int block = 1; block < blocks; block++) {
            copies.keys(tile, block);
            copies.values(tile, block - 1);
        }
        copies.values(tile, blocks - 1);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
attend_heads(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap key_map,
             const __grid_constant__ TensorMap rope_map, const __grid_constant__ TensorMap value_map,
             const __grid_constant__ Heads heads) {
    Shared& shared = *(Shared*)shared_memory();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        prefetch_map(&q_map);
        prefetch_map(&key_map);
        prefetch_map(&rope_map);
        prefetch_map(&value_map);
        for (int group = 0; group < 2; group++) {
            barrier_init(&shared.q_full[group], 1);
            barrier_init(&shared.q_empty[group], 4);
        }
        for (int stage = 0; stage < 2; stage++) {
            barrier_init(&shared.keys_full[stage], 1);
            barrier_init(&shared.keys_empty[stage], 8);
            barrier_init(&shared.values_full[stage], 1);
            barrier_init(&shared.values_empty[stage], 8);
        }
        barrier_init_fence();
        publish_to_units();
    }
    __syncthreads();
    if (group < 2) {
        take_registers<ROW_REGISTERS>();
        compute_rows(shared, heads, group, thread);
    } else {
        give_registers<COPY_REGISTERS>();
        if (thread >= 32) return;
        Copies copies = {shared, &q_map, &key_map, &rope_map, &value_map, {}, {}};
        copy_operands(copies, heads, thread);
    }
}
