// kernels/cuda/mla_units.cuh on a CPU; the bf16 `wgmma` is the model of kernels/sm90/tensor_core.py.

#pragma once

#include "hopper.cuh"

constexpr int TILE = 64 * 64 * 2;

inline void barrier_init(u64* barrier, int count) { barrier_init(shared_address(barrier), count); }
inline void barrier_expect(u64* barrier, int bytes) { barrier_expect(shared_address(barrier), bytes); }
inline void barrier_wait(u64* barrier, int parity) { barrier_wait(shared_address(barrier), parity); }
inline void arrive_warp(u64* barrier, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(barrier));
}

inline void copy_keys(void* to, const TensorMap* map, u64* barrier, int row, int tile, int page) {
    for (int t = 0; t < map->box[2]; t++)
        for (int r = 0; r < map->box[1]; r++)
            for (int byte = 0; byte < 128; byte += 2) {
                u16 x = 0;
                if (row + r < map->size[1] && tile + t < map->size[2] && page >= 0 && page < map->size[3])
                    memcpy(&x,
                           map->base + byte + (row + r) * map->stride[1] + (tile + t) * map->stride[2] +
                               page * map->stride[3],
                           2);
                memcpy(swizzled(shared_address(to) + (t * map->box[1] + r) * 128 + byte), &x, 2);
            }
    barrier_at(shared_address(barrier)).complete(map->box[2] * map->box[1] * 128);
}
inline void copy_q(void* to, const TensorMap* map, u64* barrier, int row, int tile) {
    copy_keys(to, map, barrier, row, tile, 0);
}

inline void copy_number(float4* to, const float* from) { memcpy(to, from, 16); }
inline void end_group() {}
inline void wait_for_groups_but(int) {}

inline bool elect() { return threadIdx.x % 32 == 0; }

inline u64 operand(const void* tile) { return shared_address(tile) >> 4; }

// One instruction: 16 products and the accumulator, cut off 25 bits below the largest exponent, summed, cut to fp32.
inline float multiply_add(const u16 (&a)[16], const u16 (&b)[16], float c) {
    double x[16], y[16];
    int largest = exponent(c);
    for (int k = 0; k < 16; k++) {
        x[k] = bits_of<float>((u32)a[k] << 16);
        y[k] = bits_of<float>((u32)b[k] << 16);
        largest = max(largest, exponent(x[k]) + exponent(y[k]));
    }
    const double unit = power_of_two(25 - largest);
    double sum = std::trunc(c * unit);
    for (int k = 0; k < 16; k++) sum += std::trunc(x[k] * y[k] * unit);
    return (float)bits_of<double>(bits_of<uint64_t>(sum / unit) & ~((1ull << 29) - 1));
}

// A thread's part of 64 x 2 COUNT sums; `row_of_a` gives a row of the first operand, 0 or 1 for the thread's two rows,
// and `place_of_b` says where number k of row n of the second operand lies.
template <int COUNT, class Row, class Place>
void multiply(float (&d)[COUNT], int accumulate, Row row_of_a, Place place_of_b) {
    const int lane = threadIdx.x % 32;
    for (int half = 0; half < 2; half++) {
        u16 x[16], y[16];
        row_of_a(half, x);
        for (int i = 0; i < COUNT / 2; i++) {
            const int n = i / 2 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) memcpy(&y[k], swizzled(place_of_b(n, k)), 2);
            float& sum = d[i / 2 * 4 + half * 2 + i % 2];
            sum = multiply_add(x, y, accumulate ? sum : 0.0f);
        }
    }
}
inline void multiply_scores(float (&d)[32], u64 a, u64 b, int accumulate) {
    const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    const auto row_of_a = [&](int half, u16 (&x)[16]) {
        for (int k = 0; k < 16; k++) memcpy(&x[k], swizzled((u32)(a << 4) + (row + 8 * half) * 128 + k * 2), 2);
    };
    multiply(d, accumulate, row_of_a, [&](int n, int k) { return (u32)(b << 4) + n * 128 + k * 2; });
}
inline void multiply_values(float (&d)[64], const u32 (&a)[4], u64 b, int accumulate) {
    // Four lanes hold a row: numbers 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 are lane i's.
    const auto row_of_a = [&](int half, u16 (&x)[16]) {
        for (int k = 0; k < 16; k += 2) {
            const u32 two = __shfl_sync(~0u, a[half + k / 8 * 2], threadIdx.x % 32 / 4 * 4 + k % 8 / 2);
            memcpy(&x[k], &two, 4);
        }
    };
    const auto place_of_b = [&](int n, int k) { return (u32)(b << 4) + n / 64 * TILE + k * 128 + n % 64 * 2; };
    multiply(d, accumulate, row_of_a, place_of_b);
}

// As wrong as the hardware's may be: what is at most NEAR from the middle between bf16 numbers is on its other side.
inline float near_exp2(float x) {
    if (std::isnan(x)) return x;
    const double y = std::exp2((double)x);
    if (y < power_of_two(-126)) return 0.0f;
    const u32 bits = bits_of<u32>((float)y);
    const int behind = (int)(bits & 0xFFFF) - 0x8000;
    if (std::abs(behind) > NEAR) return (float)y;
    return bits_of<float>(bits - behind + (behind > 0 ? -1 : 1));
}
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    u32 bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= (u32)(((u64)y << 32 | x) >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return bytes;
}

template <class Of>
u32 of_halves(u32 a, u32 b, Of of) {
    return (u16)of((u16)a, (u16)b) | (u32)of((u16)(a >> 16), (u16)(b >> 16)) << 16;
}
inline u32 add_pair(u32 a, u32 b) {
    return of_halves(a, b, [](u16 x, u16 y) { return (u16)(x + y); });
}
inline u32 min_pair(u32 a, u32 b) {
    return of_halves(a, b, [](u16 x, u16 y) { return min(x, y); });
}
inline u32 max_pair(u32 a, u32 b) {
    return of_halves(a, b, [](u16 x, u16 y) { return max(x, y); });
}

inline void load_matrices(u32 (&x)[4], const void* from) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        const u32 row = __shfl_sync(~0u, shared_address(from), i * 8 + lane / 4);
        memcpy(&x[i], memory + row + lane % 4 * 4, 4);
    }
}

inline float4 load_prefix(const float4* from) { return *from; }
inline void store_prefix(float4* to, float4 x) { *to = x; }
