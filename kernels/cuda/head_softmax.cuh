// The online softmax of a warp's 16 rows, in registers. A thread has of rows lane / 4 and 8 below it the columns
// 8 i + 2 (lane % 4) and the one behind, for every i: scores 4 i + 2 r + j, and pairs 2 i + r of probabilities.

#pragma once

#include "head_tiles.cuh"
#include "mla_exp2.cuh"

constexpr int SCORES = 64;  // of a thread: two rows and a quarter of their keys
constexpr int PAIRS = SCORES / 2;

struct Rows {
    float maximum[2], total[2];
    float alpha[2];  // what the last block scales the output by
};

// Keys after a row's own position count for nothing; `hidden` is the block's first such key, less this thread's first
// column, for each row.
__device__ __forceinline__ void mask_scores(float (&scores)[SCORES], const int (&hidden)[2]) {
#pragma unroll
    for (int i = 0; i < SCORES; i++)
        if (i / 4 * 8 + i % 2 >= hidden[i / 2 % 2]) scores[i] = __int_as_float(0xff800000);
}

// The maxima with a block's scores, and the factors from the ones before; whether a factor of the warp is not 1. Most
// blocks leave all maxima as they are: then no lane asks another.
__device__ __forceinline__ bool raise_maxima(Rows& rows, const float (&scores)[SCORES], float scale) {
    float largest[2];
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        largest[r] = scores[2 * r];
#pragma unroll
        for (int i = 0; i < SCORES / 4; i++)
            largest[r] = fmaxf(largest[r], fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
        grows |= __fmul_ru(largest[r], scale) > rows.maximum[r];
    }
    if (!__any_sync(~0u, grows)) return false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
        largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 2));
        const float maximum = fmaxf(step_above(largest[r], scale), rows.maximum[r]);
        rows.alpha[r] = power_of_two(__fsub_rn(rows.maximum[r], maximum));
        rows.maximum[r] = maximum;
        rows.total[r] = __fmul_rn(rows.total[r], rows.alpha[r]);
    }
    return true;
}

// Whether the hardware's powers of two may round to other numbers than the contract's, as in `Doubt`. But zeros, which
// hidden keys have, raise none: where the hardware has zero, the contract has it too.
struct NearestPowers {
    u32 nearest = ~0u;   // pair of the least distances from the lower border of what is near the middle
    u32 smallest = ~0u;  // pair of the smallest powers but zero, cut off to bf16, less one

    __device__ __forceinline__ void consider(float low, float high) {
        const u32 lower_halves = __byte_perm(__float_as_int(low), __float_as_int(high), 0x5410);
        const u32 upper_halves = __byte_perm(__float_as_int(low), __float_as_int(high), 0x7632);
        nearest = min_pair(nearest, add_pair(lower_halves, (Doubt::MIDDLE + NEAR) * 0x10001u));
        smallest = min_pair(smallest, add_pair(upper_halves, ~0u));
    }

    __device__ __forceinline__ bool in_doubt() const {
        return min(nearest & 0xFFFF, nearest >> 16) <= 2 * NEAR
               || min(smallest & 0xFFFF, smallest >> 16) < Doubt::LEAST;
    }
};

// Powers of two of half of the scores, which round to the contract's probabilities.
__device__ __forceinline__ void find_powers(
    float (&powers)[SCORES / 2], const float (&scores)[SCORES], const Rows& rows, float scale, int half) {
    const auto exponent = [&](int i) {
        return __fmaf_rn(scores[half * SCORES / 2 + i], scale, -rows.maximum[i / 2 % 2]);
    };
    NearestPowers nearest;
#pragma unroll
    for (int i = 0; i < SCORES / 2; i += 2) {
        powers[i] = near_exp2(exponent(i));
        powers[i + 1] = near_exp2(exponent(i + 1));
        nearest.consider(powers[i], powers[i + 1]);
    }
    if (__any_sync(~0u, nearest.in_doubt())) {
#pragma unroll
        for (int i = 0; i < SCORES / 2; i++) powers[i] = exp2_of_nonpositive(exponent(i));
    }
}

__device__ __forceinline__ void round_powers(u32 (&pairs)[PAIRS], const float (&powers)[SCORES / 2], int half) {
#pragma unroll
    for (int i = 0; i < PAIRS / 2; i++)
        pairs[half * PAIRS / 2 + i] = pack_bf16(powers[2 * i], powers[2 * i + 1]);
}

// The sum of a row's 128 probabilities by halves.
__device__ __forceinline__ float fold_sum(const u32 (&pairs)[PAIRS], int r) {
    float sum[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float x[PAIRS / 2];
#pragma unroll
        for (int i = 0; i < PAIRS / 2; i++) {
            const u32 pair = pairs[2 * i + r];
            x[i] = __int_as_float(j == 0 ? pair << 16 : pair & 0xFFFF0000);
        }
#pragma unroll
        for (int halvings = 0; halvings < 4; halvings++) {
            const int half = PAIRS / 4 >> halvings;
#pragma unroll
            for (int i = 0; i < PAIRS / 4; i++)
                if (i < half) x[i] = __fadd_rn(x[i], x[i + half]);
        }
        sum[j] = __fadd_rn(x[0], __shfl_xor_sync(~0u, x[0], 2));
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(~0u, sum[j], 1));
    }
    return __fadd_rn(sum[0], sum[1]);
}
