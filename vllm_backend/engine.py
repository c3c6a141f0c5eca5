"""What vLLM's engine core, which schedules requests, does when weights change under them.

Every write goes through its `collective_rpc`, by a name or by a function of the trainer's, and vLLM leaves running
requests and cached prefixes with keys and values of the old weights. Here they begin again once new weights are whole:
tokens that were answered stay, those that follow are the new model's. Between, nothing may answer. A request that would
run then ends with the finish reason "error" and the stop reason why, and the engine lives to get the rest of the
weights; under a pause of mode "keep" requests wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import attention_from_environment
from dsv3_plugin.vllm_backend import worker

logger = init_logger("vllm.dsv3_plugin")

Method = Callable[..., Any]
Outputs = dict[int, EngineCoreOutputs]
_WRITES = "reload_weights", "start_weight_update", "start_draft_weight_update", "update_weights"


def install() -> None:
    """Teach vLLM's engine core, once a process. Raises `EngineError` where it lacks a method that is to be wrapped."""
    if hasattr(EngineCore, "dsv3_weights"):
        return
    if missing := _WRAPPED.keys() - set(dir(EngineCore)):
        raise EngineError(f"vLLM's EngineCore has no {', '.join(sorted(missing))}, as the tested versions have")
    EngineCore.dsv3_weights = None
    for name, wrap in _WRAPPED.items():
        setattr(EngineCore, name, _wrapped(getattr(EngineCore, name), wrap))
    kv_cache_utils.generate_block_hash_extra_keys = _with_prompt(kv_cache_utils.generate_block_hash_extra_keys)


def _with_prompt(original: Method) -> Method:
    """Around what goes into a page's name beside its tokens. In the `two_form` profile a generated token has other
    numbers in another request's prompt: pages with generated tokens are found by prompts of the same length alone.
    """

    @wraps(original)
    def extra_keys(request: Any, start: int, end: int, *args: Any) -> Any:
        keys, rest = original(request, start, end, *args)
        if end > request.num_prompt_tokens and attention_from_environment() == "two_form":
            keys = (*(keys or ()), ("dsv3_prompt_len", request.num_prompt_tokens))
        return keys, rest

    return extra_keys


def _wrapped(original: Method, wrap: Callable[..., Any]) -> Method:
    @wraps(original)
    def call(core: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(original, core, *args, **kwargs)

    return call


def _weights(core: Any) -> list[worker.Weights]:
    """Each worker's; none of workers that serve no model of ours."""
    asked: list[worker.Weights | None] = core.model_executor.collective_rpc(worker.weights)
    return [weights for weights in asked if weights is not None]


def _may_write(original: Method, core: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a call that may write weights, whether it returns or raises."""
    if not hasattr(core, "scheduler"):  # the engine starts
        return original(core, *args, **kwargs)
    before = _weights(core) if core.dsv3_weights is None else core.dsv3_weights
    try:
        return original(core, *args, **kwargs)
    finally:
        core.dsv3_weights = _weights(core)
        if [weights.updates for weights in before] != [weights.updates for weights in core.dsv3_weights]:
            core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)


def _rpc(original: Method, core: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Raises `EngineError` where weights are written while other engines' requests may use this one's experts."""
    runs = hasattr(core, "scheduler") and core.scheduler.pause_state == PauseState.UNPAUSED
    if not runs or core.vllm_config.parallel_config.data_parallel_size == 1:
        return _may_write(original, core, method, *args, **kwargs)
    refusal = EngineError(
        "weights may not change while data-parallel engines, which use each other's experts, run: pause generation"
        " before (POST /pause), resume after"
    )
    if method in _WRITES:
        raise refusal
    before = core.dsv3_weights or _weights(core)
    result = _may_write(original, core, method, *args, **kwargs)
    if core.dsv3_weights != before:  # by a function of the trainer's
        raise refusal
    return result


def _step(original: Method, core: Any) -> tuple[Outputs | None, bool]:
    problem = next((weights.problem for weights in core.dsv3_weights or () if weights.problem is not None), None)
    if problem is None or not core.scheduler.has_unfinished_requests():
        return original(core)
    draining = core.scheduler.pause_state == PauseState.PAUSED_NEW
    ids = [request.request_id for request in core.scheduler.running] if draining else None
    ended: Outputs = {}
    for request in core.scheduler.finish_requests(ids, RequestStatus.FINISHED_ERROR):
        outputs = ended.setdefault(request.client_index, EngineCoreOutputs(finished_requests=set()))
        output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=problem)
        outputs.outputs.append(output)
        outputs.finished_requests.add(request.request_id)
    if ended:  # over HTTP a request hears nothing but its status, 500
        logger.error("dsv3-plugin ends requests until weights are whole again: %s", problem)
    return ended, False


def _preprocess(original: Method, core: Any, request: Any) -> Any:
    """Raises `EngineError` for a request whose prompt grows over what was generated, in the `two_form` profile."""
    if getattr(request, "resumable", False) and attention_from_environment() == "two_form":
        raise EngineError("streamed inputs are not served in the two_form profile: send a whole prompt")
    return original(core, request)


_WRAPPED: dict[str, Method] = {
    "preprocess_add_request": _preprocess,
    "collective_rpc": _rpc,
    "wake_up": _may_write,
    "step": _step,
    "step_with_batch_queue": _step,
}
