// The scales of a stage, and how raw sums enter the accumulator by them.

#pragma once

#include "fp8_ring.cuh"
#include "fp8_schedule.cuh"

// Rows of a tile's weight before the next scale block, counted from its first row.
__device__ __forceinline__ int scale_border(const Tile& tile) {
    return TILE_ROWS % 128 == 0 ? 128 : 128 - tile.first_row % 128;
}

// Where the scales of a thread's rows of the weight are: of the two rows that it has as the first operand, or of the
// tile's first rows and those from its border on. Rows that are not stored get any.
struct WeightScales {
    const float* first;
    const float* second;

    WeightScales() = default;
    __device__ __forceinline__ WeightScales(const Operands& operands, const Tile& tile, int rows_before) {
        const int row = tile.first_row + (TOKENS_FIRST ? 0 : rows_before + (SPLIT ? own_row() : 0));
        const int last = (operands.columns - 1) / 128;
        const long long blocks = operands.blocks;
        first = operands.weight_scale + (tile.scale_row + min(row / 128, last)) * blocks;
        second = operands.weight_scale + (tile.scale_row + min((row + (TOKENS_FIRST ? 128 : 8)) / 128, last)) * blocks;
    }
    // Behind the last K-block the operands and the tokens' scales are zeros; with a negative scale what is added is -0,
    // which changes no sum.
    __device__ __forceinline__ float2 load(int block, int blocks) const {
        if (block >= blocks) return make_float2(-1, -1);
        const float scale = __ldg(first + block);
        return make_float2(scale, SPLIT ? __ldg(second + block) : scale);
    }
};

// The scales of a thread's sums of a K-block. Sums 4 j to 4 j + 3 are of rows lane / 4 (two) and that + 8 (two) of the
// first operand, and rows 8 j + 2 (lane % 4) and the next of the second.
template <int COUNT>
struct Scales {
    float first[TOKENS_FIRST ? 2 : COUNT / 2], second[!SPLIT ? 1 : TOKENS_FIRST ? 2 : COUNT / 2];

    __device__ __forceinline__ void set(int at, float2 token, float2 weight) {
        first[at] = __fmul_rn(token.x, weight.x), first[at + 1] = __fmul_rn(token.y, weight.x);
        if constexpr (SPLIT) second[at] = __fmul_rn(token.x, weight.y), second[at + 1] = __fmul_rn(token.y, weight.y);
    }

    // With tokens as the second operand; `token_scales` are those of the first token that the instruction has.
    __device__ __forceinline__ void read(const float* token_scales, float2 weight) {
#pragma unroll
        for (int j = 0; j < COUNT / 4; j++) {
            const float* place = token_scales + 8 * j + threadIdx.x % 4 * 2;
            set(2 * j, GROUPS > 1 ? make_float2(place[0], place[1]) : *reinterpret_cast<const float2*>(place), weight);
        }
    }

    // `border` and `column`, the instruction's first row of the second operand, are counted from the tile's first.
    __device__ __forceinline__ void fold(float* acc, const float (&raw)[COUNT], int border, int column) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int mine = TOKENS_FIRST ? i % 4 / 2 : i / 4 * 2 + i % 2;
            const bool other = SPLIT && (TOKENS_FIRST ? (column + i / 4 * 8) / UNIT * UNIT >= border : i % 4 > 1);
            acc[i] = __fmaf_rn(raw[i], other ? second[SPLIT ? mine : 0] : first[mine], acc[i]);
        }
    }
};

// Where a thread's tokens' scales begin in a K-block's: with tokens first those of the first of its two tokens.
__device__ __forceinline__ int own_token_scales(const Tile& tile, int row_group) {
    return tile.first_token % 4 + (TOKENS_FIRST ? row_group * 64 + own_row() : 0);
}

__device__ __forceinline__ const float* token_scales_of(
    const Shared& shared, const Place& place, int k_block, int own) {
    return shared.scale_values + place.stage * (SCALE_BYTES / 4) + k_block * SCALE_BOX + own;
}

// With tokens first, the scales of a thread's two.
__device__ __forceinline__ float2 two_of(const float* token_scales) {
    return make_float2(token_scales[0], token_scales[8]);
}

// The scales of the weight in a stage, for each K-block and block of rows, and where those of the next are: computing
// that anew would take more instructions than all else beside the tensor core's and the folds.
struct StageScales {
    float2 of[K_BLOCKS][ROW_BLOCKS];
    WeightScales from[ROW_BLOCKS];
    int left;  // K-blocks that the tile has, from this stage on

    __device__ __forceinline__ void begin(const Operands& operands, const Tile& tile, int row_group) {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
            from[r] = WeightScales(operands, tile, (row_group * ROW_BLOCKS + r) * 64);
        }
        left = operands.blocks;
        load();
    }
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) from[r].first += K_BLOCKS, from[r].second += K_BLOCKS;
        left -= K_BLOCKS;
        load();
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
#pragma unroll
            for (int s = 0; s < K_BLOCKS; s++) of[s][r] = from[r].load(s, left);
        }
    }
};
