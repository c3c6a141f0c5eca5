// CUDA on a CPU: the threads of a cluster of thread blocks are fibers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "fibers.cuh"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __shared__

using std::max;
using std::min;

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
    Meeting together{32};
    int slots[2][32];
};

struct Block {
    std::vector<Warp> warps;
    std::vector<Meeting> groups;
    Meeting all;

    explicit Block(int threads) : warps(threads / 32), groups(threads / 128, Meeting(128)), all(threads) {}
};

struct TensorMap;
struct Box {
    const TensorMap* map;
    uint32_t source;
    int inner, outer;
};

struct Index {
    int x;
};

struct Thread : Fiber {
    Index index, block_index;
    Block* block;
    int gathers = 0;
    std::deque<Box> boxes;  // that it has yet to write (hopper.cuh)

    Warp& warp() { return block->warps[index.x / 32]; }
};
inline Thread& own() { return static_cast<Thread&>(*self); }

#define threadIdx own().index
#define blockIdx own().block_index
static Index gridDim;
static int cluster_blocks;
static Meeting* cluster_together;

inline void __syncwarp() { own().warp().together.arrive_and_wait(); }
inline void __syncthreads() { own().block->all.arrive_and_wait(); }

// What all lanes give, seen by each.
template <class Use>
auto gather(int x, Use use) {
    // Two arrays in turns, so that a lane may go on and give the next number while others still read.
    int* slots = own().warp().slots[own().gathers++ % 2];
    slots[threadIdx.x % 32] = x;
    __syncwarp();
    return use(slots);
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
    int count = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;
    Fibers waiting;

    void finish_phase() {
        if (pending != 0 || bytes != 0) return;
        ++phase;
        pending = count;
        wake(waiting);
    }

public:
    void init(int arrivals) { count = pending = arrivals; }
    void arrive(long expected = 0) {
        bytes += expected;
        --pending;
        finish_phase();
    }
    void complete(long copied) {
        bytes -= copied;
        finish_phase();
    }
    void wait(unsigned parity) {
        while ((phase & 1) == parity) wait_in(waiting);
    }
};
static std::map<const void*, Barrier> barriers;  // made by `barrier_init`

// Run a kernel: one cluster of thread blocks after the other, each block in its own part of the memory.
template <class Kernel>
void launch(int blocks, int threads, const Kernel& kernel, int cluster = 1) {
    struct Of : Thread {
        const Kernel* kernel;
        void work() override {
            (*kernel)();
            cluster_together->arrive_and_drop();
        }
    };
    gridDim.x = blocks;
    cluster_blocks = cluster;
    for (int first = 0; first < blocks; first += cluster) {
        memset(memory, 0xFF, sizeof memory);
        barriers.clear();
        Meeting together(cluster * threads);
        cluster_together = &together;
        std::vector<Block> running(cluster, Block(threads));
        std::deque<Of> all(cluster * threads);
        Fibers fibers;
        for (int i = 0; i < cluster * threads; i++) {
            all[i].index.x = i % threads;
            all[i].block_index.x = first + i / threads;
            all[i].block = &running[i / threads];
            all[i].kernel = &kernel;
            fibers.push_back(&all[i]);
        }
        run(fibers);
    }
}
