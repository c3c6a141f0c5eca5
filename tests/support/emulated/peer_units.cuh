// CUDA on a CPU for peers.cu: a CTA is one thread of this process, memory is shared between processes, one a rank. Where
// ranks meet they lag behind each other, as chance has it.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <unistd.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

typedef uint32_t u32;
typedef uint64_t u64;

struct float4 {
    float x, y, z, w;
};
struct uint4 {
    u32 x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __fadd_rn(float a, float b) { return a + b; }

struct Index {
    int x;
};
static const Index threadIdx{0}, blockDim{1};
static thread_local Index blockIdx;
static Index gridDim;
inline void __syncthreads() {}
inline int block_sum(int x) { return x; }

static thread_local unsigned chance;
static int most_microseconds = 0;

inline void lag() {
    const int now = most_microseconds ? rand_r(&chance) % (2 * most_microseconds) : 0;
    if (now < most_microseconds) std::this_thread::sleep_for(std::chrono::microseconds(now));
}

inline void store_release(u32* flag, u32 value) {
    lag();
    reinterpret_cast<std::atomic<u32>*>(flag)->store(value, std::memory_order_release);
}

inline u32 load_acquire(const u32* flag) {
    const u32 value = reinterpret_cast<const std::atomic<u32>*>(flag)->load(std::memory_order_acquire);
    std::this_thread::yield();
    lag();
    return value;
}

inline u64 nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline void give_up() {
    fprintf(stderr, "a rank did not come\n");
    _exit(3);
}
