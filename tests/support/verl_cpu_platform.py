"""A CPU as a platform of verl's: a plugin, which `VERL_USE_EXTERNAL_MODULES=verl_cpu_platform` loads. Weights travel
through shared memory, ranks talk by gloo, and there is nothing to wait for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


def _nothing(*_: Any, **__: Any) -> int:
    return 0


class PlatformCPU(PlatformCUDA):  # type: ignore[misc]
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **{name: _nothing for name in ("device_count", "empty_cache", "ipc_collect", "synchronize")},
        **{name: _nothing for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")},
        max_memory_reserved=_nothing,
        mem_get_info=lambda *_: (0, 1),
    )
    is_available = is_platform_available = lambda self, *_, **__: True
    device_count = set_device = synchronize = empty_cache = manual_seed = _nothing
    is_ipc_supported = _nothing

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())
