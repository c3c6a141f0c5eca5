"""Kernels of other packages, offered under this package's contracts: DeepGEMM, cuBLAS, TransformerEngine, FlashMLA."""
