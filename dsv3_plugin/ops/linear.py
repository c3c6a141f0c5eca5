"""Matrix products with unquantized weights: `linear`, `head_linear`, `grouped_linear`.

Contract: operands in the profile's dtype; one running fp32 accumulator over ascending K; one rounding to the
output dtype. On a CPU the sum over K is the library's for a tile of `tile.ROWS` rows.
"""

from __future__ import annotations

import torch

from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.ops.tile import tiled_linear, tiled_linear_fp32

LINEAR = Contract("linear", 1, "x @ weight.T, fp32 sum over ascending K, one rounding")
HEAD_LINEAR = Contract("head_linear", 1, "one linear for each attention head")
GROUPED_LINEAR = Contract("grouped_linear", 1, "one linear for each expert over its rows")

_FLOATS = (torch.float32, torch.bfloat16)


def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [M, K], weight [N, K] of one dtype, to [M, N].

    `out_dtype` is the operands' dtype or fp32; fp32 keeps the unrounded sum (router logits, the head's logits,
    slices of a sum).
    """
    require_matrix("linear", "x", x, _FLOATS)
    require_matrix("linear", "weight", weight, (x.dtype,))
    require(x.shape[1] == weight.shape[1], "linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    if out_dtype is None or out_dtype == x.dtype:
        return tiled_linear(x, weight)
    require(out_dtype == torch.float32, "linear", f"out_dtype is {out_dtype}, expected {x.dtype} or torch.float32")
    return tiled_linear_fp32(x, weight)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, H, K], weight [H, N, K] of one dtype, to [M, H, N]: head h of x times head h of weight."""
    require(
        x.dim() == 3 and weight.dim() == 3 and x.shape[1] == weight.shape[0] and x.shape[2] == weight.shape[2],
        "head_linear",
        f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}",
    )
    require(weight.is_contiguous(), "head_linear", "weight is not contiguous")
    return torch.stack([tiled_linear(x[:, h].contiguous(), weight[h]) for h in range(x.shape[1])], dim=1)


def grouped_linear(x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] sorted by expert, expert_counts [E] (integers, sum M), weight [E, N, K], to [M, N]."""
    require_matrix("grouped_linear", "x", x, _FLOATS)
    require(weight.dtype == x.dtype, "grouped_linear", f"weight is {weight.dtype}, x is {x.dtype}")
    outputs = [tiled_linear(rows, weight[e]) for e, rows in split_by_expert("grouped_linear", x, expert_counts)]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1])


def split_by_expert(op: str, x: torch.Tensor, expert_counts: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The experts that have rows, in ascending order, each with its rows of x [M, K]."""
    counts = expert_counts.tolist()
    require(sum(counts) == x.shape[0], op, f"expert_counts sum to {sum(counts)}, x has {x.shape[0]} rows")
    return [(e, rows) for e, rows in enumerate(x.split(counts)) if len(rows)]
