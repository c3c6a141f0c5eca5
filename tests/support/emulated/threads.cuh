// CUDA on a CPU: every thread of a thread block is a thread of the machine.

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
#define __cluster_dims__(...)
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
template <class T>
T __ldg(const T* from) {
    return *from;
}
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
static int cluster_blocks;

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
static std::map<const void*, Barrier> barriers;  // made by `barrier_init`

// Run a kernel: one cluster of thread blocks after the other, each block in its own part of the memory.
inline void launch(int blocks, int threads, const std::function<void()>& kernel, int cluster = 1) {
    for (int first = 0; first < blocks; first += cluster) {
        memset(memory, 0xFF, sizeof memory);
        barriers.clear();
        std::barrier<> together(cluster * threads);
        cluster_together = &together;
        cluster_blocks = cluster;
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
