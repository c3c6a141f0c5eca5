// The warpgroups that own half of the output each: they add every block to it, and finish splits.

#pragma once

#include "mla_combine.cuh"
#include "mla_shared.cuh"

// The rows of a thread at the end of a split: 8 apart, of each the columns 8 i + 2 (lane % 4) and the one behind.
struct Rows {
    int left;  // rows of the tile from the first one on
    float maximum[2], total[2];
    float prefix_maximum[2], prefix_total[2];
    bool sees[2];      // anything of the split; a row that does not keeps its prefix
    float a[2], b[2];  // by which the prefix and the split become one
};

// Loads of the prefix before the first number is stored. Each store then frees registers for two more.
constexpr int LOADS = 4;

// Give numbers 4 i to 4 i + 3 of `left` and then `right`, combined with the prefix where there is one, to `store`.
template <bool COMBINED, class Store>
__device__ __forceinline__ void finish_split(
    const float (&left)[64], const float (&right)[64], const float4* prefix, const Rows& rows, Store store) {
    float4 before[32];
    if (COMBINED) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) before[i] = load_prefix(prefix + i * 128);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float* at = i < 16 ? left + 4 * i : right + 4 * (i - 16);
        float4 x = make_float4(at[0], at[1], at[2], at[3]);
        if (COMBINED) {
            const auto combine = [&](int r, float old, float now) {
                const float both = __fadd_rn(__fmul_rn(old, rows.a[r]), __fmul_rn(now, rows.b[r]));
                return rows.sees[r] ? both : old;
            };
            x.x = combine(0, before[i].x, x.x);
            x.y = combine(0, before[i].y, x.y);
            x.z = combine(1, before[i].z, x.z);
            x.w = combine(1, before[i].w, x.w);
        }
        store(i, x);
        if (COMBINED) {
#pragma unroll
            for (int j = LOADS + 2 * i; j < LOADS + 2 * i + 2; j++)
                if (j < 32) before[j] = load_prefix(prefix + j * 128);
        }
    }
}

template <bool COMBINED>
__device__ __forceinline__ void keep_prefix(
    const float (&left)[64], const float (&right)[64], float4* prefix, const Rows& rows) {
    finish_split<COMBINED>(left, right, prefix, rows, [&](int i, float4 x) { store_prefix(prefix + i * 128, x); });
}

// Lanes 2 j and 2 j + 1 have numbers of columns a and columns b: now the even one has all of a, and the odd one of b.
template <class T>
__device__ __forceinline__ void exchange(T& a, T& b) {
    const bool odd = threadIdx.x % 2;
    const T other = __shfl_xor_sync(~0u, odd ? a : b, 1);
    (odd ? a : b) = other;
}

template <bool COMBINED>
__device__ __forceinline__ void store_output(
    const float (&left)[64], const float (&right)[64], const float4* prefix, const Rows& rows, u16* out) {
    const float over[2] = {__frcp_rn(rows.total[0]), __frcp_rn(rows.total[1])};
    u32 pairs[2][2];
    finish_split<COMBINED>(left, right, prefix, rows, [&](int i, float4 x) {
        pairs[0][i % 2] = pack_bf16(__fmul_rn(x.x, over[0]), __fmul_rn(x.y, over[0]));
        pairs[1][i % 2] = pack_bf16(__fmul_rn(x.z, over[1]), __fmul_rn(x.w, over[1]));
        if (i % 2 == 0) return;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            exchange(pairs[r][0], pairs[r][1]);
            u16* to = out + 8 * r * RANK + 8 * (i - 1);
            if (rows.left > 8 * r) *(uint2*)to = make_uint2(pairs[r][0], pairs[r][1]);
        }
    });
}

__device__ __forceinline__ void store_partial(
    const float (&left)[64], const float (&right)[64], const Rows& rows, float* partial) {
    float4 before;
    finish_split<false>(left, right, nullptr, rows, [&](int i, float4 x) {
        if (i % 2 == 0) {
            before = x;
            return;
        }
        exchange(before.x, x.x);
        exchange(before.y, x.y);
        exchange(before.z, x.z);
        exchange(before.w, x.w);
        float* to = partial + 8 * (i - 1);
        if (rows.left > 0) *(float4*)to = make_float4(before.x, before.y, x.x, x.y);
        if (rows.left > 8) *(float4*)(to + 8 * RANK) = make_float4(before.z, before.w, x.z, x.w);
    });
}

__device__ __forceinline__ void accumulate_values(Shared& shared, const Batch& batch, int half, int thread) {
    const int lane = thread % 32, warp = thread / 32;
    const int row = warp * 16 + lane / 4, p_row = warp * 16 + lane % 16;
    float4* prefix = (float4*)batch.prefixes + (size_t)(blockIdx.x * 2 + half) * 32 * 128 + thread;
    int block = 0;
    for (int turn = 0;; ++turn) {
        barrier_wait(&shared.work_full[turn & 1], turn >> 1 & 1);
        const Work& work = shared.work[turn & 1];
        if (work.rows == 0) return;
        Rows rows;
        rows.left = work.rows - row;
        const bool used = warp * 16 < work.rows;  // nobody stores what the other warps compute
        const int column = half * HALF + lane % 2 * 8 + lane % 4 / 2 * 4;  // of what a thread stores
        for (int split = work.key_begin; split < work.key_end; split += SPLIT_KEYS) {
            float left[64], right[64];  // columns of the half, 128 each
            // Not for the sums, which start at zero anyway: it ends the life of the numbers before.
#pragma unroll
            for (int i = 0; i < 64; i++) left[i] = right[i] = 0.0f;
            const int end = min(split + SPLIT_KEYS, work.key_end);
            for (int begin = split; begin < end; begin += KEYS, ++block) {
                const int stage = block & 1, parity = block >> 1 & 1;
                barrier_wait(&shared.scaled[stage], parity);
                const float alpha[2] = {shared.alpha[stage][row], shared.alpha[stage][row + 8]};
                // A factor of one changes nothing.
                if (begin != split && __any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
                    for (int i = 0; i < 64; i++) {
                        left[i] = __fmul_rn(left[i], alpha[i / 2 % 2]);
                        right[i] = __fmul_rn(right[i], alpha[i / 2 % 2]);
                    }
                }
                barrier_wait(&shared.full[stage][half], parity);
                barrier_wait(&shared.full[stage][half + 1], parity);
                const char* p = shared.keys[stage] + 8 * TILE + p_row * 128;
                const u64 values = operand(shared.keys[stage] + half * HALF_TILES * TILE);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    u32 of_keys[2][4];
                    barrier_wait(&shared.ready[stage][pair], parity);
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        load_matrices(of_keys[i], p + ((4 * pair + 2 * i + lane / 16) ^ (p_row % 8)) * 16);
                    wgmma_begin();
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const u64 keys = values + ((2 * pair + i) * 2048 >> 4);
                        multiply_values(left, of_keys[i], keys, begin != split || pair + i > 0);
                        multiply_values(right, of_keys[i], keys + (2 * TILE >> 4), begin != split || pair + i > 0);
                    }
                }
                wgmma_end();
                if (begin + KEYS >= end) {
                    barrier_wait(&shared.totalled[stage], parity);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        rows.maximum[r] = shared.maximum[stage][row + 8 * r];
                        rows.total[r] = shared.total[stage][row + 8 * r];
                    }
                }
                // The next copy overwrites the probabilities.
                publish_to_units();
                wgmma_wait(0);
                arrive_warp(&shared.empty[stage][half], lane);
            }
            if (!used) continue;
            if (work.slot >= 0) {
                // `combine` takes it from here.
                float* partial = batch.partials + ((size_t)work.slot * ROWS + row) * RANK + column;
                store_partial(left, right, rows, partial);
                if (half == 0 && lane % 4 == 0) {
                    float2* stats = batch.stats + (size_t)work.slot * ROWS + row;
                    stats[0] = make_float2(rows.maximum[0], rows.total[0]);
                    stats[8] = make_float2(rows.maximum[1], rows.total[1]);
                }
                break;
            }
            if (split == 0 && end == work.key_end) {
                u16* out = batch.out + (size_t)(work.q_row + row) * RANK + column;
                store_output<false>(left, right, prefix, rows, out);
                break;
            }
            if (split == 0) {
                keep_prefix<false>(left, right, prefix, rows);
            } else {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = min(row + 8 * r, work.rows - 1);
                    rows.sees[r] = split <= work.first_position + (work.tile_row + at) / batch.heads;
                    const Factors factors = combine_factors(rows.prefix_maximum[r], rows.maximum[r]);
                    rows.a[r] = factors.a;
                    rows.b[r] = factors.b;
                    rows.maximum[r] = factors.maximum;
                    rows.total[r] = rows.sees[r] ? factors(rows.prefix_total[r], rows.total[r]) : rows.prefix_total[r];
                }
                if (end < work.key_end) {
                    keep_prefix<true>(left, right, prefix, rows);
                } else {
                    u16* out = batch.out + (size_t)(work.q_row + row) * RANK + column;
                    store_output<true>(left, right, prefix, rows, out);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                rows.prefix_maximum[r] = rows.maximum[r];
                rows.prefix_total[r] = rows.total[r];
            }
        }
        arrive_warp(&shared.work_empty[turn & 1], lane);
    }
}
