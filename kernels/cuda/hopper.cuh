// Hopper's asynchronous units in CUDA C++: barriers in shared memory, TMA, the addresses that the tensor core reads.
//
// All inline assembly is in headers, so that tests can put functions of a CPU in its place (tests/support/emulated):
// what attention alone asks for is in mla_units.cuh, and fp8's `wgmma` is written by compiler.py, because inline
// assembly takes no arrays.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// A descriptor that the driver encoded (CUtensorMap).
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Initialised barriers become visible to TMA.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra passed;\n"
        "bra again;\n"
        "passed:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_tile(u32 target, const TensorMap* map, u32 barrier, int inner, int outer) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            target),
        "l"(map), "r"(barrier), "r"(inner), "r"(outer) : "memory");
}

// The same for blocks of 128 bytes along K: the map's dimensions are (128, rows, K / 128).
__device__ __forceinline__ void copy_k_blocks(u32 target, const TensorMap* map, u32 barrier, int row, int k_block) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %3, %4}], [%2];" ::
            "r"(target),
        "l"(map), "r"(barrier), "r"(row), "r"(k_block) : "memory");
}

// The same, but into the memory of all CTAs of a cluster, each of which is told by its own barrier at this address.
template <int CTAS>
__device__ __forceinline__ void copy_k_blocks_to_all(
    u32 target, const TensorMap* map, u32 barrier, int row, int k_block) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {0, %3, %4}], [%2], %5;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(row), "r"(k_block), "h"((u16)((1 << CTAS) - 1)) : "memory");
}

// TMA fetches a descriptor before its first copy needs it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Clusters of CTAs, which run at the same time and reach each other's shared memory.

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Synchronise all threads of a cluster that have not ended. Memory that they wrote is not made visible.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// Arrive at the barrier that CTA `rank` has at this address.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier), "r"(rank) : "memory");
}

// Wait until this thread's reads of shared memory are over.
__device__ __forceinline__ void finish_reads() {
    asm volatile("fence.acq_rel.cta;" ::: "memory");
}

// True, but whoever acts on it waits for these two numbers, if they are on their way: the compiler does not know that a
// sum is never this NaN.
__device__ __forceinline__ bool have_arrived(float a, float b) { return __float_as_int(a + b) != 0x7fc00001; }

// Programmatic dependent launch (PDL): wait until the kernel launched before has ended and its writes can be read.
// Until then a kernel launched so (`compiler.Launch.pdl`) must not touch memory that another kernel writes or reads.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Once every CTA has called it, CTAs of the next kernel, if that is launched by PDL, come to where there is room.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// The threads of a warpgroup have COUNT registers each from here on: more, which others have given, or fewer.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Shared memory, as much as the launch gives.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(1024) char dynamic_memory[];
    return dynamic_memory;
}

// Tiles of 128-byte rows, swizzled in groups of 8 rows, as a TMA copy with SWIZZLE_128B leaves them.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
    const u64 group_bytes = 1024;
    return (u64(address & 0x3FFFF) >> 4) | (u64(1) << 16) | ((group_bytes >> 4) << 32) | (u64(1) << 62);
}

__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most `pending` of the ended groups still run; a number that unrolling makes a constant.
__device__ __forceinline__ void wgmma_wait(int pending) {
    if (pending == 0) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (pending == 1) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (pending == 2) asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory");
    if (pending == 3) asm volatile("wgmma.wait_group.sync.aligned 3;" ::: "memory");
}

// The compiler must not move reads or writes of accumulators across an instruction that runs behind its back.
template <int COUNT>
__device__ __forceinline__ void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// The compiler must not compute this number anew wherever it is needed.
__device__ __forceinline__ void compute_once(int& number) { asm volatile("" : "+r"(number)); }

// Synchronise the 128 threads of one warpgroup.
__device__ __forceinline__ void warpgroup_sync(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// Store two 8 x 8 matrices of 16-bit numbers, transposed.
__device__ __forceinline__ void store_transposed(u32 target, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(target), "r"(a), "r"(b)
                 : "memory");
}

// Store four 8 x 8 matrices of 16-bit numbers; lane i gives where row i % 8 of matrix i / 8 is to be.
__device__ __forceinline__ void store_matrices(u32 target, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Ordinary writes to shared memory become visible to TMA and the tensor core.
__device__ __forceinline__ void publish_to_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// TMA writes a box of a matrix from shared memory, behind this thread's back.
__device__ __forceinline__ void store_box(const TensorMap* map, u32 source, int inner, int outer) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(inner), "r"(outer), "r"(source) : "memory");
}

// Wait until this thread's boxes but the last COUNT have been read from shared memory.
template <int COUNT>
__device__ __forceinline__ void wait_for_boxes_but() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(COUNT) : "memory");
}

// Wait until all of them are written.
__device__ __forceinline__ void finish_boxes() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
