// kernels/cuda/head_units.cuh on a CPU.

#pragma once

#include "mla_units.cuh"

inline void copy_rows(void* to, const TensorMap* map, u64* barrier, int row, int head) {
    copy_keys(to, map, barrier, row, 0, head);
}

inline void multiply_scores(float (&d)[64], u64 a, u64 b, int accumulate) {
    const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    const auto row_of_a = [&](int half, u16 (&x)[16]) {
        for (int k = 0; k < 16; k++) memcpy(&x[k], swizzled((u32)(a << 4) + (row + 8 * half) * 128 + k * 2), 2);
    };
    multiply(d, accumulate, row_of_a, [&](int n, int k) { return (u32)(b << 4) + n * 128 + k * 2; });
}

// The turn of each warpgroup comes when all its threads wait for it and all of the other have given it.
struct Turn {
    static constexpr int THREADS = 256;
    int come = 0;
    unsigned past = 0;
    Fibers waiting;

    void give() {
        if (++come < THREADS) return;
        come = 0;
        ++past;
        wake(waiting);
    }
    void await() {
        const unsigned before = past;
        give();
        while (past == before) wait_in(waiting);
    }
};
static Turn turns[2];

inline void await_turn(int group) { turns[group].await(); }
inline void give_turn(int to_group) { turns[to_group].give(); }
