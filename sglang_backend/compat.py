"""What differs between SGLang versions, and what this adapter cannot do.

Differences are found by looking for the feature, not by comparing versions. The tested range only decides whether a
warning is logged.
"""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.engines import KILL_SWITCH, untested_version_warning
from dsv3_plugin.errors import EngineError

logger = logging.getLogger("sglang.dsv3_plugin")

TESTED = ("0.5.17", "0.5.23")


def sglang_version() -> str:
    """The installed version."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise EngineError("SGLang is not installed: pip install sglang") from None


def version_warning() -> str | None:
    """A warning for an SGLang outside the tested range, else None."""
    return untested_version_warning("SGLang", sglang_version(), TESTED)


def require_supported(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `EngineError` for an engine configuration that this adapter cannot serve exactly; switch off what it can
    do without, CUDA graphs of prefill.

    The model runs on `device` in `dtype`.
    """
    from sglang.srt import runtime_context

    # Not `get_parallel()`: in some versions that asks process groups which do not exist.
    arguments = runtime_context.get_server_args()
    for name in ("tp_size", "pp_size", "attn_cp_size", "dcp_size"):
        size = getattr(arguments, name, 1)
        if size != 1:
            raise EngineError(
                f"dsv3-plugin serves on one rank, but {name}={size};"
                f" set it to 1, or {KILL_SWITCH}=off for SGLang's own model"
            )
    cache_dtype = runtime_context.get_model().kv_cache_dtype
    if cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        raise EngineError(f"kv_cache_dtype={cache_dtype} was asked for, but the latent cache has the model's dtype")
    if runtime_context.get_lora().enable_lora:
        raise EngineError("dsv3-plugin does not serve LoRA adapters")
    topk = getattr(runtime_context.get_spec(), "speculative_eagle_topk", None)
    if topk not in (None, 1):
        raise EngineError(f"speculative_eagle_topk={topk}; MTP drafts a chain of tokens, so set it to 1")
    if device.type != "cpu":
        _settle_graphs(arguments, runtime_context.get_exec().graph.cuda_graph_config)


def _settle_graphs(arguments: Any, graphs: Any) -> None:
    """CUDA graphs are for decode and verification, and want `LatentBackend`."""
    from dsv3_plugin.sglang_backend import attention

    backends = arguments.attention_backend, arguments.decode_attention_backend or attention.NAME
    if graphs.decode.backend != "disabled" and set(backends) != {attention.NAME}:
        raise EngineError(
            "dsv3-plugin runs in CUDA graphs with its own attention backend only:"
            f" pass --attention-backend {attention.NAME}, or --disable-cuda-graph"
        )
    if graphs.prefill.backend != "disabled":
        graphs.prefill.backend = "disabled"
        logger.info(
            "dsv3-plugin: prefill runs without CUDA graphs; SGLang cuts them at attention layers of its own,"
            " and this model has none"
        )


def model_path() -> str:
    """The checkpoint's path, as the user gave it."""
    from sglang.srt import runtime_context

    return runtime_context.get_model().model_path


def load_format() -> str:
    """How the engine fills the weights; `dummy` reads no checkpoint."""
    from sglang.srt import runtime_context

    return str(runtime_context.get_model().load_format)
