// The epilogue: sums are rounded to bf16 and written, by the threads or by TMA.

#pragma once

#include "fp8_ring.cuh"
#include "fp8_schedule.cuh"

// Round and write N tokens x 64 rows of the weight through shared memory, 128 bytes a token.
template <int N>
__device__ __forceinline__ void store_transposed_sums(
    const float (&acc)[N / 2], const Shared& shared, const Operands& operands, const Tile& tile, int rows_before) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x % 128, group = threadIdx.x / 128;
    const u32 buffer = shared.out + group * OUT_BYTES;
    warpgroup_sync(group);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        // Lanes 0 to 7 address the tokens of rows 0 to 7 of this warp, lanes 8 to 15 those of rows 8 to 15.
        const u32 target = buffer + (8 * j + lane % 8) * OUT_PITCH + thread / 32 * 32 + lane % 16 / 8 * 16;
        store_transposed(target, pack_bf16(acc[4 * j], acc[4 * j + 1]), pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
    }
    warpgroup_sync(group);
    const int row = rows_before + thread % 8 * 8;
    if (row < TILE_ROWS && tile.first_row + row < operands.columns) {
        const char* source = shared.values + (shared.out - shared.weight) + group * OUT_BYTES + thread % 8 * 16;
        for (int token = thread / 8; token < tile.token_count; token += 16) {
            const long long place = (long long)(tile.first_token + token) * operands.columns + tile.first_row + row;
            *reinterpret_cast<uint4*>(operands.out + place) =
                *reinterpret_cast<const uint4*>(source + token * OUT_PITCH);
        }
    }
}

// The same for 64 tokens x TILE_ROWS rows of the weight, 64 of these at a time; each warp has 16 of the tokens.
__device__ __forceinline__ void store_sums(
    const float (&acc)[TILE_ROWS / 2], const Shared& shared, const Operands& operands, const Tile& tile,
    int tokens_before, int stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 boxes = IN_RING ? shared.tokens + stage * TOKEN_BYTES + warp * BOX_BYTES
                              : shared.out + warp * BOXES * BOX_BYTES;
    const int first_token = tokens_before + warp % 4 * 16;
    // Shuffled, so that the compiler knows that a warp goes one way.
    const bool whole = STORE_BOXES && __shfl_sync(~0u, int(first_token + 16 <= tile.token_count), 0);
#pragma unroll
    for (int first = 0; first < TILE_ROWS; first += 64) {
        const u32 box = boxes + (IN_RING ? first / 64 * TOKEN_K_BLOCK_BYTES : first / 64 % BOXES * BOX_BYTES);
        if (IN_RING && first == 0) warpgroup_sync(own_warpgroup());
        if (OUT_BOXES > 0 && lane == 0) {
            if (whole) wait_for_boxes_but<BOXES - 1>();
            else wait_for_boxes_but<0>();
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Four matrices of eight rows of the weight: tokens 0 to 7, 8 to 15, and of the next eight rows.
            const int left = first / 8 + 2 * i, right = min(left + 1, TILE_ROWS / 8 - 1);
            if (left >= TILE_ROWS / 8) break;
            const int token = lane % 16, chunk = 2 * i + lane / 16;
            store_matrices(
                box + token * 128 + (chunk ^ token % 8) * 16,
                pack_bf16(acc[4 * left], acc[4 * left + 1]), pack_bf16(acc[4 * left + 2], acc[4 * left + 3]),
                pack_bf16(acc[4 * right], acc[4 * right + 1]), pack_bf16(acc[4 * right + 2], acc[4 * right + 3]));
        }
        if (whole) {
            publish_to_units();
            __syncwarp();
            if (lane == 0) {
                store_box(operands.out_boxes, box, tile.first_row + first, tile.first_token + first_token);
            }
            continue;
        }
        __syncwarp();
        const int row = first + lane % 8 * 8;
        if (row >= TILE_ROWS || tile.first_row + row >= operands.columns) continue;
#pragma unroll
        for (int token = lane / 8; token < 16; token += 4) {
            if (first_token + token >= tile.token_count) break;
            const long long target =
                (long long)(tile.first_token + first_token + token) * operands.columns + tile.first_row + row;
            *reinterpret_cast<uint4*>(operands.out + target) = *reinterpret_cast<const uint4*>(
                shared.values + (box - shared.weight) + token * 128 + (lane % 8 ^ token % 8) * 16);
        }
    }
}

template <int N>
__device__ __forceinline__ void store(
    const float (&acc)[N / 2], const Shared& shared, const Operands& operands, const Tile& tile, int rows_before,
    int stage) {
    if constexpr (TOKENS_FIRST) {
        store_sums(acc, shared, operands, tile, rows_before, stage);
    } else {
        store_transposed_sums<N>(acc, shared, operands, tile, rows_before);
    }
}
