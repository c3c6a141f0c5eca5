"""A provider's kernel that is wrong in one bit."""

from __future__ import annotations

from typing import Any

import torch

from dsv3_plugin.hooks import Kernel
from dsv3_plugin.ops.operation import operations

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def wrong_kernel(name: str) -> Kernel:
    """Of an operation on a CPU, by another provider: the last bit of its first number is another one."""
    op = operations()[name]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        first, *others = out if isinstance(out, tuple) else (out,)
        bits = first.clone().view(_INTEGERS[first.element_size()])
        bits.view(-1)[0] ^= 1
        changed = bits.view(first.dtype)
        return (changed, *others) if isinstance(out, tuple) else changed

    return Kernel(name, op.version, "saboteur", "1.0", wrong, priority=1000)
