"""What SGLang calls in sgl_kernel on its way to a CPU model, replaced one by one."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    """Called by SGLang in each of its processes."""
    HookRegistry.register("sglang.srt.distributed.bootstrap._init_cpu_threads_env", leave_threads, HookType.REPLACE)
    use_triton_for_drafts()


def leave_threads(**kwargs: Any) -> None:
    """SGLang binds threads to cores and shares memory between ranks by sgl_kernel; one rank on one thread needs
    neither.
    """


def use_triton_for_drafts() -> None:
    """SGLang finds a draft's slots and builds and verifies draft trees by sgl_kernel, or on Intel GPUs by Triton
    kernels, which an interpreter can run. The choice is a flag of each module, read when the function is called; on
    an unknown platform neither is chosen and the results are left undefined. As on Intel GPUs, drafts are then verified
    greedily at every temperature.
    """
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.speculative import eagle_utils

    cache_locs._is_xpu = eagle_utils._is_xpu = True
