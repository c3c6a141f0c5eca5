// The warpgroups that compute: 64 rows each, whose scores, probabilities and output stay in registers.

#pragma once

#include "head_shared.cuh"
#include "head_softmax.cuh"

// Scores of one block: each head's own numbers, then the rotary ones.
__device__ __forceinline__ void start_scores(Shared& shared, float (&scores)[SCORES], int group, int stage) {
    const u64 q = operand(shared.q[group]), keys = operand(shared.keys[stage]);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
        const int of_q = k / 4 * TILE + k % 4 * 32, of_keys = k / 4 * COLUMN_BYTES + k % 4 * 32;
        multiply_scores(scores, q + (of_q >> 4), keys + (of_keys >> 4), k > 0);
    }
    wgmma_end();
}

// Add one block's values, times their probabilities, to the output.
__device__ __forceinline__ void start_values(
    Shared& shared, float (&output)[SCORES], const u32 (&pairs)[PAIRS], int stage) {
    const u64 values = operand(shared.values[stage]);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        const u32 of_step[4] = {pairs[4 * k], pairs[4 * k + 1], pairs[4 * k + 2], pairs[4 * k + 3]};
        multiply_values(output, of_step, values + ((k / 4 * HALF_BYTES + k % 4 * 16 * 128) >> 4), 1);
    }
    wgmma_end();
}

// What lies behind the last key that is seen may be NaN, and 0 times NaN is NaN. Both warpgroups write the zeros.
__device__ __forceinline__ void clear_hidden_values(Shared& shared, int stage, int seen, int group, int thread) {
    for (int i = thread; i < (KEYS - seen) * (WIDTH / 8); i += 128) {
        const int key = seen + i / (WIDTH / 8), part = i % (WIDTH / 8);
        char* half = shared.values[stage] + key / 64 * HALF_BYTES;
        *(uint4*)(half + part / 8 * TILE + key % 64 * 128 + part % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    publish_to_units();
    warpgroup_sync(group);
}

// Lane i of four has part i of four pieces; now it has all parts of piece i.
__device__ __forceinline__ void transpose(u32 (&x)[4], int lane) {
#pragma unroll
    for (int by = 2; by > 0; by /= 2) {
        const bool upper = lane & by;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & by) continue;
            const u32 other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + by], by);
            x[i] = upper ? other : x[i];
            x[i + by] = upper ? x[i + by] : other;
        }
    }
}

// Divide by the totals, round and store. `out` is this thread's first row, of which `left` are left.
__device__ __forceinline__ void store_output(
    const float (&output)[SCORES], const Rows& rows, u16* out, size_t row_size, int left, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float over = __frcp_rn(rows.total[r]);
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i += 4) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* x = output + 4 * (i + j) + 2 * r;
                pairs[j] = pack_bf16(__fmul_rn(x[0], over), __fmul_rn(x[1], over));
            }
            transpose(pairs, lane);
            u16* to = out + 8 * r * row_size + 8 * (i + lane % 4);
            if (left > 8 * r) *(uint4*)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// Tile after tile. A block's scores are started before the values of the block before are added, so that the tensor
// core has work while probabilities are computed, and the warpgroups take turns: it works for one while the other does
// that.
__device__ __forceinline__ void compute_rows(Shared& shared, const Heads& heads, int group, int thread) {
    const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
    const int warp_row = group * 64 + warp * 16, row = warp_row + lane / 4;
    Place of_keys, of_values;
    if (group == 1) give_turn(0);
    for (int turn = 0;; ++turn) {
        barrier_wait(&shared.q_full[group], turn & 1);
        const Tile tile = shared.tile[group];
        if (tile.rows == 0) break;
        const int last = (tile.visible - 1) / KEYS;
        float scores[SCORES], output[SCORES];
        u32 pairs[PAIRS];
        Rows rows;
#pragma unroll
        for (int i = 0; i < SCORES; i++) output[i] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rows.maximum[r] = __int_as_float(0xff800000);
            rows.total[r] = 0.0f;
        }
        const auto start_block = [&] {
            barrier_wait(&shared.keys_full[of_keys.stage], of_keys.parity);
            await_turn(group);
            start_scores(shared, scores, group, of_keys.stage);
        };
        const auto finish_values = [&](bool scales) {
            wgmma_wait(0);
            hold(output);
            arrive_warp(&shared.values_empty[of_values.stage], lane);
            of_values.next();
            if (!scales) return;
#pragma unroll
            for (int i = 0; i < SCORES; i++) output[i] = __fmul_rn(output[i], rows.alpha[i / 2 % 2]);
        };
        // The probabilities of a block whose scores are there, once the tensor core has read those of the block before.
        const auto find_probabilities = [&](int block, bool adds) {
            hold(scores);
            arrive_warp(&shared.keys_empty[of_keys.stage], lane);
            of_keys.next();
            if (block == last) arrive_warp(&shared.q_empty[group], lane);
            const int position = tile.first_position - block * KEYS;
            if (position + warp_row + 1 < KEYS) {
                const int hidden = position + row + 1 - lane % 4 * 2;
                mask_scores(scores, {hidden, hidden + 8});
            }
            const bool scales = raise_maxima(rows, scores, heads.scale);
            float powers[SCORES / 2];
            find_powers(powers, scores, rows, heads.scale, 0);
            if (adds) finish_values(scales);
            round_powers(pairs, powers, 0);
            find_powers(powers, scores, rows, heads.scale, 1);
            round_powers(pairs, powers, 1);
#pragma unroll
            for (int r = 0; r < 2; r++) rows.total[r] = __fadd_rn(rows.total[r], fold_sum(pairs, r));
        };
        start_block();
        give_turn(group ^ 1);
        wgmma_wait(0);
        find_probabilities(0, false);
        for (int block = 1; block <= last; block++) {
            start_block();
            barrier_wait(&shared.values_full[of_values.stage], of_values.parity);
            start_values(shared, output, pairs, of_values.stage);
            give_turn(group ^ 1);
            wgmma_wait(1);
            find_probabilities(block, true);
        }
        barrier_wait(&shared.values_full[of_values.stage], of_values.parity);
        const int seen = tile.visible - last * KEYS;
        if (seen < KEYS) clear_hidden_values(shared, of_values.stage, seen, group, thread);
        start_values(shared, output, pairs, of_values.stage);
        finish_values(false);
        const size_t row_size = (size_t)heads.heads * WIDTH;
        u16* out = heads.out + (size_t)(tile.first_query + row) * row_size + tile.head * WIDTH;
        store_output(output, rows, out, row_size, tile.rows - row, lane);
    }
    // The other warpgroup's last turn is given to nobody else.
    if (group == 0) await_turn(0);
}
