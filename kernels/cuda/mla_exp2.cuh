// Powers of two as the contract has them, and in which cases the hardware's may be others.

#pragma once

#include "mla_units.cuh"

// p * 2**n; n is x rounded to an integer, in the lowest bits of `shifted`. 0 where x is below -125 or NaN.
__device__ __forceinline__ float times_power(float p, float shifted, float x) {
    const float scaled = __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
    return x >= -125.0f ? scaled : 0.0f;
}

// 2**x of x <= 0: `elementary.exp2_of_nonpositive`. NaN gives 0, which is what rows that have seen no key need.
__device__ __forceinline__ float exp2_of_nonpositive(float x) {
    const float shifted = __fadd_rn(x, 12582912.0f);
    const float f = __fsub_rn(x, __fsub_rn(shifted, 12582912.0f));
    float p = __fmaf_rn(EXP2_5, f, EXP2_4);
    p = __fmaf_rn(p, f, EXP2_3);
    p = __fmaf_rn(p, f, EXP2_2);
    p = __fmaf_rn(p, f, EXP2_1);
    p = __fmaf_rn(p, f, 1.0f);
    return times_power(p, shifted, x);
}

// Probabilities are bf16, so the hardware's 2**x, of a fifth of the instructions, mostly gives them. This says whether
// some of those looked at may be others: where bf16 of `near_exp2(x)` and of `exp2_of_nonpositive(x)` differ, the first
// is at most NEAR fp32 numbers from the middle between two bf16 numbers. Below 2**-125 the contract has 0, and for NaN.
struct Doubt {
    static constexpr u32 MIDDLE = 0x8000;               // in the half of an fp32 number that rounding drops
    static constexpr u32 LEAST = 0x0100, ONE = 0x3F80;  // 2**-125 and 1 in bf16
    u32 nearest = ~0u;  // pair of the least distances from the lower border of what is near
    u32 farthest = 0;   // pair of the largest distances above LEAST; what is not above it wraps around

    // Two powers and what they round to.
    __device__ __forceinline__ void consider(float low, float high, u32 pair) {
        const u32 lower_halves = __byte_perm(__float_as_int(low), __float_as_int(high), 0x5410);
        nearest = min_pair(nearest, add_pair(lower_halves, (MIDDLE + NEAR) * 0x10001u));
        farthest = max_pair(farthest, add_pair(pair, (0xFFFF - LEAST) * 0x10001u));
    }

    __device__ __forceinline__ bool any() const {
        return min(nearest & 0xFFFF, nearest >> 16) <= 2 * NEAR ||
               max(farthest & 0xFFFF, farthest >> 16) > ONE - LEAST - 1;
    }
};

// The same of differences of maxima, multiples of MAXIMUM_STEP: the polynomial is 1.
__device__ __forceinline__ float power_of_two(float x) {
    return times_power(1.0f, __fadd_rn(x, 12582912.0f), x);
}

// x * y, rounded up to a multiple of MAXIMUM_STEP, a power of two.
__device__ __forceinline__ float step_above(float x, float y) {
    return MAXIMUM_STEP * ceilf(__fmul_ru(x, y) * (1.0f / MAXIMUM_STEP));
}
