"""Tensor parallelism: ranks share heads, the MLPs' features and the vocabulary, in the slices of the profile.

The core says what a slice is and how sums of slices are added (`dsv3_plugin.ops.slices`); here ranks exchange them,
by Megatron's own mappings. Partial sums travel in fp32 and every rank adds all of them in the tree's order: that is
what equal bits cost over an all-reduce in bf16. Routed experts stay whole on a rank, so that Megatron's experts need
`expert_tensor_parallel_size=1`; Megatron trains a mixture of experts under tensor parallelism with
`sequence_parallel` only.

Under `sequence_parallel` each rank keeps its tokens between the blocks. A block first gathers all of them, and its
backward pass finds the gradient of each token complete on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import nn
from torch.distributed import ProcessGroup

from dsv3_plugin.layers.linear import ColumnLinear, RowLinear
from dsv3_plugin.ops.slices import Slices, tree_sum
from dsv3_plugin.registry import Ops


@dataclass(frozen=True)
class RankSlices(Slices):
    """The slices of one tensor-parallel rank."""

    group: ProcessGroup

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x itself; the gradients of all ranks are added."""
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    def fold(self, branch: torch.Tensor) -> torch.Tensor:
        """fp32 [T, N] of every rank to their sum [T, N], the same bits on each."""
        ranks = self.group.size()
        return tree_sum(gather_from_tensor_model_parallel_region(branch, group=self.group).chunk(ranks, dim=1))


def share(ops: Ops, group: ProcessGroup) -> Ops:
    """`ops` for a rank of a tensor-parallel group whose size divides the number of slices."""
    return replace(ops, slices=RankSlices(ops.setting.profile.reduction_slices // group.size(), group))


def all_tokens(x: torch.Tensor, config: Any) -> torch.Tensor:
    """x [s / ranks, b, hidden] under sequence parallelism, or [s, b, hidden] without, to [s, b, hidden]."""
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False) if config.sequence_parallel else x


def own_tokens(x: torch.Tensor, config: Any) -> torch.Tensor:
    """The other way round."""
    return scatter_to_sequence_parallel_region(x) if config.sequence_parallel else x


def cut_weights(core: nn.Module) -> dict[str, int]:
    """The parameters of a core layer that ranks share, and the dimension that is cut."""
    kinds = ((ColumnLinear, 0), (RowLinear, 1))
    return {
        f"{name}.weight".removeprefix("."): dim
        for name, module in core.named_modules()
        for kind, dim in kinds
        if isinstance(module, kind)
    }
