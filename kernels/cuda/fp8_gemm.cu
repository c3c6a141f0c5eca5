// Block-scaled fp8 products, dense and by expert; made for those whose time is that of reading the weight.
//
// With few tokens the weight is the first operand of the tensor core, 64 rows an instruction, and the tokens are the
// second, as many as there are, rounded up to 16. From 64 tokens on it may be the other way round (TOKENS_FIRST), which
// takes fewer products of scales. One warp copies K-blocks, 128 deep, of both by TMA into a ring of stages; warpgroups
// multiply a K-block from zero and fold the raw sums into their accumulators, `acc = fma(raw, x_scale * weight_scale,
// acc)`, K ascending. While one product's raw sums are folded the tensor core works on the next. Where one warpgroup's
// chain of copies, products and folds would be the time, several make the raw sums of different stages at once, and
// fold them in order. The kernel is persistent: CTAs take tile after tile.
//
// The tile configuration, compile-time parameters: the first operand has 64 rows for each of ROW_BLOCKS parts of
// ROW_GROUPS warpgroups, or of K_GROUPS warpgroups that take stages in turn; a tile has TILE_ROWS rows of the weight
// (so that there are as many tiles as multiprocessors; instructions read past them) and at most TOKENS tokens, copied
// TOKEN_BOX at a time; STAGES of K_BLOCKS K-blocks; raw sums of TOKEN_PARTS parts of the second operand, of which
// BUFFERS are held; CLUSTER CTAs read the tokens of neighbouring tiles once, or with SHARE_WEIGHT the weight of
// neighbouring chunks of tokens, and pass them to each other; at most GROUPS experts; CONSUMER_REGISTERS a thread (0:
// as the compiler likes). TMA writes the sums while the next tile is multiplied if there is memory for them: OUT_BOXES
// boxes a warp, or with IN_RING the tile's last stage.

#include "fp8_mainloop.cuh"

// x e4m3 [rows, K], its scales fp32 [K / 128, rows], weight e4m3 [groups columns, K], its scales fp32
// [groups, ceil(columns / 128), K / 128], counts [groups] tokens of each expert (none: all tokens are one's), to out
// bf16 [rows, columns]; K = 128 blocks. Maps of x and weight have dimensions (128, rows, K / 128).
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(128 * CONSUMERS + PRODUCERS, 1) fp8_gemm(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x_scale,
    const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap out_boxes, const float* weight_scale,
    const long long* counts, u16* out, int rows, int columns, int blocks, int groups) {
    char* memory = shared_memory();
    // The last stage's instructions read ROWS rows.
    char* token_values = memory + STAGES * WEIGHT_BYTES + (TOKENS_FIRST ? 0 : ROWS - TILE_ROWS) * 128;
    char* out_values = token_values + STAGES * TOKEN_BYTES;
    char* scale_values = out_values + CONSUMERS * OUT_BYTES;
    char* sum_values = scale_values + STAGES * SCALE_BYTES;
    u64* barriers = reinterpret_cast<u64*>(sum_values + SUM_BYTES);
    int* first_row = reinterpret_cast<int*>(barriers + 2 * STAGES + K_GROUPS);
    int* first_tile = first_row + GROUPS + 1;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES, turns = empty + 8 * STAGES;
    const Shared shared{shared_address(memory), shared_address(token_values), shared_address(scale_values),
                        shared_address(out_values), full, empty, turns, reinterpret_cast<const float*>(scale_values),
                        memory, reinterpret_cast<float4*>(sum_values)};

    const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * ROW_GROUPS * CLUSTER);
        }
        for (int i = 0; i < K_GROUPS; i++) barrier_init(turns + 8 * i, 4);
        barrier_init_fence();
    }
    if (threadIdx.x == 64) prefetch_map(&weight), prefetch_map(&x), prefetch_map(&x_scale), prefetch_map(&out_boxes);
    if (warp == 1) {
        if (counts) wait_for_kernel_before();
        count_tiles(counts, rows, groups, (columns + TILE_ROWS - 1) / TILE_ROWS, first_row, first_tile);
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_sync();

    Schedule schedule{first_row, first_tile, groups, columns, 0, int(blockIdx.x)};
    schedule.look_ahead();
    Place place;
    if (warp < 4 * CONSUMERS) {
        if constexpr (CONSUMER_REGISTERS > 0) take_registers<CONSUMER_REGISTERS>();
        wait_for_kernel_before();
        const Operands operands{weight_scale, &out_boxes, out, columns, blocks};
        const int row_group = ROW_GROUPS == 1 ? 0 : own_warpgroup();
        StageScales next;
        if (schedule.more) next.begin(operands, schedule.next, row_group);
        while (schedule.more) {
            const Tile tile = schedule.next;
            multiply_tile_from<TOKENS_FIRST ? TILE_ROWS : 16>(
                tile, shared, operands, place, schedule, next, row_group);
        }
        if (STORE_BOXES && threadIdx.x % 32 == 0) finish_boxes();
    } else {
        if constexpr (CONSUMER_REGISTERS > 0) give_registers<24>();
        if (warp > 4 * CONSUMERS || threadIdx.x % 32 > 0) return;
        wait_for_kernel_before();
        let_next_kernel_start();
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
        place.phase = 1;
        for (; schedule.more; schedule.look_ahead()) {
            const Tile tile = schedule.next;
            const int boxes = SHARE_TOKENS ? TOKENS / TOKEN_BOX : (tile.token_count + TOKEN_BOX - 1) / TOKEN_BOX;
            for (int block = 0; block < blocks; block += K_BLOCKS) {
                const u32 ready = full + 8 * place.stage;
                barrier_wait(empty + 8 * place.stage, place.phase);
                barrier_expect(ready, WEIGHT_BYTES + K_BLOCKS * (boxes * TOKEN_BOX * 128 + SCALE_BOX * 4));
                // What is shared is copied in parts, this CTA's to all.
                const u32 weight_target = shared.weight + place.stage * WEIGHT_BYTES;
                if constexpr (SHARE_WEIGHT) {
#pragma unroll
                    for (u32 i = 0; i < CLUSTER; i++) {
                        const int k_block = i * (K_BLOCKS / CLUSTER);
                        const int row = K_BLOCKS > 1 ? 0 : i * (TILE_ROWS / CLUSTER);
                        const u32 target = weight_target + k_block * K_BLOCK_BYTES + row * 128;
                        if (!tile.weight_shared) {
                            copy_k_blocks(target, &weight, ready, tile.weight_row + row, block + k_block);
                        } else if (i == rank) {
                            copy_k_blocks_to_all<CLUSTER>(
                                target, &weight, ready, tile.weight_row + row, block + k_block);
                        }
                    }
                } else {
                    copy_k_blocks(weight_target, &weight, ready, tile.weight_row, block);
                }
                const u32 token_target = shared.tokens + place.stage * TOKEN_BYTES;
                if constexpr (SHARE_TOKENS) {
                    const int k_block = rank * (K_BLOCKS / CLUSTER);
                    const int token = K_BLOCKS > 1 ? 0 : rank * TOKEN_BOX;
                    copy_k_blocks_to_all<CLUSTER>(
                        token_target + k_block * TOKEN_K_BLOCK_BYTES + token * 128, &x, ready, tile.first_token + token,
                        block + k_block);
                } else {
                    for (int box = 0; box < boxes; box++) {
                        const int token = tile.first_token + box * TOKEN_BOX;
                        copy_k_blocks(token_target + box * TOKEN_BOX * 128, &x, ready, token, block);
                    }
                }
                copy_tile(shared.scales + place.stage * SCALE_BYTES, &x_scale, ready, tile.first_token / 4 * 4, block);
                place.next();
            }
        }
    }
    // Another CTA of the cluster may still write to this one's memory.
    if constexpr (CLUSTER > 1) cluster_sync();
}
