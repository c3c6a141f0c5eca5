// The fp8 kernel as a function of a CPU (hopper.cuh and wgmma.cuh of this folder).

#include "fp8_gemm.cu"

extern "C" void emulate_fp8_gemm(
    int blocks, int threads, const TensorMap* x, const TensorMap* x_scale, const TensorMap* weight,
    const TensorMap* out_boxes, const float* weight_scale, const long long* counts, u16* out, int rows,
    int columns, int depth_blocks, int groups) {
    launch(blocks, threads, [&] {
        fp8_gemm(*x, *x_scale, *weight, *out_boxes, weight_scale, counts, out, rows, columns, depth_blocks, groups);
    }, CLUSTER);
}
