"""What `dsv3 doctor` asks SGLang: which class its registry resolves, who else wants the name, what changes numbers."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_plugin.engines import Variable
from dsv3_plugin.sglang_backend import compat

NAME = "SGLang"
TESTED = compat.TESTED
PLUGINS = "SGLANG_PLUGINS"
VARIABLES = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": Variable("log-probabilities leave the temperature out", ("0", "false")),
    "SGLANG_SIMULATE_UNIFORM_EXPERTS": Variable("the router does not choose the experts", ("0", "false")),
    "SGLANG_SIMULATE_ACC_LEN": Variable("drafts are accepted that the model did not choose", ("-1",)),
}


def version() -> str:
    """SGLang's version. Raises `EngineError` where it is not installed."""
    return compat.sglang_version()


def resolve() -> dict[str, str]:
    """Load plugins as SGLang does; each of our architectures to the class in its registry."""
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins import load_plugins

    from dsv3_plugin.sglang_backend.plugin import ARCHITECTURES

    load_plugins()
    classes = {architecture: ModelRegistry.models[architecture] for architecture in ARCHITECTURES}
    return {architecture: f"{cls.__module__}.{cls.__qualname__}" for architecture, cls in classes.items()}


def other_plugins() -> dict[str, Callable[[], object]]:
    """SGLang's general plugins but ours that it would load."""
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group

    plugins = {name: plugin for name, (plugin, _) in load_plugins_by_group(GENERAL_PLUGINS_GROUP).items()}
    return {name: plugin for name, plugin in plugins.items() if not plugin.__module__.startswith("dsv3_plugin.")}


def register() -> None:
    """Put our classes into the registry."""
    from dsv3_plugin.sglang_backend import plugin

    plugin.register()
