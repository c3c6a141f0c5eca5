"""Rows of activations in another order, experts' tokens one after the other: as they are, or quantized with scales.

Contract: nothing is computed.
"""

from __future__ import annotations

import random

import torch

from dsv3_plugin.ops.drawing import SCALE_FORMATS, Case, Sizes, generator, numbers
from dsv3_plugin.ops.operation import BoundKernels, operation
from dsv3_plugin.ops.quantize import quantize_fp8


@operation(version=1, summary="rows of activations")
def permute(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [M, K] and row numbers int64 [S] to those rows, [S, K]."""
    return x[rows]


@operation(version=1, summary="rows of quantized activations and their scales", fp8=True)
def permute_fp8(values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values e4m3 [M, K], scales fp32 [M, K / 128] and row numbers int64 [S], to rows of both, [S, ...]."""
    return values.view(torch.uint8)[rows].view(values.dtype), scales[rows]


@permute.gradient
def _differentiable(ops: BoundKernels, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return permute(x, rows)  # which torch differentiates


@permute.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """Rows in any order, some never, some several times."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths) + rng.choice((0, 72)))
    drawn = generator(rng)
    return permute.case(x, torch.randint(len(x), (rng.choice(at.rows),), generator=drawn))


@permute_fp8.cases
def _fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same with scales."""
    values, scales = quantize_fp8(numbers(rng, rng.choice(at.rows), rng.choice(at.depths)), rng.choice(SCALE_FORMATS))
    drawn = generator(rng)
    return permute_fp8.case(values, scales, torch.randint(len(values), (rng.choice(at.rows),), generator=drawn))
