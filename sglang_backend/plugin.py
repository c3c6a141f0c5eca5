"""SGLang's entry point (`sglang.srt.plugins`): puts our model classes in place of SGLang's own.

SGLang calls `register` in each of its processes. It only logs what a plugin raises and would then serve its own model,
so a failure is kept and raised again when a model is built, where it does stop the engine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from dsv3_plugin.engines import is_ours, switched_off
from dsv3_plugin.errors import EngineError
from dsv3_plugin.sglang_backend import compat
from dsv3_plugin.variables import KILL_SWITCH

logger = logging.getLogger("sglang.dsv3_plugin")

MODELS = "dsv3_plugin.sglang_backend.models"
ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN")


def register() -> None:
    """Override SGLang's DeepSeek-V3 and its MTP draft, unless `DSV3_PLUGIN=off`."""
    if switched_off():
        # SGLang configures its log after its plugins: what is less than a warning is not seen here.
        logger.warning("dsv3-plugin is switched off by %s; SGLang serves its own DeepSeek-V3", KILL_SWITCH)
        return
    from sglang.srt.models.registry import ModelRegistry

    try:
        warning = compat.version_warning()
        if warning is not None:
            logger.warning(warning)
        for architecture in ARCHITECTURES:
            if (owner := _other_owner(ModelRegistry.models.get(architecture))) is not None:
                logger.warning(
                    "dsv3-plugin replaces %s for %s: another plugin registered it first;"
                    " name the one you want in SGLANG_PLUGINS",
                    owner,
                    architecture,
                )
        ModelRegistry.register(MODELS, overwrite=True, strict=True)
        _register_attention_and_hooks()
    except Exception as error:
        for architecture in ARCHITECTURES:
            ModelRegistry.models[architecture] = _failing_model(error)
        raise


@functools.cache
def _register_attention_and_hooks() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import (
        add_attention_backend_choices,
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    from dsv3_plugin.sglang_backend import attention

    register_attention_backend(attention.NAME)(attention.LatentBackend)
    for add_choices in (
        add_attention_backend_choices,
        # With `--enable-deterministic-inference` SGLang keeps a request's seed and answers log-softmax.
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    ):
        add_choices([attention.NAME])
    for target, hook in hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def load_early() -> None:
    """Let SGLang load its plugins now: a host that builds SGLang's arguments before SGLang does so is refused
    `attention_backend="dsv3"` by SGLang 0.5.17.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()


def hooks() -> dict[str, Callable[..., Any]]:
    """What stands around which of SGLang's functions: each is called with the original, then with its arguments."""
    from dsv3_plugin.sglang_backend import attention, options, sampling, updates, warm_up

    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    around: dict[str, Callable[..., Any]] = {
        f"{factory}.create_decode_backend": attention.create_decode_backend,
        f"{factory}.create_draft_extend_backend": attention.create_draft_extend_backend,
        "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs": attention.record_draft_extend,
        compat.page_size_default(): _choose_page_size,
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": attention.note_prompts,
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": compat.cut_idle_draft,
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model": attention.size_slots,
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": _leave_operators,
        "sglang.srt.models.registry._ModelRegistry.resolve_model_cls": _name_other_owner,
        **options.HOOKS,
        **updates.HOOKS,
        **sampling.HOOKS,
        **warm_up.HOOKS,
    }
    return {target: hook for target, hook in around.items() if compat.has(target)}


def require_hooks() -> None:
    """Raise `EngineError` unless SGLang calls our hooks. It only logs one that it cannot place, and a process that
    found our models by `SGLANG_EXTERNAL_MODEL_PACKAGE` alone has placed none so far.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    _register_attention_and_hooks()
    HookRegistry.apply_hooks()
    if missing := sorted(hooks().keys() - compat.placed_hooks()):
        raise EngineError(
            f"this SGLang has no {missing[0]}, around which dsv3-plugin must stand: use SGLang"
            f" {compat.TESTED[0]} to {compat.TESTED[1]}, or {KILL_SWITCH}=off for its own model"
        )


def _choose_page_size(default: Callable[[Any], dict[str, Any]], arguments: Any) -> dict[str, Any]:
    """Around SGLang's choice of `page_size`, which is 1 where the user names none: single slots are copied one by one,
    which makes a long prompt's attention four times as slow. SGLang's chunks must be whole pages.
    """
    from dsv3_plugin.layers.attend import FAST_PAGE_SIZE
    from dsv3_plugin.sglang_backend import attention

    ours = arguments.attention_backend == attention.NAME and arguments.device == "cuda"
    if ours and arguments.page_size is None and (arguments.chunked_prefill_size or 0) % FAST_PAGE_SIZE == 0:
        return {"page_size": FAST_PAGE_SIZE}
    return default(arguments)


def _leave_operators(replace: Callable[[Any], None], runner: Any) -> None:
    """Around `ModelRunner.maybe_enable_batch_invariant_mode`: with `--enable-deterministic-inference` SGLang replaces
    operators of torch on a GPU. Our model calls none of them, and that log-softmax rounds otherwise than torch's, which
    trainers take; torch's does not depend on the batch.
    """
    if not is_ours(runner.model):
        replace(runner)


def _name_other_owner(resolve: Callable[..., tuple[Any, str]], *args: Any) -> tuple[Any, str]:
    """Around `_ModelRegistry.resolve_model_cls`: say so where a plugin that came later took our place."""
    model, architecture = resolve(*args)
    if architecture in ARCHITECTURES and (owner := _other_owner(model)) is not None:
        logger.warning(
            "dsv3-plugin does not serve %s: another plugin registered %s after it;"
            " name the one you want in SGLANG_PLUGINS",
            architecture,
            owner,
        )
    return model, architecture


def _other_owner(model: Any) -> str | None:
    """The class that another plugin registered, as module:class; None for SGLang's own and for ours."""
    module, name = getattr(model, "__module__", "?"), getattr(model, "__qualname__", str(model))
    if model is None or module.startswith("sglang.") or module.startswith("dsv3_plugin."):
        return None
    return f"{module}:{name}"


def _failing_model(error: Exception) -> type:
    """A model class that cannot be built, and says why."""

    class Unavailable:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise EngineError(
                f"dsv3-plugin could not be registered: {type(error).__name__}: {error};"
                f" set {KILL_SWITCH}=off for SGLang's own model"
            ) from error

    return Unavailable
