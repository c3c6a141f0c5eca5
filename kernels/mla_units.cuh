// What the attention kernel asks of Hopper's asynchronous units: barriers, tensor copies, products, registers. All
// inline assembly is here, so that tests can put functions of a CPU in its place (tests/kernels/emulated).

#pragma once

typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned short uint16_t;

// A tile is 64 rows of 64 bf16 numbers in the swizzled layout of 128 bytes that copies write and products read.
constexpr int TILE = 64 * 64 * 2;

// Policies of the L2 cache: keys stream through it, prefixes come back.
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

// A descriptor that the driver encoded.
struct alignas(64) TensorMap {
    char opaque[128];
};

__device__ __forceinline__ uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count));
}

__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// One arrival of the calling warp, behind everything that its lanes did.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier, int lane) {
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

// Copies of boxes of tiles, one tile behind the other: `tile` is the number of the first one.
__device__ __forceinline__ void copy_q(void* to, const TensorMap* map, uint64_t* barrier, int row, int tile) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {0, %2, %3}], [%4];" ::"r"(address(to)),
        "l"(map), "r"(row), "r"(tile), "r"(address(barrier))
        : "memory");
}

__device__ __forceinline__ void copy_keys(
    void* to, const TensorMap* map, uint64_t* barrier, int row, int tile, int page) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {0, %2, %3, %4}], [%5], %6;" ::"r"(address(to)),
        "l"(map), "r"(row), "r"(tile), "r"(page), "r"(address(barrier)), "l"(EVICT_FIRST)
        : "memory");
}

// A copy of four numbers to shared memory, behind this thread's back.
__device__ __forceinline__ void copy_number(float4* to, const float* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
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

// The copy engine fetches a descriptor before its first copy needs it.
__device__ __forceinline__ void prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Barriers that were initialised become visible to the copy engine.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits until the kernel launched before has ended and its writes can be read. Until then a kernel launched early
// (cuda.py) must not touch memory that another kernel writes or reads.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Once every thread block has called it, thread blocks of a kernel launched early come to the card where there is room.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits for the 128 threads of a warpgroup.
template <int GROUP>
__device__ __forceinline__ void wait_for_group() {
    asm volatile("bar.sync %0, 128;" ::"n"(GROUP + 1) : "memory");
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// One lane of the warp. The compiler knows that it is one, and that its operands need no vote.
__device__ __forceinline__ bool elect() {
    uint32_t chosen;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen));
    return chosen;
}

// Operands in shared memory, layout of 128 swizzled bytes: groups of 8 rows are 1024 bytes apart, tiles 8192.
__device__ __forceinline__ uint64_t operand(const void* tile) {
    const uint64_t groups = (uint64_t)(1024 >> 4) << 32, tiles = (uint64_t)(TILE >> 4) << 16, swizzle = 1ull << 62;
    return swizzle | groups | tiles | ((address(tile) & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void finish_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Makes ordinary writes to shared memory visible to products and copies.
__device__ __forceinline__ void publish_to_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 64 x 64 scores, 16 deep: rows of queries times rows of keys.
__device__ __forceinline__ void multiply_scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
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
__device__ __forceinline__ void multiply_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
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

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The hardware's 2**x, 0 below fp32's normal range. Its last places are those of no formula.
__device__ __forceinline__ float near_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two 16-bit numbers at once. A sum wraps around.
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b) {
    uint32_t pair;
    asm("add.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b) {
    uint32_t pair;
    asm("min.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
    uint32_t pair;
    asm("max.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

// Stores four 8 x 8 matrices of bf16; lanes 8 i to 8 i + 7 say where the rows of matrix i begin.
__device__ __forceinline__ void store_matrices(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(to)), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Loads four 8 x 8 matrices of bf16, which `store_matrices` stored.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address(from))
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
