"""Attention by heads: V3's in CUDA C++, where that can be compiled, others in Triton."""

from __future__ import annotations

import torch

from dsv3_plugin.kernels.cuda import compiler, head_hopper
from dsv3_plugin.kernels.triton import head_attention as in_triton
from dsv3_plugin.ops import head_attention as contracts
from dsv3_plugin.ops.operation import implements


@implements(contracts.head_attention)
def head_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """What the kernel that takes these shapes says of them."""
    in_cuda = compiler.available() and head_hopper.takes(q, k, k_rope, v)
    attend = head_hopper.head_attention if in_cuda else in_triton.head_attention
    return attend(q, k, k_rope, v, query_starts, key_starts, scale=scale)
