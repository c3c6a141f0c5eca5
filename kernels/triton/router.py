"""The router: its logits as sums of chunks of K, and the choice of a token's experts by one warp.

For few tokens there is split-K: the chunks are summed by CTAs of their own, and the choice adds them up while it loads
them. For many a CTA walks the chunks of its tile. The order is the contract's either way.

In the choice experts stand as [groups, experts a group], both padded to powers of two with -inf. Among equal maxima
the lower index wins.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3_plugin.kernels.triton.elementary import EXACT, divide, sigmoid
from dsv3_plugin.ops import router as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.router import K_CHUNK


class Tile(NamedTuple):
    """Rows, columns and depth of a CTA's tile, and how it is launched; `split_k`: a CTA sums one chunk of K alone."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    split_k: bool


@triton.jit
def _sums_of_chunks(
    x,
    weight,
    sums,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    K_CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Sums of `COUNT` chunks, to sums fp32 [CTAs in the second dimension, rows, columns]."""
    gdc_launch_dependents()
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * COUNT * K_CHUNK
    k = tl.arange(0, DEPTH)
    x_tile = x + row[:, None].to(tl.int64) * depth
    w_tile = weight + column[None, :].to(tl.int64) * depth
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    chain = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, COUNT * (K_CHUNK // DEPTH)):
        at = first + step * DEPTH + k
        a = tl.load(x_tile + at[None, :], mask=(row < rows)[:, None] & (at < depth)[None, :], other=0)
        b = tl.load(w_tile + at[:, None], mask=(column < columns)[None, :] & (at < depth)[:, None], other=0)
        chain = tl.dot(a, b, chain)
        if step % (K_CHUNK // DEPTH) == K_CHUNK // DEPTH - 1:
            # An addition, written so that it is not made the start of the tensor core's next chain.
            total = tl.fma(chain, 1.0, total)
            chain = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    target = (tl.program_id(1) * rows + row[:, None]).to(tl.int64) * columns + column[None, :]
    tl.store(sums + target, total, mask=inside)


@triton.jit
def _route(
    sums,
    bias,
    ids,
    weights,
    scaling,
    tokens,
    SPLITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """`sums` [SPLITS, tokens, EXPERTS]; with FOLLOWS (PDL) a CTA may start before the kernel that writes them ends."""
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = EXPERTS // GROUPS
    group = tl.arange(0, GROUPS_PADDED)
    member = tl.arange(0, SIZE_PADDED)
    expert = group[:, None] * size + member[None, :]
    inside = (group < GROUPS)[:, None] & (member < size)[None, :]
    bias_of_expert = tl.load(bias + expert, mask=inside, other=0)
    if FOLLOWS:
        gdc_wait()
    logits = tl.zeros((GROUPS_PADDED, SIZE_PADDED), tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(sums + (split * tokens + token) * EXPERTS + expert, mask=inside, other=0)
    scores = sigmoid(logits)
    choice = tl.where(inside, scores + bias_of_expert, float("-inf"))

    if GROUPS_CHOSEN < GROUPS:
        best, where = tl.max(choice, 1, return_indices=True, return_indices_tie_break_left=True)
        group_score = best + tl.max(tl.where(member[None, :] == where[:, None], float("-inf"), choice), 1)
        # A group's rank: how many groups come before it.
        columns = tl.reshape(group_score, (GROUPS_PADDED, 1))
        across = tl.reshape(group_score, (1, GROUPS_PADDED))
        before = (across > columns) | ((across == columns) & (group[None, :] < group[:, None]))
        rank = tl.sum(before.to(tl.int32), 1)
        choice = tl.where((rank < GROUPS_CHOSEN)[:, None], choice, float("-inf"))

    # As integers in the order of the numbers, of which a warp finds the largest in one instruction. None is -0: a score
    # is at least +0, and so is its sum with -0.
    flat: tl.constexpr = GROUPS_PADDED * SIZE_PADDED
    position = tl.arange(0, flat)
    bits = tl.reshape(choice, (flat,)).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    score_bits = tl.reshape(scores, (flat,)).to(tl.int32, bitcast=True)
    slot = tl.arange(0, TOPK_PADDED)
    picked = tl.full((TOPK_PADDED,), flat, tl.int32)
    picked_bits = tl.zeros((TOPK_PADDED,), tl.int32)
    for k in tl.static_range(TOPK):
        winner = tl.min(tl.where(order == tl.max(order, 0), position, flat), 0)
        order = tl.where(position == winner, -(2**31), order)
        picked = tl.where(slot == k, winner, picked)
        picked_bits = tl.where(slot == k, tl.max(tl.where(position == winner, score_bits, 0), 0), picked_bits)

    # In ascending order of expert, the scores added one by one.
    earlier = tl.reshape(picked, (1, TOPK_PADDED)) < tl.reshape(picked, (TOPK_PADDED, 1))
    rank = tl.sum(earlier.to(tl.int32), 1)
    weight = picked_bits.to(tl.float32, bitcast=True)
    if NORMALISE:
        total = 0.0
        for k in tl.static_range(TOPK):
            total += tl.sum(tl.where((rank == k) & (picked < flat), weight, 0.0), 0)
        weight = divide(weight, total + 1e-20)
    chosen = picked // SIZE_PADDED * size + picked % SIZE_PADDED
    tl.store(ids + token * TOPK + rank, chosen.to(tl.int64), mask=picked < flat)
    tl.store(weights + token * TOPK + rank, weight * scaling, mask=picked < flat)


def choose_tile(rows: int) -> Tile:
    """A tile for `rows` tokens; any choice gives the same bits."""
    if rows <= 16:
        return Tile(16, 32, 128, 4, 4, True)
    if rows <= 512:
        return Tile(64, 64, 64, 4, 6, True)
    if rows <= 1024:
        return Tile(64, 32, 128, 4, 5, False)
    return Tile(64, 64, 64, 4, 5, False)


@implements(contracts.router_linear)
def router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bf16 [T, K], weight bf16 [E, K], to logits fp32 [T, E]. Raises `InputError`."""
    _require_operands("router_linear", x, weight)
    return _sum_chunks(x, weight, choose_tile(len(x))._replace(split_k=False)).squeeze(0)


@implements(contracts.moe_router)
def moe_router(
    x: torch.Tensor, weight: torch.Tensor, e_score_correction_bias: torch.Tensor, **routing: Unpack[contracts.Routing]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bf16 [T, K], weight bf16 [E, K], bias fp32 [E] and `route`'s settings, to its result.

    Raises `InputError`.
    """
    _require_operands("moe_router", x, weight)
    sums = _sum_chunks(x, weight, choose_tile(len(x)))
    return _choose("moe_router", sums, e_score_correction_bias, follows=True, **routing)


def _require_operands(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    require_matrix(op, "x", x, (torch.bfloat16,))
    require_matrix(op, "weight", weight, (torch.bfloat16,))
    require(x.shape[1] == weight.shape[1], op, f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")


def _sum_chunks(x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> torch.Tensor:
    """fp32 [splits, T, E]: one for each chunk of K, or one of all."""
    (rows, depth), columns = x.shape, weight.shape[0]
    chunks = triton.cdiv(depth, K_CHUNK)
    splits, count = (chunks, 1) if tile.split_k else (1, chunks)
    sums = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), splits)
        _sums_of_chunks[grid](
            x,
            weight,
            sums,
            rows,
            columns,
            depth,
            tile.rows,
            tile.columns,
            tile.depth,
            K_CHUNK,
            count,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return sums


@implements(contracts.route)
def route(
    logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **routing: Unpack[contracts.Routing]
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [M, E], bias fp32 [E] and the settings of the contract, to (topk_ids int64 [M, k] ascending,
    topk_weights fp32 [M, k]). Raises `InputError`.
    """
    require(logits.dim() == 2, "route", f"logits has shape {tuple(logits.shape)}, expected two dimensions")
    require(logits.dtype == torch.float32, "route", f"logits is {logits.dtype}, expected torch.float32")
    require(logits.is_contiguous(), "route", f"logits of shape {tuple(logits.shape)} is not contiguous")
    return _choose("route", logits.unsqueeze(0), e_score_correction_bias, follows=False, **routing)


def _choose(
    op: str,
    sums: torch.Tensor,
    bias: torch.Tensor,
    *,
    follows: bool,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From sums fp32 [splits, T, E] of the logits. `follows`: the kernel launched last is the one that writes them."""
    splits, tokens, experts = sums.shape
    require(
        bias.dtype == torch.float32 and tuple(bias.shape) == (experts,),
        op,
        f"e_score_correction_bias is {bias.dtype} of shape {tuple(bias.shape)}",
    )
    require(experts % n_group == 0, op, f"{experts} experts do not divide into n_group={n_group} groups")
    ids = torch.empty(tokens, num_experts_per_tok, dtype=torch.int64, device=sums.device)
    weights = torch.empty(tokens, num_experts_per_tok, dtype=torch.float32, device=sums.device)
    if tokens:
        _route[(tokens,)](
            sums,
            bias,
            ids,
            weights,
            routed_scaling_factor,
            tokens,
            splits,
            experts,
            n_group,
            topk_group,
            num_experts_per_tok,
            norm_topk_prob,
            triton.next_power_of_2(n_group),
            triton.next_power_of_2(experts // n_group),
            triton.next_power_of_2(num_experts_per_tok),
            follows,
            num_warps=1,
            launch_pdl=follows,
            **EXACT,
        )
    return ids, weights
