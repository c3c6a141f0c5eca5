"""What `dsv3 doctor` asks Megatron-Core, which has no registry of models: whether it and our layers import."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_plugin.engines import Variable
from dsv3_plugin.megatron_backend import compat

NAME = "Megatron"
TESTED = compat.TESTED
PLUGINS = "--spec"
VARIABLES: dict[str, Variable] = {}


def version() -> str:
    """Megatron-Core's version. Raises `EngineError` where it is not installed."""
    return compat.megatron_version()


def resolve() -> dict[str, str]:
    """Nothing: a model is what `pretrain` is given."""
    import dsv3_plugin.megatron_backend.model  # noqa: F401

    return {}


def other_plugins() -> dict[str, Callable[[], object]]:
    """None."""
    return {}


def register() -> None:
    """Nothing to register with."""
