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
    positions = "sglang.srt.model_executor.forward_batch_info.compute_position_triton"
    HookRegistry.register(positions, compute_position, HookType.REPLACE)


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
    """A sampled request's random numbers: SGLang hashes by sgl_kernel on a CPU, and elsewhere by a Triton kernel, on
    which an interpreter spends half of a step's time.

    seed and positions integers [n], col_indices integers [m], to uint32 [n, m]: MurmurHash3 of the words seed (two),
    position and column, each in 32 bits of an int64.
    """
    low = 0xFFFFFFFF

    def rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x << bits | x >> (32 - bits)) & low

    seed, positions = seed.long()[:, None], positions.long()[:, None]
    h = torch.zeros(1, dtype=torch.int64)
    for word in (seed & low, seed >> 32 & low, positions & low, col_indices.long() & low):
        mixed = rotated(word * 0xCC9E2D51 & low, 15) * 0x1B873593 & low
        h = (rotated(h ^ mixed, 13) * 5 + 0xE6546B64) & low
    h ^= 16  # bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift) * factor & low
    return h.to(torch.uint32)


def compute_position(
    extend_prefix_lens: torch.Tensor, extend_seq_lens: torch.Tensor, extend_seq_lens_sum: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's position, int64 [tokens], and where each request's tokens start, int32 [requests].

    In SGLang's Triton kernel each request adds up the lengths of all before it: an interpreter spends the square of
    their number on it.
    """
    starts = extend_seq_lens.long().cumsum(0) - extend_seq_lens
    first = extend_prefix_lens.long() if len(extend_prefix_lens) == len(extend_seq_lens) else torch.zeros_like(starts)
    offsets = (first - starts).repeat_interleave(extend_seq_lens.long(), output_size=extend_seq_lens_sum)
    return torch.arange(extend_seq_lens_sum) + offsets, starts.int()
