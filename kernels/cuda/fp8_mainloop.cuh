// The main loop: a warpgroup multiplies a tile, stage after stage.

#pragma once

#include "fp8_epilogue.cuh"
#include "fp8_scales.cuh"
#include "wgmma.cuh"

// 64 rows of the first operand times 2 COUNT of the second over 128 of K, from zero; `row` of the first and `column` of
// the second are counted from the tile's.
template <int COUNT>
__device__ __forceinline__ void multiply(
    float (&raw)[COUNT], const Shared& shared, int stage, int k_block, int row, int column) {
    const u32 weight = shared.weight + stage * WEIGHT_BYTES + k_block * K_BLOCK_BYTES;
    const u32 tokens = shared.tokens + stage * TOKEN_BYTES + k_block * TOKEN_K_BLOCK_BYTES;
    const u64 a = tile_descriptor((TOKENS_FIRST ? tokens : weight) + row * 128);
    const u64 b = tile_descriptor((TOKENS_FIRST ? weight : tokens) + column * 128);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(raw, a + 2 * k, b + 2 * k, k != 0);
    wgmma_end();
}

// Multiply a tile of N rows of the second operand in K_GROUPS warpgroups that take stages in turn: all multiply at the
// same time, and the accumulator passes from one to the next, thread by thread, through shared memory.
template <int N>
__device__ __forceinline__ void multiply_tile_in_turns(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule) {
    constexpr int COUNT = N / 2;
    const int group = own_warpgroup(), thread = threadIdx.x % 128;
    const int turns = (operands.blocks + K_BLOCKS - 1) / K_BLOCKS;
    const WeightScales weight_scales(operands, tile, 0);
    const int own = own_token_scales(tile, 0);
    int turn = (group - place.next_group + K_GROUPS) % K_GROUPS;
    Place mine = place;
    mine.next(turn);
    place.skip(turns);
    place.next_group = (place.next_group + turns) % K_GROUPS;
    for (; turn < turns; turn += K_GROUPS, mine.next(K_GROUPS)) {
        const int block = turn * K_BLOCKS;
        float raw[K_BLOCKS][COUNT];
        float2 weight[K_BLOCKS];
        Scales<COUNT> scales[K_BLOCKS];
#pragma unroll
        for (int s = 0; s < K_BLOCKS; s++) weight[s] = weight_scales.load(block + s, operands.blocks);
        barrier_wait(shared.full + 8 * mine.stage, mine.phase);
#pragma unroll
        for (int s = 0; s < K_BLOCKS; s++) multiply<COUNT>(raw[s], shared, mine.stage, s, 0, 0);
#pragma unroll
        for (int s = 0; s < K_BLOCKS; s++) {
            const float* token_scales = token_scales_of(shared, mine, s, own);
            if constexpr (TOKENS_FIRST) scales[s].set(0, two_of(token_scales), weight[s]);
            else scales[s].read(token_scales, weight[s]);
        }
        finish_reads();
        wgmma_wait(0);
#pragma unroll
        for (int s = 0; s < K_BLOCKS; s++) hold(raw[s]);
        give_back(shared.empty + 8 * mine.stage);

        float acc[COUNT] = {};
        if (turn > 0 || place.begun) {
            barrier_wait(shared.turns + 8 * group, place.turn_phase);
            place.turn_phase ^= 1;
        }
        if (turn > 0) {
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++) {
                const float4 four = shared.sums[i * 128 + thread];
                acc[4 * i] = four.x, acc[4 * i + 1] = four.y, acc[4 * i + 2] = four.z, acc[4 * i + 3] = four.w;
            }
        }
#pragma unroll
        for (int s = 0; s < K_BLOCKS; s++) scales[s].fold(acc, raw[s], scale_border(tile), 0);
        if (turn < turns - 1) {
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++) {
                shared.sums[i * 128 + thread] = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
            }
        }
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(shared.turns + 8 * ((group + 1) % K_GROUPS));
        if (turn == turns - 1) store<N>(acc, shared, operands, tile, 0, mine.stage);
    }
    place.begun = true;
    schedule.look_ahead();
}

// Multiply a tile of N rows of the second operand. `next` has the scales of its first stage, and gets those of the next
// tile's.
template <int N>
__device__ __forceinline__ void multiply_tile(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule,
    StageScales& next, int row_group) {
    constexpr int COUNT = N / TOKEN_PARTS / 2, PARTS = K_BLOCKS * ROW_BLOCKS * TOKEN_PARTS;
    constexpr int HELD = BUFFERS < PARTS ? BUFFERS : PARTS;
    const auto rows_before = [&](int r) { return (row_group * ROW_BLOCKS + r) * 64; };
    // Best while the tensor core works; but what it needs takes instructions and registers of the loop, which pays
    // where nothing else is left at a tile's end (measured).
    constexpr bool LOOK_AHEAD_EARLY = IN_RING;
    // Before a stage is given back: the fence waits for everything on its way, the next scales too. With one buffer of
    // sums waiting for what was read alone is faster, with several it is not (measured).
    constexpr bool FENCE = HELD > 1;
    if (TOKENS_FIRST && rows_before(0) >= tile.token_count) {
        give_back_kept(shared, place);
        schedule.look_ahead();
        next.begin(operands, schedule.next, row_group);
        for (int block = 0; block < operands.blocks; block += K_BLOCKS, place.next()) {
            barrier_wait(shared.full + 8 * place.stage, place.phase);
            finish_reads();
            give_back(shared.empty + 8 * place.stage);
        }
        return;
    }
    float acc[ROW_BLOCKS][N / 2] = {}, raw[HELD][COUNT];
    int border = scale_border(tile), own = own_token_scales(tile, row_group);
    compute_once(border), compute_once(own);
    for (int block = 0; block < operands.blocks; block += K_BLOCKS) {
        const StageScales weight = next;
        const bool keep = IN_RING && block + K_BLOCKS >= operands.blocks;
        float2 tokens[K_BLOCKS];
        bool read = true;
        // Parts of a stage in order: K-blocks, their blocks of rows, their parts of the tokens.
        const auto start = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            multiply<COUNT>(raw[part % HELD], shared, place.stage, s, rows_before(r), 2 * t * COUNT);
        };
        const auto finish = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            const bool last = part == PARTS - 1;
            const float* token_scales = token_scales_of(shared, place, s, own);
            Scales<COUNT> scales;
            // Two numbers can wait in registers for the tensor core, as many as there are sums cannot.
            if constexpr (TOKENS_FIRST) {
                if (t == 0) {
                    tokens[s] = two_of(token_scales);
                    if (!FENCE) read = read && have_arrived(tokens[s].x, tokens[s].y);
                }
                scales.set(0, tokens[s], weight.of[s][r]);
                if (FENCE && last) finish_reads();
            }
            wgmma_wait(min(HELD - 1, PARTS - 1 - part));
            hold(raw[part % HELD]);
            if constexpr (TOKENS_FIRST) {
                if (last && !keep) give_back(shared.empty + 8 * place.stage, read);
            } else {
                scales.read(token_scales + 2 * t * COUNT, weight.of[s][r]);
            }
            scales.fold(acc[r] + t * COUNT, raw[part % HELD], border, 2 * t * COUNT);
        };
        barrier_wait(shared.full + 8 * place.stage, place.phase);
#pragma unroll
        for (int part = 0; part < HELD - 1; part++) start(part);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part + HELD - 1 < PARTS) start(part + HELD - 1);
            if (part == 0) {
                next.advance();
                if (block == 0) {
                    give_back_kept(shared, place);
                    if (LOOK_AHEAD_EARLY) schedule.look_ahead();
                }
            }
            finish(part);
        }
        if constexpr (!TOKENS_FIRST) {
            finish_reads();
            give_back(shared.empty + 8 * place.stage);
        }
        if (keep) place.kept = place.stage;
        place.next();
    }
    if (!LOOK_AHEAD_EARLY) schedule.look_ahead();
    next.begin(operands, schedule.next, row_group);
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) store<N>(acc[r], shared, operands, tile, rows_before(r), place.kept);
}

// The instruction's width is a compile-time number: find the one that holds the tile's tokens.
template <int N>
__device__ __forceinline__ void multiply_tile_from(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule,
    StageScales& next, int row_group) {
    if constexpr (!TOKENS_FIRST && N < TOKENS) {
        if (tile.token_count > N) {
            multiply_tile_from<N + 16>(tile, shared, operands, place, schedule, next, row_group);
            return;
        }
    }
    if constexpr (K_GROUPS > 1) {
        multiply_tile_in_turns<N>(tile, shared, operands, place, schedule);
    } else {
        multiply_tile<N>(tile, shared, operands, place, schedule, next, row_group);
    }
}
