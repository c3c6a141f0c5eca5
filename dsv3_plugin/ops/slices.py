"""Products in slices, so that tensor-parallel ranks can share them without changing a bit.

Contract, for `Profile.reduction_slices` = n > 1:

* Row-parallel products (`o_proj`, and `down_proj` of the dense MLP and of the shared expert; the weight is cut along
  K) split K into n equal slices, whose sums a binary tree adds (`sliced_linear`).
* Column-parallel products (`q_proj` or `q_b_proj`, `gate_up_proj` of the same MLPs, `eh_proj`, `lm_head`; the weight is
  cut along its rows) compute n equal slices of the outputs as products of their own, gate and up each: on a CPU an
  unquantized product's bits depend on how many outputs it has. Those of an FP8 product, and of a tensor core's, do not.
* Everything else is whole on every rank or, like attention and the absorbed halves of `kv_b_proj`, has one product a
  head. Routed experts are never cut.

A rank of a tensor-parallel group of t holds n / t neighbouring slices, which are a branch of the tree: every t that
divides n gives the same bits. With n = 1 nothing is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slices:
    """The slices that this process holds: all of them, unless an adapter's subclass says otherwise."""

    held: int

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What every rank multiplies by its own slices: a column-parallel input, attention's latent vectors."""
        return x

    def fold(self, branch: torch.Tensor) -> torch.Tensor:
        """The sum of all slices from the sum of those held here, fp32 [T, N] each."""
        return branch


def tree_sum(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add a power of two of fp32 tensors of one shape: neighbours first, then neighbouring pairs."""
    level = list(sums)
    while len(level) > 1:
        level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
    return level[0]
