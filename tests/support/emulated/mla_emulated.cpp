// The attention kernels as functions of a CPU (mla_units.cuh of this folder).

#include "mla_hopper.cu"

extern "C" void emulate_attend(int blocks, const TensorMap* q_map, const TensorMap* key_map, const Batch* batch) {
    launch(blocks, 512, [&] { attend(*q_map, *key_map, *batch); });
}

extern "C" void emulate_combine(int blocks, const Batch* batch, int rows, int groups) {
    launch(blocks, 128, [&] { combine(*batch, rows, groups); });
}
