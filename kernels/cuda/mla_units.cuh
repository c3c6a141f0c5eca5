// What the attention kernel alone asks of Hopper's units: barriers by pointer, TMA copies of its tiles, bf16 products,
// and loads and stores that the L2 cache is told about.

#pragma once

#include "hopper.cuh"

// A tile is 64 rows of 64 bf16 numbers in the swizzled layout of 128 bytes that copies write and products read.
constexpr int TILE = 64 * 64 * 2;

// Policies of the L2 cache: keys are read once, prefixes come back.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

__device__ __forceinline__ void barrier_init(u64* barrier, int count) { barrier_init(shared_address(barrier), count); }

__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    barrier_expect(shared_address(barrier), bytes);
}

// A loop in C++, while hopper.cuh's is in assembly: with that one `attend` has too few registers and stores more of
// them to memory, and with this one the fp8 kernel takes up to 1 % longer (measured).
__device__ __forceinline__ void barrier_wait(u64* barrier, int parity) {
    u32 done;
    do {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// One arrival of the calling warp, behind everything that its lanes did.
__device__ __forceinline__ void arrive_warp(u64* barrier, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(barrier));
}

// TMA copies of boxes of tiles, one tile behind the other: `tile` is the number of the first one.
__device__ __forceinline__ void copy_q(void* to, const TensorMap* map, u64* barrier, int row, int tile) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {0, %2, %3}], [%4];" ::"r"(shared_address(to)),
        "l"(map), "r"(row), "r"(tile), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void copy_keys(void* to, const TensorMap* map, u64* barrier, int row, int tile, int page) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {0, %2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(row), "r"(tile), "r"(page), "r"(shared_address(barrier)), "l"(EVICT_FIRST)
        : "memory");
}

// A copy of four numbers to shared memory, behind this thread's back.
__device__ __forceinline__ void copy_number(float4* to, const float* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Ends a group of them, which may be empty.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the ended groups, 7 at most, are still on their way.
__device__ __forceinline__ void wait_for_groups_but(int pending) {
    switch (pending) {
        case 7: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
        case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
        case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
        case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
        case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
        case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
        case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
        default: asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
}

// One lane of the warp. The compiler knows that it is one, and that its operands need no vote.
__device__ __forceinline__ bool elect() {
    u32 chosen;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen));
    return chosen;
}

// Operands in shared memory, layout of 128 swizzled bytes: groups of 8 rows are 1024 bytes apart, tiles 8192.
__device__ __forceinline__ u64 operand(const void* tile) {
    const u64 groups = (u64)(1024 >> 4) << 32, tiles = (u64)(TILE >> 4) << 16, swizzle = 1ull << 62;
    return swizzle | groups | tiles | ((shared_address(tile) & 0x3FFFF) >> 4);
}

// 64 x 64 scores, 16 deep: rows of queries times rows of keys.
__device__ __forceinline__ void multiply_scores(float (&d)[32], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, 0, 0;}"
        :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
}

// 64 x 128 outputs, 16 deep: rows of probabilities, which the warps hold, times columns of keys.
__device__ __forceinline__ void multiply_values(float (&d)[64], const u32 (&a)[4], u64 b, int accumulate) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
        :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
        "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
        "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// The hardware's 2**x, 0 below fp32's normal range. Its last places are those of no formula.
__device__ __forceinline__ float near_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two 16-bit numbers at once. A sum wraps around.
__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
    u32 pair;
    asm("add.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ u32 min_pair(u32 a, u32 b) {
    u32 pair;
    asm("min.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ u32 max_pair(u32 a, u32 b) {
    u32 pair;
    asm("max.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

// Loads four 8 x 8 matrices of bf16, which `store_matrices` stored.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(from))
                 : "memory");
}

// A load that stays where it is written: moved up, sixteen of them would need more registers than there are.
__device__ __forceinline__ float4 load_prefix(const float4* from) {
    float4 x;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from), "l"(EVICT_LAST)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_prefix(float4* to, float4 x) {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x),
                 "f"(x.y), "f"(x.z), "f"(x.w), "l"(EVICT_LAST)
                 : "memory");
}
