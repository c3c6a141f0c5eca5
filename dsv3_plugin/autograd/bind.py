"""Making a model's bound kernels differentiable."""

from __future__ import annotations

from dataclasses import replace

from dsv3_plugin.autograd.fp8 import MasterWeights
from dsv3_plugin.registry import Ops, with_training


def differentiable(ops: Ops) -> Ops:
    """`ops` with a backward pass for each operation; what they compute, and their provenance, stays.

    In the FP8 profile layers built with the result hold their weights in the profile's dtype and quantize them in each
    pass (`Ops.master_weights`). Raises `KernelError` where an operation of the backward pass has no kernel.
    """
    ops = with_training(ops)
    return replace(
        ops,
        kernels={op: op.differentiable(ops) for op in ops.kernels},
        master_weights=MasterWeights(ops) if ops.setting.profile.is_fp8 else None,
    )
