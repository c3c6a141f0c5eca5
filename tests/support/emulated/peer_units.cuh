// CUDA on a CPU for peers.cu: a CTA is one thread of this process, memory is shared between processes, one a rank. Where
// ranks meet they lag behind each other, as chance has it. What is stored without an order is on its way for a while.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <unistd.h>
#include <vector>

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
inline u32 __float_as_uint(float x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

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

struct Number {
    std::atomic<u32>* to;
    u32 bits;
};
static thread_local std::vector<Number> on_the_way;

// The numbers come in any order, each by itself.
inline void one_comes() {
    if (on_the_way.empty()) return;
    std::swap(on_the_way[rand_r(&chance) % on_the_way.size()], on_the_way.back());
    on_the_way.back().to->store(on_the_way.back().bits, std::memory_order_relaxed);
    on_the_way.pop_back();
    lag();
}

// Before a kernel ends.
inline void all_come() {
    while (!on_the_way.empty()) one_comes();
}

inline void store_relaxed(float4* to, const float4& x) {
    const float numbers[]{x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; i++)
        on_the_way.push_back({reinterpret_cast<std::atomic<u32>*>(to) + i, __float_as_uint(numbers[i])});
    if (rand_r(&chance) % 2) one_comes();
}

inline float4 load_relaxed(const float4* from) {
    if (on_the_way.empty())
        lag();
    else
        one_comes();
    std::this_thread::yield();
    float numbers[4];
    for (int i = 0; i < 4; i++)
        numbers[i] = __uint_as_float(
            (reinterpret_cast<const std::atomic<u32>*>(from) + i)->load(std::memory_order_relaxed));
    return {numbers[0], numbers[1], numbers[2], numbers[3]};
}

inline u64 nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline void give_up() {
    fprintf(stderr, "a rank did not come\n");
    _exit(3);
}
