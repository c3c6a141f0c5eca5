"""vLLM's entry point (`vllm.general_plugins`): registers the model classes under the names of vLLM's own.

vLLM calls `register` in every process, more than once. It swallows what a plugin raises and would then serve its own
model, so nothing here can fail late: the classes are registered by name and imported only when a model is built,
where an error does stop the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from vllm.logger import init_logger

from dsv3_plugin.engines import switched_off
from dsv3_plugin.variables import KILL_SWITCH
from dsv3_plugin.vllm_backend import compat

logger = init_logger("vllm.dsv3_plugin")

ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "dsv3_plugin.vllm_backend.model:DeepseekV3ForCausalLM",
    "DeepSeekMTPModel": "dsv3_plugin.vllm_backend.model:DeepSeekMTPModel",
}


def register() -> None:
    """Override vLLM's DeepSeek-V3 and its MTP draft, unless `DSV3_PLUGIN=off`."""
    if switched_off():
        logger.warning("dsv3-plugin is switched off by %s; vLLM serves its own DeepSeek-V3", KILL_SWITCH)
        return
    warning = compat.version_warning()
    if warning is not None:
        logger.warning(warning)

    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        owner = _other_owner(ModelRegistry.models.get(architecture), target)
        if owner is not None:
            logger.warning(
                "dsv3-plugin replaces %s for %s: another plugin registered it first;"
                " name the one you want in VLLM_PLUGINS",
                owner,
                architecture,
            )
        ModelRegistry.register_model(architecture, target)
    if not hasattr(ModelRegistry.register_model, "__wrapped__"):
        ModelRegistry.register_model = _telling(ModelRegistry.register_model)  # type: ignore[method-assign]

    from dsv3_plugin.vllm_backend import engine, requests

    # Where one fails a model says so: see above.
    requests.install()
    engine.install()


def _telling(register_model: Callable[..., None]) -> Callable[..., None]:
    """Around vLLM's `ModelRegistry.register_model`, which says nothing where a later plugin takes a place."""

    @wraps(register_model)
    def register(architecture: str, model: object) -> None:
        from vllm import ModelRegistry

        register_model(architecture, model)
        if (target := ARCHITECTURES.get(architecture)) is None:
            return
        if (owner := _other_owner(ModelRegistry.models.get(architecture), target)) is not None:
            logger.warning(
                "dsv3-plugin does not serve %s: another plugin registered %s after it;"
                " name the one you want in VLLM_PLUGINS",
                architecture,
                owner,
            )

    return register


def _other_owner(registered: object, target: str) -> str | None:
    """The class that another plugin registered, as module:class; None for vLLM's own and for ours."""
    # vLLM holds what was registered by name, or with the class itself.
    model = getattr(registered, "model_cls", None) or type(registered)
    module = getattr(registered, "module_name", None) or model.__module__
    name = getattr(registered, "class_name", None) or model.__qualname__
    if registered is None or module.startswith("vllm.") or f"{module}:{name}" == target:
        return None
    return f"{module}:{name}"
