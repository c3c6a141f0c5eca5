// kernels/cuda/hopper.cuh on a CPU: Hopper's units are functions that do at once what they would do later; boxes of sums
// alone are written late.
//
// It shows that sums, indices, swizzles and the counting of barriers are right. It cannot show a missing fence.

#pragma once

#include "threads.cuh"

typedef uint32_t u32;
typedef unsigned long long u64;
typedef uint16_t u16;

struct TensorMap {
    const char* base;
    long long size[4], stride[4], box[4];  // numbers, bytes, numbers
};

inline u32 shared_address(const void* p) { return (u32)((const char*)p - memory); }

// Where the layout of 128 swizzled bytes has what would lie at an address.
inline char* swizzled(u32 at) { return memory + (at ^ (at >> 7 & 7) << 4); }

inline Barrier& barrier_at(u32 at) { return barriers.at(memory + at); }
inline void barrier_init(u32 barrier, u32 count) {
    barriers[memory + barrier].init(count);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) { barrier_at(barrier).arrive(); }
inline void barrier_expect(u32 barrier, u32 bytes) { barrier_at(barrier).arrive(bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { barrier_at(barrier).wait(parity); }

inline void copy_tile(u32 target, const TensorMap* map, u32 barrier, int inner, int outer) {
    // TMA begins at multiples of 16 bytes.
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

inline void copy_k_blocks(u32 target, const TensorMap* map, u32 barrier, int row, int k_block) {
    if (target % 1024 != 0) abort();
    for (int s = 0; s < map->box[2]; s++)
        for (int r = 0; r < map->box[1]; r++)
            for (int byte = 0; byte < 128; byte++) {
                char x = 0;
                if (row + r < map->size[1] && k_block + s < map->size[2])
                    x = map->base[byte + (row + r) * map->stride[1] + (k_block + s) * map->stride[2]];
                *swizzled(target + (s * map->box[1] + r) * 128 + byte) = x;
            }
    barrier_at(barrier).complete(map->box[0] * map->box[1] * map->box[2]);
}

inline void prefetch_map(const TensorMap*) {}

// A block's shared memory, and where another block of the cluster has what lies at an address.
inline u32 cluster_rank() { return blockIdx.x % cluster_blocks; }
inline char* shared_memory() { return memory + cluster_rank() * MEMORY; }
inline u32 address_in(u32 at, u32 rank) { return at % MEMORY + rank * MEMORY; }

template <int CTAS>
void copy_k_blocks_to_all(u32 target, const TensorMap* map, u32 barrier, int row, int k_block) {
    for (u32 rank = 0; rank < CTAS; rank++)
        copy_k_blocks(address_in(target, rank), map, address_in(barrier, rank), row, k_block);
}
inline void barrier_arrive_at(u32 barrier, u32 rank) { barrier_arrive(address_in(barrier, rank)); }
inline void cluster_sync() { cluster_together->arrive_and_wait(); }
inline void finish_reads() {}
inline bool have_arrived(float, float) { return true; }
inline void compute_once(int&) {}
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

inline u64 tile_descriptor(u32 at) { return at >> 4; }
inline void wgmma_begin() {}
inline void wgmma_end() {}
inline void wgmma_wait(int) {}
template <int COUNT>
void hold(float (&)[COUNT]) {}

// The exponent by which the tensor core lines a number up with others.
inline int exponent(double x) { return max((int)(bits_of<uint64_t>(x) >> 52 & 0x7FF) - 1023, -126); }
inline double power_of_two(int exponent) { return bits_of<double>((uint64_t)(1023 + exponent) << 52); }

inline void warpgroup_sync(int group) { own().block->groups[group].arrive_and_wait(); }

inline u32 bf16(float x) {
    const u32 bits = bits_of<u32>(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }

inline void store_transposed(u32 target, u32 a, u32 b) {
    const int lane = threadIdx.x % 32;
    const u32 part[2] = {a, b};
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
            const u32 row = __shfl_sync(~0u, target, i * 8 + lane % 4 * 2 + half);
            const u16 x = part[i] >> 16 * half;
            memcpy(memory + row + lane / 4 * 2, &x, 2);
        }
}

inline void store_matrices(u32 target, u32 a, u32 b, u32 c, u32 d) {
    const int lane = threadIdx.x % 32;
    const u32 part[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const u32 row = __shfl_sync(~0u, target, i * 8 + lane / 4);
        memcpy(memory + row + lane % 4 * 4, &part[i], 4);
    }
}

inline void publish_to_units() {}

// Written as late as the kernel allows.
inline void write(const Box& box) {
    const TensorMap& map = *box.map;
    for (int o = 0; o < map.box[1]; o++)
        for (int i = 0; i < map.box[0]; i++)
            if (box.inner + i < map.size[0] && box.outer + o < map.size[1])
                memcpy(const_cast<char*>(map.base) + (box.inner + i) * 2 + (box.outer + o) * map.stride[1],
                       swizzled(box.source + (o * map.box[0] + i) * 2), 2);
}

template <int COUNT>
void wait_for_boxes_but() {
    for (auto& boxes = own().boxes; boxes.size() > COUNT; boxes.pop_front()) write(boxes.front());
}
inline void finish_boxes() { wait_for_boxes_but<0>(); }

inline void store_box(const TensorMap* map, u32 source, int inner, int outer) {
    if (source % 1024 != 0) abort();
    own().boxes.push_back({map, source, inner, outer});
}
