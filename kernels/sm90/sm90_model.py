"""The Hopper arithmetic on a CPU: every operation with the tensor core's sums modelled, bit for bit what a GPU prints.

This is the contract of arithmetic `sm90` as executable text: the references of `dsv3_plugin.ops` with the tensor core's
matrix products in place of a CPU's. It is slow (some ns a product): meant for tiny models, for tests without a GPU, and
for reading. Given CUDA tensors it runs on their card, which `check` uses, and prints the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from dsv3_plugin.hooks import SUPPORTED, Kernel, Setting, Support, unsupported
from dsv3_plugin.kernels.sm90.tensor_core import BF16, FP8, dot
from dsv3_plugin.ops.operation import Operation, operations
from dsv3_plugin.ops.products import Products
from dsv3_plugin.version import __version__

PROVIDER = "sm90-model"
P = ParamSpec("P")
R = TypeVar("R")


def _linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return dot(BF16, x, weight).to(out_dtype)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # The accumulator starts there.
    return dot(BF16, x, y.t(), total)


def _fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return dot(FP8, x, weight)


PRODUCTS = Products((torch.bfloat16,), _linear, _add_product, _fp8_linear)
"""Those of Hopper's tensor cores: one accumulator over ascending K."""


def is_supported(setting: Setting) -> Support:
    """Serves a CPU that is asked for Hopper's arithmetic in bf16 or fp8."""
    if (setting.device_type, setting.arithmetic) != ("cpu", "sm90"):
        return unsupported(f"models arithmetic sm90 on a CPU, not {setting.arithmetic} on {setting.device_type}")
    if setting.profile.dtype != torch.bfloat16:
        dtype = setting.profile.dtype
        return unsupported(f"the tensor core multiplies bf16 or fp8, the profile computes in {dtype}")
    return SUPPORTED


def model_of(op: Operation[P, R]) -> Callable[P, R]:
    """An operation on Hopper's products; the same object each time."""
    return cast(Callable[P, R], _models()[op])


@functools.cache
def _models() -> dict[Operation[..., Any], Callable[..., Any]]:
    return {op: op.on(PRODUCTS) for op in operations().values()}


def kernels() -> list[Kernel]:
    """One kernel an operation."""
    return [
        Kernel(
            op=op.name,
            contract_version=op.version,
            provider=PROVIDER,
            version=__version__,
            run=model_of(op),
            is_supported=is_supported,
        )
        for op in operations().values()
    ]
