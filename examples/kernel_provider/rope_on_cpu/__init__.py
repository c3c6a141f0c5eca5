"""A kernel provider with one kernel: the rotary embedding on a CPU.

    pip install --no-deps ./examples/kernel_provider
    dsv3 kernels check --provider rope-on-cpu                       # equal to the contract in every bit?
    dsv3 kernels check --provider rope-on-cpu --certify FILE        # then it gets a certificate
    DSV3_PLUGIN_CERTIFICATES=FILE dsv3 kernels list --device cpu    # and serves in strict mode

A certificate is of this code, this torch and this processor. Without `DSV3_PLUGIN_CERTIFICATES` strict mode reads the
file that it names when it refuses the kernel, and `certificates.json` beside this module, if you ship one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3_plugin.hooks import SUPPORTED, Kernel, Setting, Support, hookimpl, unsupported
from dsv3_plugin.ops import rope as contracts
from dsv3_plugin.ops.operation import implements


@implements(contracts.rope)
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [M, H, P]; cos, sin fp32 [M, P / 2]; to [M, H, P] of x's dtype, as `dsv3_plugin.ops.rope` says."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.empty_like(pairs)
    torch.sub(even * cos, odd * sin, out=rotated[..., 0])
    torch.add(even * sin, odd * cos, out=rotated[..., 1])
    return rotated.flatten(-2).to(x.dtype)


def is_supported(setting: Setting) -> Support:
    """Whether it can serve a setting, and if not, why."""
    if (setting.device_type, setting.arithmetic) == ("cpu", "cpu"):
        return SUPPORTED
    return unsupported("computes on a CPU")


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """What this provider offers. `contracts.rope.version` would promise contracts that nobody has written yet."""
    return [
        Kernel(
            op=contracts.rope.name,
            contract_version=1,
            provider="rope-on-cpu",
            version="1.0",
            run=rope,
            is_supported=is_supported,
            certificates=Path(__file__).with_name("certificates.json"),
            priority=1,
        )
    ]
