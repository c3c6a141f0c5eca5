// The warpgroups that own a stage: they copy its keys, multiply scores and compute probabilities.

#pragma once

#include "mla_exp2.cuh"
#include "mla_shared.cuh"

// Starts the copies of a stage's keys, by one warp.
struct Copies {
    const TensorMap* map;
    const Batch& batch;
    const Work& work;
    int page;  // of the block that comes next, looked up ahead

    // Keys behind the last one are taken from its page.
    __device__ __forceinline__ int page_of(int key) const {
        const int number = min(key, work.visible - 1) / batch.block_size;
        return (int)integer(batch.block_table, batch.table_wide, work.request * batch.table_stride + number);
    }

    __device__ __forceinline__ void start(Shared& shared, int begin, int next, int stage, int parity, int lane) {
        char* keys = shared.keys[stage];
        u64* full = shared.full[stage];
        const int row = begin % batch.block_size;
        if (batch.box_rows == KEYS) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                // The first copy lies in the first half of the columns, the second in both, the last one in the second.
                if (i < 2) barrier_wait(&shared.empty[stage][i], parity);
                if (elect()) {
                    barrier_expect(&full[i], TILES_A_COPY * TILE);
                    copy_keys(keys + i * TILES_A_COPY * TILE, map, &full[i], row, i * TILES_A_COPY, page);
                }
            }
            page = page_of(next);
            return;
        }
        for (int half = 0; half < 2; half++) barrier_wait(&shared.empty[stage][half], parity);
        if (lane < COPIES) barrier_expect(&full[lane], TILES_A_COPY * TILE);
        __syncwarp();
        for (int box = lane; box < KEYS / batch.box_rows; box += 32) {
            const int key = begin + box * batch.box_rows;
            const int box_page = page_of(key), box_row = key % batch.block_size;
            for (int tile = 0; tile < TILES; tile++)
                copy_keys(keys + tile * TILE + box * batch.box_rows * 128, map, &full[tile / TILES_A_COPY], box_row,
                          tile, box_page);
        }
    }
};

// Scores of one block: K ascends over the tiles, each used as soon as it is there.
__device__ __forceinline__ void start_scores(Shared& shared, float (&scores)[32], int stage, int parity) {
    const u64 q = operand(shared.q), keys = operand(shared.keys[stage]);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (tile % TILES_A_COPY == 0) {
            barrier_wait(&shared.full[stage][tile / TILES_A_COPY], parity);
            wgmma_begin();
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int step = (tile * TILE + k * 32) >> 4;
            multiply_scores(scores, q + step, keys + step, tile + k > 0);
        }
    }
    wgmma_end();
}

// The sum of a row's 64 probabilities by halves; this thread has columns 8 i + 2 (lane % 4) and the one behind as the
// row's pair i.
__device__ __forceinline__ float fold_sum(const u32 (&pairs)[16], int row) {
    float sum[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const auto at = [&](int i) {
            const u32 pair = pairs[2 * i + row];
            return __int_as_float(j == 0 ? pair << 16 : pair & 0xFFFF0000);
        };
        const float even = __fadd_rn(__fadd_rn(at(0), at(4)), __fadd_rn(at(2), at(6)));
        const float odd = __fadd_rn(__fadd_rn(at(1), at(5)), __fadd_rn(at(3), at(7)));
        sum[j] = __fadd_rn(even, odd);
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(~0u, sum[j], 2));
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(~0u, sum[j], 1));
    }
    return __fadd_rn(sum[0], sum[1]);
}

// The blocks of one stage, every second one: copies, scores, probabilities.
template <int STAGE>
__device__ __forceinline__ void compute_probabilities(
    Shared& shared, const Batch& batch, const TensorMap* q_map, const TensorMap* key_map, int thread) {
    const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
    const int row = warp * 16 + lane / 4;
    const float infinity = __int_as_float(0x7f800000);
    const bool scout = STAGE == 0 && warp == 0;
    if (scout) {
        const bool split_kv = use_split_kv(batch, lane, gridDim.x);
        if (lane == 0) shared.works = {split_kv, (int)blockIdx.x, 0, 0};
        if (lane == 0 && blockIdx.x == 0 && batch.capacity > 0) *batch.split_kv = split_kv;
        __syncwarp();
    }
    int block = 0;
    for (int turn = 0;; ++turn) {
        if (scout) {
            Work next;
            do next = find_work(batch, shared.works, lane);
            while (next.rows > 0 && next.key_begin >= next.key_end);
            barrier_wait(&shared.work_empty[turn & 1], (turn >> 1 & 1) ^ 1);
            if (lane == 0) shared.work[turn & 1] = next;
            arrive_warp(&shared.work_full[turn & 1], lane);
            barrier_wait(&shared.q_empty, (turn & 1) ^ 1);
            if (next.rows > 0 && elect()) {
                barrier_expect(&shared.q_full, BLOCK_BYTES);
                for (int i = 0; i < TILES; i += TILES_A_COPY)
                    copy_q(shared.q + i * TILE, q_map, &shared.q_full, next.q_row, i);
            }
        }
        barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
        const Work& work = shared.work[turn & 1];
        if (work.rows == 0) return;
        const int blocks = (work.key_end - work.key_begin + KEYS - 1) / KEYS;
        int begin = work.key_begin + ((STAGE ^ block) & 1) * KEYS;
        int own = block + ((STAGE ^ block) & 1);
        block += blocks;
        Copies copies = {key_map, batch, work, 0};
        if (warp == 0 && begin < work.key_end) copies.page = copies.page_of(begin);
        // Rows behind the last one see what the last one sees; nobody stores them.
        int position[2];
        for (int i = 0; i < 2; i++)
            position[i] = work.first_position + (work.tile_row + min(row + 8 * i, work.rows - 1)) / batch.heads;
        const int lowest = work.first_position + work.tile_row / batch.heads;
        for (; begin < work.key_end; begin += 2 * KEYS, own += 2) {
            const int parity = own >> 1 & 1, parity_before = (own - 1) >> 1 & 1;
            const bool first = begin % SPLIT_KEYS == 0;
            if (warp == 0) copies.start(shared, begin, begin + 2 * KEYS, STAGE, parity ^ 1, lane);
            barrier_wait(&shared.q_full, turn & 1);
            float scores[32];
            start_scores(shared, scores, STAGE, parity);
            // The block before is the other warpgroup's; its maxima are read while the tensor core works.
            if (own > 0) barrier_wait(&shared.scaled[STAGE ^ 1], parity_before);
            float before[2], maximum[2], alpha[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                before[r] = first ? -infinity : shared.maximum[STAGE ^ 1][row + 8 * r];
                maximum[r] = before[r];
                alpha[r] = 1.0f;
            }
            wgmma_wait(0);
            if (begin + KEYS > lowest + 1) {
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int key = begin + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (key > position[i / 2 % 2]) scores[i] = -infinity;
                }
            }
            float largest[2];
            bool grows = false;  // most blocks leave all maxima as they are; then no lane asks another
#pragma unroll
            for (int r = 0; r < 2; r++) {
                largest[r] = scores[2 * r];
#pragma unroll
                for (int i = 0; i < 8; i++)
                    largest[r] = fmaxf(largest[r], fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
                grows |= __fmul_ru(largest[r], batch.scale) > before[r];
            }
            if (__any_sync(~0u, grows)) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
                    largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 2));
                    maximum[r] = fmaxf(step_above(largest[r], batch.scale), before[r]);
                    alpha[r] = power_of_two(__fsub_rn(before[r], maximum[r]));
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (lane % 4 == 0) {
                    shared.alpha[STAGE][row + 8 * r] = alpha[r];
                    shared.maximum[STAGE][row + 8 * r] = maximum[r];
                }
            }
            // The outputs are scaled while the probabilities are computed.
            arrive_warp(&shared.scaled[STAGE], lane);
            const int to_row = warp * 16 + lane % 16;
            char* to = shared.keys[STAGE] + 8 * TILE + to_row * 128;
            const auto exponent = [&](int i) { return __fmaf_rn(scores[i], batch.scale, -maximum[i / 2 % 2]); };
            u32 pairs[16];  // of probabilities
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Doubt doubt;
#pragma unroll
                for (int i = 8 * half; i < 8 * half + 8; i++) {
                    const float low = near_exp2(exponent(2 * i)), high = near_exp2(exponent(2 * i + 1));
                    pairs[i] = pack_bf16(low, high);
                    doubt.consider(low, high, pairs[i]);
                }
                if (doubt.any()) {
#pragma unroll
                    for (int i = 8 * half; i < 8 * half + 8; i++) {
                        const float low = exp2_of_nonpositive(exponent(2 * i));
                        pairs[i] = pack_bf16(low, exp2_of_nonpositive(exponent(2 * i + 1)));
                    }
                }
                // The rotary tile is overwritten: all warps must have read it.
                if (half == 0) warpgroup_sync(STAGE);
#pragma unroll
                for (int i = 4 * half; i < 4 * half + 4; i += 2) {
                    const u32* p = pairs + 2 * i;
                    store_matrices(shared_address(to + ((i + lane / 16) ^ (to_row % 8)) * 16), p[0], p[1], p[2], p[3]);
                }
                if (half == 0 && begin + KEYS > work.visible) {
                    // What lies behind the last key may be NaN, and 0 times NaN is NaN.
                    for (int i = thread; i < (begin + KEYS - work.visible) * 64; i += 128) {
                        const int at = i / 64 + work.visible - begin, part = i % 64;
                        *(uint4*)(shared.keys[STAGE] + part / 8 * TILE + at * 128 + part % 8 * 16) =
                            make_uint4(0, 0, 0, 0);
                    }
                    publish_to_units();
                }
                arrive_warp(&shared.ready[STAGE][half], lane);
            }
            if (own > 0) barrier_wait(&shared.totalled[STAGE ^ 1], parity_before);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float total_before = first ? 0.0f : shared.total[STAGE ^ 1][row + 8 * r];
                const float total = __fadd_rn(__fmul_rn(total_before, alpha[r]), fold_sum(pairs, r));
                if (lane % 4 == 0) shared.total[STAGE][row + 8 * r] = total;
            }
            arrive_warp(&shared.totalled[STAGE], lane);
        }
        arrive_warp(&shared.q_empty, lane);
        arrive_warp(&shared.work_empty[turn & 1], lane);
    }
}
