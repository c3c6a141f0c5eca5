// The shared memory of an attention CTA: its operands, what its warpgroups tell each other, and the barriers of both.

#pragma once

#include "mla_batch.cuh"

struct Shared {
    alignas(1024) char q[BLOCK_BYTES];
    alignas(1024) char keys[2][BLOCK_BYTES];
    float alpha[2][ROWS], maximum[2][ROWS], total[2][ROWS];
    Work work[2];
    Works works;
    u64 q_full, q_empty;
    u64 work_full[2], work_empty[2];
    u64 full[2][COPIES];
    u64 empty[2][2];  // a half of the columns each
    u64 scaled[2];    // alpha and maximum
    u64 ready[2][2];  // probabilities of 32 keys each
    u64 totalled[2];  // total
};
