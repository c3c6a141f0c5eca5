// Split-KV: how the partials of splits, each a maximum, a sum and an output, become one, and the kernel that does it
// for stored ones.

#pragma once

#include "mla_batch.cuh"
#include "mla_exp2.cuh"

// Factors by which partials a and b become one, b behind a.
struct Factors {
    float maximum, a, b;

    __device__ __forceinline__ float operator()(float x, float y) const {
        return __fadd_rn(__fmul_rn(x, a), __fmul_rn(y, b));
    }
};

__device__ __forceinline__ Factors combine_factors(float maximum_a, float maximum_b) {
    const float maximum = fmaxf(maximum_a, maximum_b);
    return {maximum, power_of_two(__fsub_rn(maximum_a, maximum)), power_of_two(__fsub_rn(maximum_b, maximum))};
}

// Put the stored splits of rows (token, head) together, in their order. They come to `groups` stages of shared memory,
// GROUP_SPLITS of them each: as many are on their way as there is room for. A thread reads what it has copied itself.
extern "C" __global__ void __launch_bounds__(128)
combine(const __grid_constant__ Batch batch, int all_rows, int groups) {
    extern __shared__ char memory[];
    float4* partials = (float4*)memory + threadIdx.x;  // [groups, GROUP_SPLITS, 128 threads]
    const int lane = threadIdx.x % 32, column = threadIdx.x * 4;
    let_next_kernel_start();
    wait_for_kernel_before();
    const bool split_kv = *batch.split_kv;
    for (int row = blockIdx.x; row < all_rows; row += gridDim.x) {
        int before = 0;  // works before this request's
        for (int first = 0; first < batch.requests; first += 32) {
            const Lane request = look_at(batch, first + lane);
            if (!split_kv) return;  // behind the loads of the lengths: none waits for the other
            const int count = request.tiles * request.splits;
            const u32 mine = __ballot_sync(
                ~0u, row >= request.start * batch.heads && row < (request.start + request.queries) * batch.heads);
            const int source = mine ? __ffs(mine) - 1 : 32;
            before += __reduce_add_sync(~0u, lane < source ? count : 0);
            if (!mine) continue;
            const int start = __shfl_sync(~0u, request.start, source);
            const int queries = __shfl_sync(~0u, request.queries, source);
            const int length = __shfl_sync(~0u, request.length, source);
            const int tiles = __shfl_sync(~0u, request.tiles, source);
            const int local = row - start * batch.heads, tile = local / ROWS;
            const int last = min(tile * ROWS + ROWS, queries * batch.heads) - 1;
            // A tile that sees one split only has its output already.
            if (length - queries + last / batch.heads < SPLIT_KEYS) break;
            const int splits = (length - queries + local / batch.heads) / SPLIT_KEYS + 1;
            const int slot = before + tile, at = local % ROWS;
            const auto partial_of = [&](int split) { return (size_t)(slot + split * tiles) * ROWS + at; };
            const auto stats_of = [&](int split) { return batch.stats[partial_of(min(split, splits - 1))]; };
            float2 next_stats = stats_of(lane);
            const auto copy_group = [&](int number, int stage) {
#pragma unroll
                for (int i = 0; i < GROUP_SPLITS; i++) {
                    const int split = number * GROUP_SPLITS + i;
                    if (split >= splits) continue;
                    copy_number(&partials[(stage * GROUP_SPLITS + i) * 128],
                                batch.partials + partial_of(split) * RANK + column);
                }
                end_group();
            };
            for (int i = 0; i < groups; i++) copy_group(i, i);
            int stage = 0;
            float highest = __int_as_float(0xff800000), total = 0.0f;  // -infinity
            float4 output;
            for (int behind = 0; behind < splits; behind += 32) {
                // Lane i has the factors of split `behind + i`. Maxima have no order, so they need no chain.
                const float2 own_stats = next_stats;
                next_stats = stats_of(behind + 32 + lane);
                float maximum = own_stats.x;
                for (int i = 1; i < 32; i *= 2) {
                    const float other = __shfl_up_sync(~0u, maximum, i);
                    if (lane >= i) maximum = fmaxf(maximum, other);
                }
                const float lane_before = __shfl_up_sync(~0u, maximum, 1);
                const Factors own = combine_factors(lane == 0 ? highest : fmaxf(highest, lane_before), own_stats.x);
                highest = __shfl_sync(~0u, own.maximum, 31);
                const int end = min(splits, behind + 32);
                for (int first = behind; first < end; first += GROUP_SPLITS) {
                    wait_for_groups_but(groups - 1);
                    float4 next[GROUP_SPLITS];  // behind the last split, what nobody looks at
#pragma unroll
                    for (int i = 0; i < GROUP_SPLITS; i++) next[i] = partials[(stage * GROUP_SPLITS + i) * 128];
#pragma unroll
                    for (int i = 0; i < GROUP_SPLITS; i++) {
                        const int source = first + i - behind;
                        const float next_total = __shfl_sync(~0u, own_stats.y, source);
                        const Factors factors = {
                            0.0f, __shfl_sync(~0u, own.a, source), __shfl_sync(~0u, own.b, source)};
                        if (first + i >= end) continue;
                        const bool alone = first == 0 && i == 0;  // the first split is taken as it is
                        total = alone ? next_total : factors(total, next_total);
                        output.x = alone ? next[i].x : factors(output.x, next[i].x);
                        output.y = alone ? next[i].y : factors(output.y, next[i].y);
                        output.z = alone ? next[i].z : factors(output.z, next[i].z);
                        output.w = alone ? next[i].w : factors(output.w, next[i].w);
                    }
                    copy_group(first / GROUP_SPLITS + groups, stage);
                    if (++stage == groups) stage = 0;
                }
            }
            const float over = __frcp_rn(total);
            *(uint2*)(batch.out + (size_t)row * RANK + column) =
                make_uint2(pack_bf16(__fmul_rn(output.x, over), __fmul_rn(output.y, over)),
                           pack_bf16(__fmul_rn(output.z, over), __fmul_rn(output.w, over)));
            break;
        }
    }
}
