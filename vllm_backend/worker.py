"""What vLLM's worker can be asked about our models, and what its weight updates must also do for them.

vLLM has no extension point for either: `worker_extension_cls` is one class, and trainers (verl, NeMo-RL) bring theirs.
So the worker class gets two more methods, for `collective_rpc`, and its calls that write or lose weights are wrapped.
An update is whole or refused by name; what it left undone may not answer (`engine`, and where all else failed
`attention.LatentMetadataBuilder.build`).
Workers of other models are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname

from dsv3_plugin.checkpoint.fingerprint import fingerprint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import class_name, is_ours
from dsv3_plugin.errors import CheckpointError, EngineError
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.layers.warm_up import warm_up
from dsv3_plugin.vllm_backend import compat, layerwise, sampling
from dsv3_plugin.vllm_backend.attention import LatentMetadataBuilder
from dsv3_plugin.vllm_backend.eplb import MovableExperts
from dsv3_plugin.vllm_backend.prompts import know_prompts

logger = init_logger("vllm.dsv3_plugin")

Method = Callable[..., Any]
Tensors = Iterable[tuple[str, torch.Tensor]]


def install(worker_class: str) -> None:
    """Teach vLLM's worker, once a process. Raises `EngineError` where it lacks a method that is to be wrapped."""
    worker = resolve_obj_by_qualname(worker_class)
    if hasattr(worker, "dsv3_fingerprint"):
        return
    worker.dsv3_fingerprint = dsv3_fingerprint
    worker.dsv3_provenance = dsv3_provenance
    if missing := _WRAPPED.keys() - _NOT_IN_EVERY_VERSION - set(dir(worker)):
        raise EngineError(f"vLLM's {worker_class} has no {', '.join(sorted(missing))}, as the tested versions have")
    for name in _WRAPPED.keys() & set(dir(worker)):
        setattr(worker, name, _for_ours(getattr(worker, name), _WRAPPED[name]))


def dsv3_fingerprint(worker: Any) -> dict[str, Any]:
    """The fingerprint of the weights that this worker holds, the draft's included.

    Every worker answers. Tensor-parallel ones answer for each other, stages and ranks of experts only for what they
    hold: a model's is that of all answers, put together by `Fingerprint.__or__`. Of several data-parallel engines vLLM
    returns the first one's answers, in which the other engines' experts are missing.

    Returns `{"digest": str, "tensors": {Hugging Face's name: digest}}`: a `checkpoint.fingerprint.Fingerprint`. Raises
    `CheckpointError` while the weights may not answer.
    """
    found = None
    for model in _models(worker):
        model.weight_loader.require_whole()
        if isinstance(model, MovableExperts):
            model.follow_experts()
        held = fingerprint(model.weight_loader.model, model.config, model.weight_loader.part, model.layout)
        found = held if found is None else found | held
    if found is None:
        raise EngineError("this vLLM serves no model of dsv3-plugin")
    return found.model_dump()


def dsv3_provenance(worker: Any) -> dict[str, Any]:
    """`main`, and `mtp` where there is a draft: the `class` that serves, and what its kernels are (`Ops.record`)."""
    return {model.weight_loader.part: {"class": class_name(model), **model.ops.record()} for model in _models(worker)}


class Weights(NamedTuple):
    """A worker's weights, as the engine core must know them."""

    updates: list[int]
    """`WeightLoader.updates` of each model."""
    problem: str | None
    """Why they may not answer now."""


def weights(worker: Any) -> Weights | None:
    """For `collective_rpc`; None where no model is ours."""
    loaders = [model.weight_loader for model in _models(worker)]
    problems = (f"the {loader.part} model may not answer: {loader.problem}" for loader in loaders if loader.problem)
    return Weights([loader.updates for loader in loaders], next(problems, None)) if loaders else None


def _models(worker: Any) -> list[Any]:
    """The models of ours that a worker serves: the target, then the draft."""
    return [model for model in (worker.get_model(), worker.get_draft_model()) if is_ours(model)]


def _for_ours(original: Method, wrap: Callable[..., Any]) -> Method:
    @wraps(original)
    def call(worker: Any, *args: Any, **kwargs: Any) -> Any:
        if not _models(worker):
            return original(worker, *args, **kwargs)
        return wrap(original, worker, *args, **kwargs)

    return call


def _warm_up(original: Method, worker: Any) -> Any:
    """The last call before requests, in which vLLM captures its graphs."""
    sampling.make_exact(worker.model_runner)
    in_two_forms = [model for model in _models(worker) if model.ops.setting.profile.attention == "two_form"]
    if in_two_forms:
        prompts = know_prompts(worker.model_runner)
        for model in in_two_forms:
            model.attend.know_prompts(prompts)
    if worker.device.type != "cpu":  # where nothing is compiled
        for model in _models(worker):
            _compile(worker.vllm_config, model)
        compat.compile_slot_mapping(worker.model_runner)
    return original(worker)


def _compile(vllm_config: Any, model: Any) -> None:
    """All that a model's requests may need."""
    scheduler = vllm_config.scheduler_config
    most_logits = scheduler.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    seconds = warm_up(
        model.model,
        getattr(model, "lm_head", None),
        model.layout,
        block_size=vllm_config.cache_config.block_size,
        most_tokens=scheduler.max_num_batched_tokens,
        most_logits=most_logits,
    )
    logger.info("dsv3-plugin: the %s model's kernels are compiled, in %.0f s", model.weight_loader.part, seconds)


def _dummy_batch(original: Method, worker: Any) -> None:
    """Other ranks wait for this pass, whose tokens are nobody's, whatever the weights are."""
    LatentMetadataBuilder.answers = False
    try:
        original(worker)
    finally:
        LatentMetadataBuilder.answers = True


# The weight-transfer calls. vLLM tells its transfer engine which model, target or draft, an update is of.


def _start(original: Method, worker: Any) -> None:
    original(worker)
    model = worker.weight_transfer_engine.model
    if is_ours(model):
        layerwise.take_back(model)
        model.weight_loader.begin()


def _finish(original: Method, worker: Any) -> None:
    # The original goes back to the target.
    model = getattr(worker.weight_transfer_engine, "model", None)
    original(worker)
    if model is not None and is_ours(model):
        model.weight_loader.finish()


def _reload(
    original: Method,
    worker: Any,
    weights_iterator: Tensors | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    """The draft's weights too: vLLM's own call leaves it with the old ones."""
    if not is_checkpoint_format:
        raise EngineError(
            "reload_weights(is_checkpoint_format=False) passes by what dsv3-plugin derives from weights;"
            " send the checkpoint's tensors under Hugging Face's names"
        )
    target, *drafts = _models(worker)
    folder = str(weights_path or worker.model_config.model)
    if weights_iterator is None and weights_path is not None and not _is_folder_or_hub_name(folder):
        raise CheckpointError(f"{folder}: no such folder")
    if weights_iterator is None and Path(folder).is_dir():
        weights_iterator = _checkpoint(folder, target).tensors()
    if weights_iterator is None:
        original(worker, weights_path=weights_path)
    else:
        original(worker, weights_iterator=_also_to(drafts, weights_iterator))
        if weights_path is not None:
            # As vLLM does: a reload without arguments is of the same files.
            worker.model_config.model = weights_path
    for model in (target, *drafts):
        model.weight_loader.finish()


def _is_folder_or_hub_name(path: str) -> bool:
    """Whether a path is a folder, or may be the name of a model on Hugging Face's hub, which vLLM then asks."""
    if Path(path).is_dir():
        return True
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _checkpoint(folder: str, target: Any) -> CheckpointReader:
    """A checkpoint that is whole and of the model that is served, else `CheckpointError` before anything is written."""
    reader = CheckpointReader(folder)
    reader.validate()
    served, found = target.config.model_dump(), reader.config.model_dump()
    # A dtype is converted, or refused, tensor by tensor.
    if different := [name for name in served if name != "torch_dtype" and served[name] != found[name]]:
        values = "; ".join(f"{name}: {found[name]}, served is {served[name]}" for name in different)
        raise CheckpointError(f"{folder}: its configuration is not that of the model that is served: {values}")
    return reader


def _also_to(drafts: list[Any], tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, which the drafts get first. An update without any of a draft's leaves it as it is."""
    begun: set[Any] = set()
    for name, tensor in tensors:
        for draft in drafts:
            if name not in draft.weight_loader.wanted:
                continue
            if draft not in begun:
                draft.weight_loader.begin()
                begun.add(draft)
            draft.load_weights([(name, tensor)])
        yield name, tensor


# Sleep. At level 1 vLLM keeps the weights, at level 2 only the buffers of the models.


def _sleep(original: Method, worker: Any, level: int = 1) -> None:
    original(worker, level)
    if level > 1 and worker.device.type != "cpu":  # where vLLM does not sleep
        _discarded(worker, f"sleep of level {level} has discarded them")


def _wake_up(original: Method, worker: Any, tags: list[str] | None = None) -> None:
    original(worker, tags)
    if tags is None or "weights" in tags:
        for model in _models(worker):
            _derive_rotary_tables(model, model.config)


def _discard(original: Method, worker: Any, tags: tuple[str, ...]) -> None:
    original(worker, tags)
    if "weights" in tags:
        _discarded(worker, "discard has discarded them")


def _reset(original: Method, worker: Any) -> None:
    original(worker)
    _discarded(worker, "reset_weights has set them to zero")


def _discarded(worker: Any, why: str) -> None:
    for model in _models(worker):
        model.weight_loader.discard(why)


def _derive_rotary_tables(model: nn.Module, config: DeepseekV3Config) -> None:
    """vLLM before 0.27 loses the draft's."""
    for module in model.modules():
        if isinstance(module, RotaryTable):
            for kept, new in zip(module.buffers(), RotaryTable(config).buffers(), strict=True):
                kept.copy_(new)


_WRAPPED: dict[str, Method] = {
    "compile_or_warm_up_model": _warm_up,
    "execute_dummy_batch": _dummy_batch,
    "start_weight_update": _start,
    "start_draft_weight_update": _start,
    "finish_weight_update": _finish,
    "reload_weights": _reload,
    "sleep": _sleep,
    "wake_up": _wake_up,
    "discard": _discard,
    "reset_weights": _reset,
}
_NOT_IN_EVERY_VERSION = {"discard", "reset_weights"}
