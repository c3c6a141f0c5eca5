// What ranks of one host ask of each other's memory: flags that are stored and waited for at the system's scope, and
// words that do without.
//
// Tests put functions of a CPU in the place of this header (tests/support/emulated).

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// All that this thread's CTA wrote before its last __syncthreads is seen by who acquires the flag.
__device__ __forceinline__ void store_release(u32* flag, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Ordered with nothing; the four numbers may come one by one.
__device__ __forceinline__ void store_relaxed(float4* to, const float4& x) {
    asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_relaxed(const float4* from) {
    float4 x;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Ends the program with an error of the card: a rank that has died is waited for no longer.
__device__ __forceinline__ void give_up() { asm volatile("trap;"); }

// The sum of every thread's x, for each thread. CTAs are whole warps, with room for 32 numbers in shared memory.
__device__ __forceinline__ int block_sum(int x) {
    extern __shared__ int sums[];
    x = __reduce_add_sync(~0u, x);
    __syncthreads();  // the sum before this one has been read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / 32; warp++) x += sums[warp];
    return x;
}
