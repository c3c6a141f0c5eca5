"""What differs between SGLang versions, and its CUDA graphs.

Differences are found by looking for the feature, not by comparing versions. The tested range only decides whether a
warning is logged.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import pkgutil
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from dsv3_plugin.engines import is_ours, untested_version_warning
from dsv3_plugin.errors import EngineError
from dsv3_plugin.layout import WHOLE, Layout

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


def server_options() -> dict[str, Any]:
    """Every option of this SGLang, as it came out of SGLang's own resolution."""
    from sglang.srt import runtime_context

    arguments = runtime_context.get_server_args()
    if hasattr(arguments, "resolved_dict"):
        return dict(arguments.resolved_dict())
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}


def config_overrides() -> dict[str, Any]:
    """`--json-model-override-args`."""
    return dict(json.loads(server_options()["json_model_override_args"] or "{}"))


def tokens_in_graphs(device: torch.device) -> int:
    """Of the largest CUDA graph that SGLang will record; 0 without graphs."""
    from sglang.srt import runtime_context

    if device.type == "cpu":
        return 0
    decode = runtime_context.get_exec().graph.cuda_graph_config.decode
    if decode.backend == "disabled":
        return 0
    requests = max(decode.bs or [decode.max_bs or 0])
    return int(requests * (server_options()["speculative_num_draft_tokens"] or 1))


def settle_graphs(device: torch.device, layout: Layout = WHOLE, reason: str | None = None) -> None:
    """Raise `EngineError` for CUDA graphs on another attention backend than ours, and switch off those that this model
    does without: of prefill, and of a model whose ranks ask the host what they exchange, for a `reason`.
    """
    from sglang.srt import runtime_context

    if device.type != "cpu":
        graphs = runtime_context.get_exec().graph.cuda_graph_config
        if layout.layers is not None:
            reason = "SGLang's stages were not tried in them"
        elif layout.needs_no_host():
            reason = "SGLang counts experts' tokens by the host" if _counts_experts() else None
        if layout != WHOLE and reason is not None and graphs.decode.backend != "disabled":
            graphs.decode.backend = "disabled"
            logger.info("dsv3-plugin: ranks that share the model run without CUDA graphs: %s", reason)
        _settle_graphs(runtime_context.get_server_args(), graphs)


def _counts_experts() -> bool:
    values = server_options()
    return bool(values["enable_eplb"] or values["expert_distribution_recorder_mode"])


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


def checkpoint() -> tuple[str, str]:
    """The target's checkpoint as the user named it, and how SGLang fills the weights; `dummy` reads none."""
    values = server_options()
    return values["model_path"], str(values["load_format"])


def draft_checkpoint() -> tuple[str, str]:
    """The draft's; by default the target's."""
    values, (path, load_format) = server_options(), checkpoint()
    return values["speculative_draft_model_path"] or path, values["speculative_draft_load_format"] or load_format


def draft_model(draft_worker: Any) -> Any:
    """The model of a speculative worker, None without one."""
    return None if draft_worker is None else draft_runner(draft_worker).model


def draft_runner(draft_worker: Any) -> Any:
    """What runs a speculative worker's model."""
    return draft_worker.draft_worker.draft_runner


def cut_idle_draft(forward: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`: a rank without requests pads its draft passes to those of the others. Up to 0.5.20
    SGLang cuts the padding from their logits, and from the positions only where a rank has requests. On a card 0.5.17
    then refuses to make a second draft: as many positions as logits it needs there.
    """
    output = forward(runner, forward_batch, *args, **kwargs)
    if runner.is_draft_worker and forward_batch.forward_mode.is_idle() and is_ours(runner.model):
        forward_batch.positions = forward_batch.positions[:0]
    return output


def has(name: str) -> bool:
    """Whether this SGLang should have a function of this name: only those of `SOME_VERSIONS` may be missing."""
    owner, _, function = name.rpartition(".")
    return function not in SOME_VERSIONS or hasattr(pkgutil.resolve_name(owner), function)


def page_size_default() -> str:
    """Where SGLang's choice of `page_size` is called: the function is imported by its name."""
    pipeline = "sglang.srt.arg_groups.pipeline"
    return f"{pipeline if importlib.util.find_spec(pipeline) else 'sglang.srt.arg_groups.overrides'}._page_size_default"


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
