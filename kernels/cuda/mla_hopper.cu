// Absorbed attention over V3's latent (512 + 64) on Hopper's asynchronous units.
//
// A CTA takes 64 rows (token, head) of one request and walks keys in blocks of 64, which lie in two stages. Two
// warpgroups own a stage each: they copy its keys by TMA and compute scores and probabilities (mla_scores.cuh). Two
// hold 256 columns of the output each and add every block to them (mla_values.cuh). Nobody waits for anybody but
// through the barriers of a stage, so copies, products and exponentials of neighbouring blocks overlap.
//
// Splits are combined in their order. Where there are more tiles of rows than multiprocessors a CTA takes all splits of
// a tile, one after the other, and keeps the combined prefix in scratch memory of its own. Else there is split-KV:
// every split is a CTA's work of its own, and the kernel `combine` puts the partials together (mla_combine.cuh). Both
// are the same operations, hence the same bits.
//
// A stage's rotary keys are read by the scores alone, so the probabilities, of the same shape, are written there.
//
// Every product and sum of the contract is an intrinsic that rounds once and is never contracted.

#include "mla_scores.cuh"
#include "mla_values.cuh"

extern "C" __global__ void __launch_bounds__(512, 1)
attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap key_map,
       const __grid_constant__ Batch batch) {
    extern __shared__ char memory[];
    Shared& shared = *(Shared*)(memory + (1024 - shared_address(memory) % 1024) % 1024);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        prefetch_map(&q_map);
        prefetch_map(&key_map);
        barrier_init(&shared.q_full, 1);
        barrier_init(&shared.q_empty, 8);
        for (int stage = 0; stage < 2; stage++) {
            barrier_init(&shared.work_full[stage], 1);
            barrier_init(&shared.work_empty[stage], 16);
            barrier_init(&shared.scaled[stage], 4);
            barrier_init(&shared.totalled[stage], 4);
            for (int i = 0; i < COPIES; i++) barrier_init(&shared.full[stage][i], 1);
            for (int i = 0; i < 2; i++) {
                barrier_init(&shared.empty[stage][i], 4);
                barrier_init(&shared.ready[stage][i], 4);
            }
        }
        barrier_init_fence();
        publish_to_units();
    }
    __syncthreads();
    wait_for_kernel_before();
    let_next_kernel_start();
    if (group < 2) {
        take_registers<VALUE_REGISTERS>();
        accumulate_values(shared, batch, group, thread);
    } else if (group == 2) {
        give_registers<SCORE_REGISTERS>();
        compute_probabilities<0>(shared, batch, &q_map, &key_map, thread);
    } else {
        give_registers<SCORE_REGISTERS>();
        compute_probabilities<1>(shared, batch, &q_map, &key_map, thread);
    }
}
