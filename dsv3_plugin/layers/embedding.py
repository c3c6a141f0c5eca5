"""Token embedding and output head. Neither is ever quantized, and MTP shares both."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.layers.linear import linear_in_slices
from dsv3_plugin.layout import ALONE, Group
from dsv3_plugin.registry import Ops


class Embedding(nn.Module):
    """`weight` [vocab_size, hidden] in the profile's dtype."""

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        shape = vocab_size, hidden_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=ops.setting.profile.dtype), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids, integers [T], to [T, hidden]."""
        return nn.functional.embedding(input_ids, self.weight)


class Head(nn.Module):
    """`weight` [vocab_size / ranks, hidden] in the profile's dtype; the logits keep the fp32 sum, unrounded."""

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int, ranks: Group = ALONE) -> None:
        super().__init__()
        self.ops = ops
        self.ranks = ranks
        shape = vocab_size // ranks.size, hidden_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=ops.setting.profile.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], the same on every rank, to logits fp32 [T, vocab_size]."""
        logits = linear_in_slices(self.ops, x, self.weight, self.ops.slices.held, out_dtype=torch.float32)
        return self.ranks.gather_columns(logits)
