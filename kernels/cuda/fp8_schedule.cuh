// Tiles of all experts, and which of them a CTA of the persistent kernel takes.

#pragma once

#include "fp8_layout.cuh"

struct Tile {
    int first_token;
    int token_count;
    int first_row;   // of the expert's weight
    int weight_row;  // of all experts' weights
    int scale_row;   // of all experts' scales, where this expert's begin
    bool weight_shared;
};

// Of an expert with so many chunks of tokens and parts of the weight. A cluster has neighbouring parts and one chunk.
// With SHARE_WEIGHT it has neighbouring chunks and one part, but for chunks that are left over.
__device__ __forceinline__ int clusters_of(int chunks, int parts) {
    const int left = parts % CLUSTER;
    const int last = SHARE_WEIGHT ? left * (chunks / CLUSTER) + chunks % CLUSTER : chunks;
    return parts / CLUSTER * chunks + (left ? last : 0);
}

// Tiles of all experts, one after the other: for each CLUSTER parts of the weight the chunks of tokens.
struct Schedule {
    const int* first_row;   // [groups + 1], tokens before an expert
    const int* first_tile;  // [groups + 1], tiles before an expert
    int groups, columns, group, number;
    Tile next;
    bool more;

    // Find the next tile; its divisions take time.
    __device__ __forceinline__ void look_ahead() {
        more = find(number, next);
        number += gridDim.x;
    }

    __device__ __forceinline__ bool find(int number, Tile& tile) {
        while (group < groups && number >= first_tile[group + 1]) group++;
        if (group == groups) return false;
        const int rows = first_row[group + 1] - first_row[group];
        const int chunks = (rows + TOKENS - 1) / TOKENS;
        constexpr int UNIT_TOKENS = TOKENS_FIRST ? 64 : 16;
        const int size = ((rows + chunks - 1) / chunks + UNIT_TOKENS - 1) / UNIT_TOKENS * UNIT_TOKENS;
        const int local = number - first_tile[group], cluster = local / CLUSTER, rank = local % CLUSTER;
        int chunk = cluster % chunks, part = cluster / chunks * CLUSTER + rank;
        tile.weight_shared = false;
        if constexpr (SHARE_WEIGHT) {
            const int first_part = part - rank, parts = (columns + TILE_ROWS - 1) / TILE_ROWS - first_part;
            const int together = chunks / CLUSTER, shared = min(CLUSTER, parts) * together;
            tile.weight_shared = chunk < shared;
            part = tile.weight_shared ? first_part + chunk / together : part;
            chunk = tile.weight_shared ? chunk % together * CLUSTER + rank : chunk - shared + together * CLUSTER;
        }
        tile.first_token = first_row[group] + chunk * size;
        tile.token_count = min(size, rows - chunk * size);
        tile.first_row = part * TILE_ROWS;
        tile.weight_row = group * columns + tile.first_row;
        tile.scale_row = group * ((columns + 127) / 128);
        return true;
    }
};

// Tokens and tiles before each expert, summed by one warp, 32 experts at a time.
__device__ __forceinline__ void count_tiles(
    const long long* counts, int rows, int groups, int parts, int* first_row, int* first_tile) {
    const int lane = threadIdx.x % 32;
    int rows_before = 0, tiles_before = 0;
    for (int start = 0; start < groups; start += 32) {
        const int index = start + lane;
        int tokens = 0;
        if (index < groups) tokens = counts ? int(counts[index]) : rows;
        int tiles = clusters_of((tokens + TOKENS - 1) / TOKENS, parts) * CLUSTER;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int lower_tokens = __shfl_up_sync(~0u, tokens, step), lower_tiles = __shfl_up_sync(~0u, tiles, step);
            if (lane >= step) tokens += lower_tokens, tiles += lower_tiles;
        }
        if (index < groups) first_row[index + 1] = rows_before + tokens, first_tile[index + 1] = tiles_before + tiles;
        rows_before += __shfl_sync(~0u, tokens, 31);
        tiles_before += __shfl_sync(~0u, tiles, 31);
    }
    if (lane == 0) first_row[0] = first_tile[0] = 0;
}
