"""DeepSeek-V3, its arithmetic defined once, for vLLM, SGLang and Megatron-Core.

What other programs use has its name here. Each is imported when it is first asked for: this module costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsv3_plugin.version import __version__

if TYPE_CHECKING:
    from dsv3_plugin import hooks
    from dsv3_plugin.config import DeepseekV3Config
    from dsv3_plugin.layers.model import DeepseekV3, bind_ops
    from dsv3_plugin.layers.mtp import DeepseekV3MTP
    from dsv3_plugin.ops.operation import Operation, implements, operation
    from dsv3_plugin.profile import Profile
    from dsv3_plugin.registry import Ops, bind

__all__ = [
    "DeepseekV3",
    "DeepseekV3Config",
    "DeepseekV3MTP",
    "Operation",
    "Ops",
    "Profile",
    "__version__",
    "bind",
    "bind_ops",
    "hooks",
    "implements",
    "operation",
]

_MODULES = {
    "DeepseekV3": "layers.model",
    "DeepseekV3Config": "config",
    "DeepseekV3MTP": "layers.mtp",
    "Operation": "ops.operation",
    "Ops": "registry",
    "Profile": "profile",
    "bind": "registry",
    "bind_ops": "layers.model",
    "implements": "ops.operation",
    "operation": "ops.operation",
}


def __getattr__(name: str) -> Any:
    if name == "hooks":
        return importlib.import_module(f"{__name__}.hooks")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
