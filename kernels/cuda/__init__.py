"""Kernels in CUDA C++ for Hopper, compiled when first needed (`compiler`)."""
