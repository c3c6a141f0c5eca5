// CUDA for the attention kernel on a CPU: every thread of a thread block is a thread of the machine, and Hopper's units
// are functions that do at once what they would do later. `wgmma` is the model of kernels/tensor_core.py.
//
// It shows that sums, indices, swizzles and the counting of barriers are right. It cannot show a missing fence.

#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__

using std::max;
using std::min;

struct Index {
    int x;
};
static thread_local Index threadIdx, blockIdx, gridDim;

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To bits_of(From x) {
    To y;
    static_assert(sizeof x == sizeof y);
    memcpy(&y, &x, sizeof y);
    return y;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmul_ru(float a, float b) {
    const float product = a * b;
    return product < (double)a * b ? std::nextafter(product, INFINITY) : product;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __float_as_int(float x) { return bits_of<int>(x); }
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }

// Warps, warpgroups and the thread block.

struct Warp {
    std::barrier<> together{32};
    int slot[32];
};

struct Block {
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::unique_ptr<std::barrier<>>> groups;
    std::barrier<> all;

    explicit Block(int threads) : all(threads) {
        for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
        for (int i = 0; i < threads / 128; i++) groups.push_back(std::make_unique<std::barrier<>>(128));
    }
};
static thread_local Block* running;
static std::barrier<>* cluster_together;

inline Warp& own_warp() { return *running->warps[threadIdx.x / 32]; }
inline void __syncwarp() { own_warp().together.arrive_and_wait(); }
inline void __syncthreads() { running->all.arrive_and_wait(); }

// What all lanes give, seen by each.
template <class Use>
auto gather(int x, Use use) {
    Warp& warp = own_warp();
    warp.slot[threadIdx.x % 32] = x;
    __syncwarp();
    const auto result = use(warp.slot);
    __syncwarp();
    return result;
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return bits_of<T>(gather(bits_of<int>(x), [&](const int* slot) { return slot[lane & 31]; }));
}
template <class T>
T __shfl_xor_sync(unsigned all, T x, int mask) {
    return __shfl_sync(all, x, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned all, T x, int by) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(all, x, lane >= by ? lane - by : lane);
}
inline uint32_t __ballot_sync(unsigned, bool x) {
    return gather(x, [](const int* slot) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; i++) votes |= (uint32_t)slot[i] << i;
        return votes;
    });
}
inline bool __any_sync(unsigned all, bool x) { return __ballot_sync(all, x) != 0; }
inline int __reduce_add_sync(unsigned, int x) {
    return gather(x, [](const int* slot) {
        int sum = 0;
        for (int i = 0; i < 32; i++) sum += slot[i];
        return sum;
    });
}
inline int __reduce_max_sync(unsigned, int x) {
    return gather(x, [](const int* slot) { return *std::max_element(slot, slot + 32); });
}

// Shared memory, and the barriers in it.

constexpr int MEMORY = 256 * 1024;  // of a thread block
alignas(1024) static char memory[2 * MEMORY];
inline uint32_t address(const void* p) { return (uint32_t)((const char*)p - memory); }

class Barrier {
    std::mutex mutex;
    std::condition_variable changed;
    int count = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;

    void finish_phase() {
        if (pending != 0 || bytes != 0) return;
        ++phase;
        pending = count;
        changed.notify_all();
    }

public:
    void init(int arrivals) { count = pending = arrivals; }
    void arrive(long expected = 0) {
        std::unique_lock lock(mutex);
        bytes += expected;
        --pending;
        finish_phase();
    }
    void complete(long copied) {
        std::unique_lock lock(mutex);
        bytes -= copied;
        finish_phase();
    }
    void wait(unsigned parity) {
        std::unique_lock lock(mutex);
        if (changed.wait_for(lock, std::chrono::seconds(120), [&] { return (phase & 1) != parity; })) return;
        fprintf(stderr, "thread %d of block %d waits for ever\n", threadIdx.x, blockIdx.x);
        abort();
    }
};
static std::map<const void*, Barrier> barriers;  // made by `init`, while one thread runs

inline void init(uint64_t* barrier, int count) { barriers[barrier].init(count); }
inline void expect(uint64_t* barrier, int bytes) { barriers.at(barrier).arrive(bytes); }
inline void wait(uint64_t* barrier, int parity) { barriers.at(barrier).wait(parity); }
inline void arrive_warp(uint64_t* barrier, int lane) {
    __syncwarp();
    if (lane == 0) barriers.at(barrier).arrive();
}
inline void publish_barriers() {}
inline void publish_to_units() {}
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}
template <int GROUP>
void wait_for_group() {
    running->groups[GROUP]->arrive_and_wait();
}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}
inline bool elect() { return threadIdx.x % 32 == 0; }

// Copies and products.

constexpr int TILE = 64 * 64 * 2;

struct TensorMap {
    const char* base;
    long long size[4], stride[4], box[4];  // numbers, bytes, numbers
};

inline void prefetch(const TensorMap*) {}

// Where the layout of 128 swizzled bytes has what would lie at an address.
inline char* swizzled(uint32_t at) { return memory + (at ^ (at >> 7 & 7) << 4); }

inline void copy_keys(void* to, const TensorMap* map, uint64_t* barrier, int row, int tile, int page) {
    for (int t = 0; t < map->box[2]; t++)
        for (int r = 0; r < map->box[1]; r++)
            for (int byte = 0; byte < 128; byte += 2) {
                uint16_t x = 0;
                if (row + r < map->size[1] && tile + t < map->size[2] && page >= 0 && page < map->size[3])
                    memcpy(&x,
                           map->base + byte + (row + r) * map->stride[1] + (tile + t) * map->stride[2] +
                               page * map->stride[3],
                           2);
                memcpy(swizzled(address(to) + (t * map->box[1] + r) * 128 + byte), &x, 2);
            }
    barriers.at(barrier).complete(map->box[2] * map->box[1] * 128);
}
inline void copy_q(void* to, const TensorMap* map, uint64_t* barrier, int row, int tile) {
    copy_keys(to, map, barrier, row, tile, 0);
}

inline void copy_number(float4* to, const float* from) { memcpy(to, from, 16); }
inline void end_group() {}
inline void wait_for_groups_but(int) {}

inline uint64_t operand(const void* tile) { return address(tile) >> 4; }
inline void begin_products() {}
inline void commit_products() {}
inline void finish_products() {}

inline int exponent(double x) { return max((int)(bits_of<uint64_t>(x) >> 52 & 0x7FF) - 1023, -126); }

// One instruction: 16 products and the accumulator, cut off 25 bits below the largest exponent, summed, cut to fp32.
inline float multiply_add(const uint16_t (&a)[16], const uint16_t (&b)[16], float c) {
    double x[16], y[16];
    int largest = exponent(c);
    for (int k = 0; k < 16; k++) {
        x[k] = bits_of<float>((uint32_t)a[k] << 16);
        y[k] = bits_of<float>((uint32_t)b[k] << 16);
        largest = max(largest, exponent(x[k]) + exponent(y[k]));
    }
    const double unit = std::ldexp(1.0, 25 - largest);
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
        uint16_t x[16], y[16];
        row_of_a(half, x);
        for (int i = 0; i < COUNT / 2; i++) {
            const int n = i / 2 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) memcpy(&y[k], swizzled(place_of_b(n, k)), 2);
            float& sum = d[i / 2 * 4 + half * 2 + i % 2];
            sum = multiply_add(x, y, accumulate ? sum : 0.0f);
        }
    }
}
inline void multiply_scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    const auto row_of_a = [&](int half, uint16_t (&x)[16]) {
        for (int k = 0; k < 16; k++) memcpy(&x[k], swizzled((uint32_t)(a << 4) + (row + 8 * half) * 128 + k * 2), 2);
    };
    multiply(d, accumulate, row_of_a, [&](int n, int k) { return (uint32_t)(b << 4) + n * 128 + k * 2; });
}
inline void multiply_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    // Four lanes hold a row: numbers 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 are lane i's.
    const auto row_of_a = [&](int half, uint16_t (&x)[16]) {
        for (int k = 0; k < 16; k += 2) {
            const uint32_t two = __shfl_sync(~0u, a[half + k / 8 * 2], threadIdx.x % 32 / 4 * 4 + k % 8 / 2);
            memcpy(&x[k], &two, 4);
        }
    };
    const auto place_of_b = [&](int n, int k) { return (uint32_t)(b << 4) + n / 64 * TILE + k * 128 + n % 64 * 2; };
    multiply(d, accumulate, row_of_a, place_of_b);
}

inline uint32_t bf16(float x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t bf16_pair(float low, float high) { return bf16(low) | bf16(high) << 16; }

#ifdef NEAR  // the attention kernel's
// As wrong as the hardware's may be: what is at most NEAR from the middle between bf16 numbers is on its other side.
inline float near_exp2(float x) {
    if (std::isnan(x)) return x;
    const double y = std::exp2((double)x);
    if (y < std::ldexp(1.0, -126)) return 0.0f;
    const uint32_t bits = bits_of<uint32_t>((float)y);
    const int behind = (int)(bits & 0xFFFF) - 0x8000;
    if (std::abs(behind) > NEAR) return (float)y;
    return bits_of<float>(bits - behind + (behind > 0 ? -1 : 1));
}
#endif
inline uint32_t __byte_perm(uint32_t x, uint32_t y, int) { return (x & 0xFFFF) | y << 16; }  // as it is called

template <class Of>
uint32_t of_halves(uint32_t a, uint32_t b, Of of) {
    return (uint16_t)of((uint16_t)a, (uint16_t)b) | (uint32_t)of((uint16_t)(a >> 16), (uint16_t)(b >> 16)) << 16;
}
inline uint32_t add_pair(uint32_t a, uint32_t b) {
    return of_halves(a, b, [](uint16_t x, uint16_t y) { return (uint16_t)(x + y); });
}
inline uint32_t min_pair(uint32_t a, uint32_t b) {
    return of_halves(a, b, [](uint16_t x, uint16_t y) { return min(x, y); });
}
inline uint32_t max_pair(uint32_t a, uint32_t b) {
    return of_halves(a, b, [](uint16_t x, uint16_t y) { return max(x, y); });
}

inline void store_matrices(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const int lane = threadIdx.x % 32;
    const uint32_t part[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const uint32_t row = __shfl_sync(~0u, address(to), i * 8 + lane / 4);
        memcpy(memory + row + lane % 4 * 4, &part[i], 4);
    }
}

inline void load_matrices(uint32_t (&x)[4], const void* from) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        const uint32_t row = __shfl_sync(~0u, address(from), i * 8 + lane / 4);
        memcpy(&x[i], memory + row + lane % 4 * 4, 4);
    }
}

inline float4 load_prefix(const float4* from) { return *from; }
inline void store_prefix(float4* to, float4 x) { *to = x; }

// Run a kernel: one cluster of thread blocks after the other, each block in its own part of the memory.
inline void launch(int blocks, int threads, const std::function<void()>& kernel, int cluster = 1) {
    for (int first = 0; first < blocks; first += cluster) {
        memset(memory, 0xFF, sizeof memory);
        barriers.clear();
        std::barrier<> together(cluster * threads);
        cluster_together = &together;
        std::vector<std::unique_ptr<Block>> running_blocks;
        for (int rank = 0; rank < cluster; rank++) running_blocks.push_back(std::make_unique<Block>(threads));
        std::vector<std::thread> all;
        for (int thread = 0; thread < cluster * threads; thread++)
            all.emplace_back([&, thread] {
                threadIdx.x = thread % threads;
                blockIdx.x = first + thread / threads;
                gridDim.x = blocks;
                running = running_blocks[thread / threads].get();
                kernel();
                together.arrive_and_drop();
            });
        for (std::thread& thread : all) thread.join();
    }
}
