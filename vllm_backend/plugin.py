"""vLLM's entry point (`vllm.general_plugins`): registers the model classes under the names of vLLM's own.

vLLM calls `register` in every process, more than once. It swallows what a plugin raises and would then serve its own
model, so nothing here can fail late: the classes are registered by name and imported only when a model is built,
where an error does stop the engine.
"""

from __future__ import annotations

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

    from dsv3_plugin.vllm_backend import engine, requests

    # Where one fails a model says so: see above.
    requests.install()
    engine.install()


def _other_owner(registered: object, target: str) -> str | None:
    """The class that another plugin registered, as module:class; None for vLLM's own and for ours."""
    module = getattr(registered, "module_name", None) or type(registered).__module__
    name = getattr(registered, "class_name", None) or type(registered).__name__
    if registered is None or module.startswith("vllm.") or f"{module}:{name}" == target:
        return None
    return f"{module}:{name}"
