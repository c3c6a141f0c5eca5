// The ring of stages: where it stands, and how a stage is given back to the warp that fills it.

#pragma once

#include "fp8_layout.cuh"

// Shuffled, so that the compiler knows it to be one number a warp.
__device__ __forceinline__ int own_warpgroup() { return __shfl_sync(~0u, int(threadIdx.x / 128), 0); }

// Of a warpgroup's 64 rows of the first operand a thread has sums of two: this one, and the eighth behind it.
__device__ __forceinline__ int own_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Where the ring stands, for the warp that fills it and for those who empty it.
struct Place {
    int stage = 0;
    u32 phase = 0;
    // Which warpgroup has the next turn, whether any had one, and what its own barrier waits for.
    int next_group = 0;
    bool begun = false;
    u32 turn_phase = 0;
    // The stage in which sums of the tile before lie, or -1.
    int kept = -1;
    // Go on by at most as many stages as there are.
    __device__ __forceinline__ void next(int count = 1) {
        stage += count;
        if (stage >= STAGES) stage -= STAGES, phase ^= 1;
    }
    __device__ __forceinline__ void skip(int count) {
        stage += count;
        phase ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

// This warp has read a stage: tell all who fill it. Arriving does not wait for loads that are on their way, which the
// next copy could overtake, so `finish_reads` must have been called, best while the tensor core works; or `read` is
// what `have_arrived` says of them (a warp's load is one instruction, so those who arrive know it of all lanes).
__device__ __forceinline__ void give_back(u32 barrier, bool read = true) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if constexpr (CLUSTER == 1) {
        if (read && lane == 0) barrier_arrive(barrier);
    } else {
        if (read && lane < CLUSTER) barrier_arrive_at(barrier, lane);
    }
}

// The stage in which the last tile's sums lay, once TMA has read them.
__device__ __forceinline__ void give_back_kept(const Shared& shared, Place& place) {
    if (!IN_RING || place.kept < 0) return;
    if (threadIdx.x % 32 == 0) wait_for_boxes_but<0>();
    finish_reads();
    give_back(shared.empty + 8 * place.kept);
    place.kept = -1;
}
