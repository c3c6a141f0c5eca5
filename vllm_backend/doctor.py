"""What `dsv3 doctor` asks vLLM: which class its registry resolves, who else wants the name, what changes numbers."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_plugin.engines import Variable
from dsv3_plugin.vllm_backend import compat

NAME = "vLLM"
TESTED = compat.TESTED
PLUGINS = "VLLM_PLUGINS"
VARIABLES = {
    "VLLM_BATCH_INVARIANT": Variable("vLLM replaces torch's log-softmax on a GPU by one that rounds otherwise", ("0",)),
    "VLLM_FLOAT32_MATMUL_PRECISION": Variable("matrix products in fp32 lose bits of their operands", ("highest",)),
    "VLLM_USE_V2_MODEL_RUNNER": Variable("that runner takes log-probabilities after top-k, top-p and min-p", ("0",)),
    "VLLM_TEST_FORCE_LOAD_FORMAT": Variable("weights may be read otherwise, or made up"),
    "VLLM_MODEL_REDIRECT_PATH": Variable("another checkpoint may be served than the one that is named"),
}


def version() -> str:
    """vLLM's version. Raises `EngineError` where it is not installed."""
    return compat.vllm_version()


def resolve() -> dict[str, str]:
    """Load plugins as vLLM does; each of our architectures to the class in its registry."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from dsv3_plugin.vllm_backend.plugin import ARCHITECTURES

    load_general_plugins()
    return {architecture: _class_of(ModelRegistry.models[architecture]) for architecture in ARCHITECTURES}


def other_plugins() -> dict[str, Callable[[], object]]:
    """vLLM's general plugins but ours that it would load."""
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    plugins = load_plugins_by_group(DEFAULT_PLUGINS_GROUP)
    return {name: plugin for name, plugin in plugins.items() if not _is_ours(plugin)}


def register() -> None:
    """Put our classes into the registry."""
    from dsv3_plugin.vllm_backend import plugin

    plugin.register()


def _is_ours(plugin: Callable[[], object]) -> bool:
    return plugin.__module__.startswith("dsv3_plugin.")


def _class_of(registered: object) -> str:
    """The class of an entry of vLLM's registry, which holds its name or the class itself."""
    module, name = getattr(registered, "module_name", None), getattr(registered, "class_name", None)
    if module is None or name is None:
        cls = getattr(registered, "model_cls", registered)
        module, name = getattr(cls, "__module__", "?"), getattr(cls, "__qualname__", str(cls))
    return f"{module}.{name}"
