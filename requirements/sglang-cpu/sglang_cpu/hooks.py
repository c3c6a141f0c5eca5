"""What SGLang calls in sgl_kernel on its way to a CPU model, replaced one by one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    """Called by SGLang in each of its processes."""
    for name in ("distributed.bootstrap._init_cpu_threads_env", "utils.numa_utils.init_threads_binding"):
        HookRegistry.register(f"sglang.srt.{name}", leave_threads, HookType.REPLACE)
    use_triton_for_drafts()
    padding = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch"
    HookRegistry.register(padding, pin_nothing, HookType.AROUND)
    hashing = "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32"
    HookRegistry.register(hashing, murmur_hash32, HookType.REPLACE)


def leave_threads(**kwargs: Any) -> None:
    """SGLang binds threads to cores and shares memory between ranks by sgl_kernel; ranks on one thread each, with gloo
    between them, need neither.
    """


def use_triton_for_drafts() -> None:
    """SGLang finds a draft's slots and builds and verifies draft trees by sgl_kernel, or on Intel GPUs by Triton
    kernels, which an interpreter can run. The choice is a flag of each module, read when the function is called; on
    an unknown platform neither is chosen and the results are left undefined. As on Intel GPUs, SGLang's own models then
    verify drafts greedily at every temperature; dsv3-plugin's draw at each.
    """
    for name in (
        "sglang.kernels.ops.speculative.cache_locs",
        "sglang.kernels.ops.speculative.spec_tree",
        "sglang.srt.speculative.eagle_utils",
    ):
        module = import_module(name)
        if hasattr(module, "_is_xpu"):  # where the choice is made depends on the version
            module._is_xpu = True


def pin_nothing(prepare: Callable[..., None], *args: Any) -> None:
    """Data-parallel ranks of attention pad their batches to each other's sizes, which SGLang puts into pinned memory: a
    CPU has none.
    """
    tensor = torch.tensor
    torch.tensor = lambda *values, pin_memory=False, **options: tensor(*values, **options)
    try:
        prepare(*args)
    finally:
        torch.tensor = tensor


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """A sampled request's random numbers: SGLang hashes by sgl_kernel on a CPU, and elsewhere by this Triton kernel.

    seed and positions integers [n], col_indices integers [m], to uint32 [n, m].
    """
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel

    n, m = len(seed), len(col_indices)
    # A power of two, and no more than there is: the interpreter computes all of it.
    block = 1 << min(16, (m - 1).bit_length())
    hashed = torch.empty(n, m, dtype=torch.uint32)
    murmur_hash32_kernel[n, -(-m // block)](seed, positions, col_indices, hashed, n, m, BLOCK_SIZE=block)
    return hashed
