// The kernels of peers.cu as functions of a CPU: CTAs are threads, which start in any order.

#include "peers.cu"

template <class Kernel>
void run(int grid, Kernel kernel) {
    static u32 launches = 0;
    gridDim.x = grid;
    launches++;
    std::vector<std::thread> ctas;
    for (int i = 0; i < grid; i++)
        ctas.emplace_back([=] {
            blockIdx.x = i;
            chance = 1 + i + 1000 * launches + (u32)nanoseconds() % 1000;
            kernel();
            all_come();
        });
    for (std::thread& cta : ctas) cta.join();
}

extern "C" {
void lag_at_most(int microseconds) { most_microseconds = microseconds; }

void emulate_fold_at_once(int grid, const Peers* p, const float4* x, float4* out, int words, int chunk) {
    run(grid, [=] { fold_at_once(*p, x, out, words, chunk); });
}
void emulate_fold_all(int grid, const Peers* p, const float4* x, float4* out, int words, int chunk) {
    run(grid, [=] { fold_all(*p, x, out, words, chunk); });
}
void emulate_fold_shares(int grid, const Peers* p, const float4* x, float4* out, int words, int chunk) {
    run(grid, [=] { fold_shares(*p, x, out, words, chunk); });
}
void emulate_gather(int grid, const Peers* p, const uint4* x, uint4* out, int words, int chunk) {
    run(grid, [=] { gather(*p, x, out, words, chunk); });
}
void emulate_exchange_counts(int grid, const Peers* p, const long long* counts, long long* own_counts, int slots) {
    run(grid, [=] { exchange_counts(*p, counts, own_counts, slots); });
}
void emulate_move_rows(int grid, const Peers* p, const uint4* rows, int slots, int row_words, int target, int back) {
    run(grid, [=] { move_rows(*p, rows, slots, row_words, target, back); });
}
void emulate_arrive(int grid, const Peers* p) {
    run(grid, [=] { arrive(*p); });
}
}
