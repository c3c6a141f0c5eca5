"""Rows of activations in another order, experts' tokens one after the other: in bf16, or in fp8 with their scales.

The order itself takes one kernel: a CTA an expert finds the pairs that are its own, and counts those before them.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.scales import empty_scales
from dsv3_plugin.ops import permute as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3

_ROWS, _BLOCKS = 8, 8
# Pairs that a CTA of `_sort_by_expert` looks at at a time.
_FEWEST_PAIRS, _MOST_PAIRS = 64, 4096


@triton.jit
def _sort_by_expert(ids, rows, slots, counts, pairs, TOPK: tl.constexpr, PAIRS: tl.constexpr):
    expert = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    lower = tl.zeros((PAIRS,), tl.int32)
    for first in range(0, pairs, PAIRS):
        other = tl.load(ids + first + pair, mask=first + pair < pairs, other=2**30).to(tl.int32)
        lower += (other < expert).to(tl.int32)
    begin = tl.sum(lower, 0)
    end = begin
    for first in range(0, pairs, PAIRS):
        other = tl.load(ids + first + pair, mask=first + pair < pairs, other=2**30).to(tl.int32)
        own = (other == expert).to(tl.int32)
        slot = end + tl.cumsum(own, 0) - 1
        tl.store(rows + slot, ((first + pair) // TOPK).to(tl.int64), mask=own == 1)
        tl.store(slots + first + pair, slot.to(tl.int64), mask=own == 1)
        end += tl.sum(own, 0)
    tl.store(counts + expert, (end - begin).to(tl.int64))


@implements(contracts.sort_by_expert)
def sort_by_expert(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_ids integers [T, k], below `num_experts`, which is not checked, to (rows int64 [T k], slots int64 [T, k],
    expert_counts int64 [num_experts]). Raises `InputError`.
    """
    require_matrix("sort_by_expert", "topk_ids", topk_ids, (torch.int64, torch.int32))
    pairs, topk = topk_ids.numel(), topk_ids.shape[1]
    rows = torch.empty(pairs, dtype=torch.int64, device=topk_ids.device)
    slots = torch.empty_like(topk_ids, dtype=torch.int64)
    counts = torch.empty(num_experts, dtype=torch.int64, device=topk_ids.device)
    at_once = min(max(triton.next_power_of_2(pairs), _FEWEST_PAIRS), _MOST_PAIRS)
    warps = 8 if at_once >= 1024 else 4
    _sort_by_expert[(num_experts,)](topk_ids, rows, slots, counts, pairs, topk, at_once, num_warps=warps)
    return rows, slots, counts


@triton.jit
def _permute(
    x,
    scales,
    rows,
    out,
    scales_out,
    count,
    width,
    row_stride,
    block_stride,
    stride_out,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x and out as bytes, `width` a row; `scales` is None where there are none."""
    target = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + target, mask=target < count, other=0).to(tl.int64)
    byte = tl.program_id(1) * BLOCKS * 128 + tl.arange(0, BLOCKS * 128)
    inside = (target < count)[:, None] & (byte < width)[None, :]
    moved = tl.load(x + row[:, None] * width + byte[None, :], mask=inside, other=0)
    tl.store(out + target[:, None].to(tl.int64) * width + byte[None, :], moved, mask=inside)
    if scales is not None:
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        inside = (target < count)[None, :] & (block < width // 128)
        scale = tl.load(scales + row[None, :] * row_stride + block.to(tl.int64) * block_stride, mask=inside, other=0)
        tl.store(scales_out + target[None, :] + block.to(tl.int64) * stride_out, scale, mask=inside)


@implements(contracts.permute)
def permute(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, K], row numbers [S], below M, which is not checked, to those rows [S, K]. Raises `InputError`."""
    require_matrix("permute", "x", x, (torch.bfloat16,))
    _require_rows("permute", rows)
    out = x.new_empty(len(rows), x.shape[1])
    _launch(x, None, rows, out, None)
    return out


@implements(contracts.permute_fp8)
def permute_fp8(values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values e4m3 [M, K], scales fp32 [M, K / 128], row numbers [S], below M, which is not checked, to those rows of
    both. Raises `InputError`.
    """
    op = "permute_fp8"
    require_matrix(op, "values", values, (E4M3,))
    depth = values.shape[1]
    require(depth % FP8_BLOCK == 0, op, f"K={depth} is not a multiple of {FP8_BLOCK}")
    expected = len(values), depth // FP8_BLOCK
    require(tuple(scales.shape) == expected, op, f"scales have shape {tuple(scales.shape)}, expected {expected}")
    require(scales.dtype == torch.float32, op, f"scales are {scales.dtype}, expected torch.float32")
    _require_rows(op, rows)
    out, scales_out = values.new_empty(len(rows), depth), empty_scales(len(rows), depth, values.device)
    _launch(values, scales, rows, out, scales_out)
    return out, scales_out


def _require_rows(op: str, rows: torch.Tensor) -> None:
    require(rows.dim() == 1 and rows.is_contiguous(), op, f"rows have shape {tuple(rows.shape)}, not one dimension")
    require(rows.dtype in (torch.int64, torch.int32), op, f"rows are {rows.dtype}, expected integers")


def _launch(
    x: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor, out: torch.Tensor, scales_out: torch.Tensor | None
) -> None:
    if not out.numel():
        return
    from_bytes, to_bytes = x.view(torch.uint8), out.view(torch.uint8)
    strides = (0, 0, 0) if scales is None or scales_out is None else (*scales.stride(), scales_out.stride(1))
    width = to_bytes.shape[1]
    grid = (triton.cdiv(len(rows), _ROWS), triton.cdiv(width, FP8_BLOCK * _BLOCKS))
    pointers = from_bytes, scales, rows, to_bytes, scales_out
    _permute[grid](*pointers, len(rows), width, *strides, _ROWS, _BLOCKS, num_warps=4)
