"""The platform: SGLang's CPU device operations, as an out-of-tree platform.

SGLang's own CPU platform (`SGLANG_USE_CPU_ENGINE=1`) imports sgl_kernel in many places; an out-of-tree one does not.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate() -> str | None:
    """Called by SGLang: this platform's class, unless the machine has a GPU."""
    return None if torch.cuda.is_available() else "sglang_cpu.platform.CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU with SGLang's standard latent cache.

    SGLang asks for the platform while its own modules are being imported, so the pools are imported when needed.
    """

    _enum = PlatformEnum.OOT

    def get_mla_kv_pool_cls(self) -> type:
        """The latent cache's class."""
        from sglang_cpu.pools import LatentPool

        return LatentPool

    def get_paged_allocator_cls(self) -> type:
        """The class that hands out the cache's slots."""
        from sglang_cpu.pools import TokenAllocator

        return TokenAllocator

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Asked by SGLang 0.5.23: `hooks` lets drafts run."""
        return algorithm == "EAGLE"

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        """Asked by SGLang 0.5.23."""
        return algorithm == "EAGLE"
