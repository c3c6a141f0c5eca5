// kernels/hopper.cuh on a CPU, on the threads and barriers of mla_units.cuh of this folder, and fp8's `wgmma`.

#pragma once

#include <deque>

#include "mla_units.cuh"

#define __cluster_dims__(...)

typedef uint32_t u32;
typedef unsigned long long u64;

inline u32 shared_address(const void* pointer) { return address(pointer); }
inline Barrier& barrier_at(u32 at) { return barriers.at(memory + at); }
inline void barrier_init(u32 barrier, u32 count) {
    static std::mutex several;
    std::lock_guard guard(several);
    barriers[memory + barrier].init(count);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) { barrier_at(barrier).arrive(); }
inline void barrier_expect(u32 barrier, u32 bytes) { barrier_at(barrier).arrive(bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { barrier_at(barrier).wait(parity); }

inline void copy_tile(u32 target, const TensorMap* map, u32 barrier, int inner, int outer) {
    // The copy engine begins at multiples of 16 bytes.
    if (inner % 4 != 0 || target % 128 != 0) abort();
    for (int o = 0; o < map->box[1]; o++)
        for (int i = 0; i < map->box[0]; i++) {
            float x = 0;
            if (inner + i < map->size[0] && outer + o < map->size[1])
                memcpy(&x, map->base + (inner + i) * 4 + (outer + o) * map->stride[1], 4);
            memcpy(memory + target + (o * map->box[0] + i) * 4, &x, 4);
        }
    barrier_at(barrier).complete(map->box[0] * map->box[1] * 4);
}

inline void copy_slices(u32 target, const TensorMap* map, u32 barrier, int row, int slice) {
    if (target % 1024 != 0) abort();
    for (int s = 0; s < map->box[2]; s++)
        for (int r = 0; r < map->box[1]; r++)
            for (int byte = 0; byte < 128; byte++) {
                char x = 0;
                if (row + r < map->size[1] && slice + s < map->size[2])
                    x = map->base[byte + (row + r) * map->stride[1] + (slice + s) * map->stride[2]];
                *swizzled(target + (s * map->box[1] + r) * 128 + byte) = x;
            }
    barrier_at(barrier).complete(map->box[0] * map->box[1] * map->box[2]);
}

inline void prefetch_map(const TensorMap*) {}

// A block's shared memory, and where another block of the cluster has what lies at an address.
inline u32 cluster_rank() { return blockIdx.x % CLUSTER; }
inline char* shared_memory() { return memory + (CLUSTER > 1 ? cluster_rank() : 0) * MEMORY; }
inline u32 address_in(u32 at, u32 rank) { return at % MEMORY + rank * MEMORY; }

template <int PROGRAMS>
void copy_slices_to_all(u32 target, const TensorMap* map, u32 barrier, int row, int slice) {
    for (u32 rank = 0; rank < PROGRAMS; rank++)
        copy_slices(address_in(target, rank), map, address_in(barrier, rank), row, slice);
}
inline void barrier_arrive_at(u32 barrier, u32 rank) { barrier_arrive(address_in(barrier, rank)); }
inline void cluster_sync() { cluster_together->arrive_and_wait(); }
inline void finish_reads() {}
inline bool have_arrived(float, float) { return true; }
inline void compute_once(int&) {}

inline u64 tile_descriptor(u32 at) { return at >> 4; }
inline void wgmma_begin() {}
inline void wgmma_end() {}
inline void wgmma_wait(int) {}
template <int COUNT>
void hold(float (&)[COUNT]) {}

template <class T>
T __ldg(const T* from) {
    return *from;
}

inline float e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, fraction = x & 7;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp((float)fraction, -9);
    return (exponent == 15 && fraction == 7 ? NAN : size) * (x & 0x80 ? -1 : 1);
}

// One instruction: 32 products and the sum so far, cut off 13 bits below the largest exponent, summed, cut to 13 bits.
inline float multiply_add(const float (&a)[32], const float (&b)[32], float c) {
    int largest = max(exponent(c), -64);
    const auto exponent_of = [](float x) { return x == 0 ? -126 : max(exponent(x), -6); };
    for (int k = 0; k < 32; k++) largest = max(largest, exponent_of(a[k]) + exponent_of(b[k]));
    const double unit = std::ldexp(1.0, 13 - largest);
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

inline void warpgroup_sync(int group) { running->groups[group]->arrive_and_wait(); }

inline u32 pack_bf16(float low, float high) { return bf16_pair(low, high); }

inline void store_transposed(u32 target, u32 a, u32 b) {
    const int lane = threadIdx.x % 32;
    const u32 part[2] = {a, b};
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
            const u32 row = __shfl_sync(~0u, target, i * 8 + lane % 4 * 2 + half);
            const uint16_t x = part[i] >> 16 * half;
            memcpy(memory + row + lane / 4 * 2, &x, 2);
        }
}

inline void store_matrices(u32 target, u32 a, u32 b, u32 c, u32 d) { store_matrices(memory + target, a, b, c, d); }

// Written as late as the kernel allows.
static thread_local std::deque<std::function<void()>> boxes;

template <int COUNT>
void wait_for_boxes_but() {
    for (; boxes.size() > COUNT; boxes.pop_front()) boxes.front()();
}
inline void finish_boxes() { wait_for_boxes_but<0>(); }

inline void store_box(const TensorMap* map, u32 source, int inner, int outer) {
    if (source % 1024 != 0) abort();
    boxes.push_back([=] {
        for (int o = 0; o < map->box[1]; o++)
            for (int i = 0; i < map->box[0]; i++)
                if (inner + i < map->size[0] && outer + o < map->size[1])
                    memcpy(const_cast<char*>(map->base) + (inner + i) * 2 + (outer + o) * map->stride[1],
                           swizzled(source + (o * map->box[0] + i) * 2), 2);
    });
}
