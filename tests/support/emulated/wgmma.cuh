// fp8's `wgmma`, which kernels/cuda/compiler.py writes for a card, on a CPU: the model of kernels/sm90/tensor_core.py.

#pragma once

#include "hopper.cuh"

inline float e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, fraction = x & 7;
    const float size = exponent ? (8 + fraction) * power_of_two(exponent - 10) : fraction * power_of_two(-9);
    return (exponent == 15 && fraction == 7 ? NAN : size) * (x & 0x80 ? -1 : 1);
}

// One instruction: 32 products and the sum so far, cut off 13 bits below the largest exponent, summed, cut to 13 bits.
inline float multiply_add(const float (&a)[32], const float (&b)[32], float c) {
    int largest = max(exponent(c), -64);
    const auto exponent_of = [](float x) { return x == 0 ? -126 : max(exponent(x), -6); };
    for (int k = 0; k < 32; k++) largest = max(largest, exponent_of(a[k]) + exponent_of(b[k]));
    const double unit = power_of_two(13 - largest);
    double sum = std::trunc(c * unit);
    for (int k = 0; k < 32; k++) sum += std::trunc((double)a[k] * b[k] * unit);
    return (float)bits_of<double>(bits_of<uint64_t>(sum / unit) & ~((1ull << 39) - 1));
}

template <int COUNT>
void wgmma(float (&d)[COUNT], u64 a, u64 b, int add) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    float x[2][32];
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 32; k++)
            x[half][k] = e4m3(*swizzled((u32)(a << 4) + (thread / 32 * 16 + lane / 4 + 8 * half) * 128 + k));
    for (int i = 0; i < COUNT / 2; i++) {
        float y[32];
        for (int k = 0; k < 32; k++)
            y[k] = e4m3(*swizzled((u32)(b << 4) + (i / 2 * 8 + lane % 4 * 2 + i % 2) * 128 + k));
        for (int half = 0; half < 2; half++) {
            float& sum = d[i / 2 * 4 + half * 2 + i % 2];
            sum = multiply_add(x[half], y, add ? sum : 0.0f);
        }
    }
}
