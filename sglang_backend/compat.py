"""What differs between SGLang versions, and what this adapter cannot do.

Differences are found by looking for the feature, not by comparing versions. The tested range only decides whether a
warning is logged.
"""

from __future__ import annotations

import logging
import pkgutil
from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.engines import KILL_SWITCH, untested_version_warning
from dsv3_plugin.errors import EngineError

logger = logging.getLogger("sglang.dsv3_plugin")

TESTED = ("0.5.17", "0.5.23")
SOME_VERSIONS = ("begin_weight_update", "end_weight_update", "compute_spec_logprobs", "compute_spec_v2_logprobs")
"""Functions of SGLang that not all tested versions have. It says where an update of the weights begins and ends from
0.5.23 on; the log-probabilities of verified tokens have one of two names.
"""


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


def draft_model(draft_worker: Any) -> Any:
    """The model of a speculative worker, None without one."""
    return None if draft_worker is None else draft_runner(draft_worker).model


def draft_runner(draft_worker: Any) -> Any:
    """What runs a speculative worker's model."""
    return draft_worker.draft_worker.draft_runner


def has(name: str) -> bool:
    """Whether this SGLang should have a function of this name: only those of `SOME_VERSIONS` may be missing."""
    owner, _, function = name.rpartition(".")
    return function not in SOME_VERSIONS or hasattr(pkgutil.resolve_name(owner), function)


def placed_hooks() -> set[str]:
    """What hooks of any plugin stand around."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return HookRegistry._patched


def has_sessions(manager: Any) -> bool:
    """Whether SGLang says where an update of the weights begins and ends."""
    return hasattr(manager, "begin_weight_update")


def answer(output_class: str, success: bool, message: str) -> Any:
    """SGLang's answer to one of its requests."""
    from sglang.srt.managers import io_struct

    return getattr(io_struct, output_class)(success=success, message=message)


def record_update(manager: Any, weight_version: str | None) -> None:
    """Tokens from here on are of this version; SGLang 0.5.17 notes that elsewhere."""
    if hasattr(manager, "record_weight_version_after_update"):
        manager.record_weight_version_after_update(weight_version)


def record_folder(manager: Any, path: str) -> None:
    """Note where the weights came from, as SGLang does after an update from a folder."""
    from sglang.srt.configs.load_config import LoadConfig

    runners = [manager.tp_worker.model_runner]
    if manager.draft_worker is not None:
        runners.append(draft_runner(manager.draft_worker))
    for runner in runners:
        runner.model_config.model_path = path
        runner.update_model_fields(
            runner.model, model_path=path, load_format="auto", load_config=LoadConfig(load_format="auto")
        )


def retract(scheduler: Any) -> None:
    """Pause, and send every request that runs back to the queue: what it computed is computed again."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))


def asks_for_weights(request: Any) -> bool:
    """Whether a request to release or resume memory is about that of the weights."""
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    return not request.tags or GPU_MEMORY_TYPE_WEIGHTS in request.tags


def keeps_weights(manager: Any) -> dict[str, bool]:
    """Whether target and draft still have their weights after their memory was released and came back."""
    from sglang.srt import runtime_context

    arguments = runtime_context.get_server_args()
    nothing_released = not manager.memory_saver_adapter.enabled
    return {
        "target": nothing_released or arguments.enable_weights_cpu_backup,
        "draft": nothing_released or arguments.enable_draft_weights_cpu_backup,
    }
