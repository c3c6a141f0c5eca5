"""The router: its logits, and the choice: sigmoid scores, aux-loss-free bias, group-limited top-k (DeepSeek-V3 report,
equations 12 to 16).

Contract of the logits: K is cut into chunks of `K_CHUNK` products at absolute positions. Each chunk is summed from
zero, as in `linear`, and kept in fp32; the chunks are added to zero in ascending order. So a device may sum them at the
same time, and few tokens need not wait for one long chain.

Contract of the choice: fp32 logits and bias. score = `elementary.sigmoid`(logit). For the *choice only*, bias is added;
a group's score is the sum of its two best biased scores; groups outside the best `topk_group` get -inf (not 0: a biased
score may be negative); the best `num_experts_per_tok` of what is left are chosen. Ties go to the lower index. The
weights are the unbiased scores of the chosen experts, divided by their sum (added in ascending order of expert) +
1e-20, then times `routed_scaling_factor`. Experts are returned in ascending order.
"""

from __future__ import annotations

import random
from typing import Any, TypedDict, Unpack

import torch

from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, numbers, size_of_numbers, sizes
from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.linear import LinearFunction
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation, operation
from dsv3_plugin.ops.products import Products

K_CHUNK = 512


class Routing(TypedDict):
    """How experts are chosen and weighed, by the names of the model's configuration."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@matrix_operation(version=1, summary="x @ weight.T in chunks of 512 of K, added in ascending order in fp32")
def router_linear(products: Products, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [E, K] of one dtype, to logits fp32 [T, E]."""
    require_matrix("router_linear", "x", x, products.dtypes)
    require_matrix("router_linear", "weight", weight, (x.dtype,))
    require(x.shape[1] == weight.shape[1], "router_linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device=x.device)
    for columns, rows in zip(x.split(K_CHUNK, 1), weight.split(K_CHUNK, 1), strict=True):
        total = total + products.linear(columns.contiguous(), rows.contiguous(), torch.float32)
    return total


@matrix_operation(version=1, summary="router_linear, then route")
def moe_router(
    products: Products,
    x: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    **routing: Unpack[Routing],
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K], weight [E, K], bias fp32 [E] and `route`'s settings, to its result."""
    return route(router_linear.on(products)(x, weight), e_score_correction_bias, **routing)


@operation(version=2, summary="group-limited, bias-corrected sigmoid top-k")
def route(
    logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **routing: Unpack[Routing]
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [M, E], bias fp32 [E], to (topk_ids int64 [M, k] ascending, topk_weights fp32 [M, k])."""
    require(logits.dim() == 2, "route", f"logits has shape {tuple(logits.shape)}, expected two dimensions")
    require(logits.dtype == torch.float32, "route", f"logits is {logits.dtype}, expected torch.float32")
    require(
        e_score_correction_bias.dtype == torch.float32 and e_score_correction_bias.shape == logits.shape[1:],
        "route",
        f"e_score_correction_bias is {e_score_correction_bias.dtype} of shape {tuple(e_score_correction_bias.shape)}",
    )
    n_group, topk_group, topk = routing["n_group"], routing["topk_group"], routing["num_experts_per_tok"]
    scores = sigmoid(logits)
    choice = scores + e_score_correction_bias
    if topk_group < n_group:
        groups = choice.unflatten(1, (n_group, -1))
        best = _descending(groups)[0]
        group_ids = _descending(best[..., 0] + best[..., 1])[1][:, :topk_group]
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, group_ids, True)
        choice = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    topk_ids = _descending(choice)[1][:, :topk].sort(dim=1).values
    weights = scores.gather(1, topk_ids)
    if routing["norm_topk_prob"]:
        total = weights[:, 0]
        for i in range(1, topk):
            total = total + weights[:, i]
        weights = weights / (total + 1e-20).unsqueeze(1)
    return topk_ids, weights * routing["routed_scaling_factor"]


def _descending(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of the last dimension from large to small; stable, so that ties keep ascending indices."""
    return torch.sort(x, dim=-1, descending=True, stable=True)


@router_linear.gradient
def _differentiable_router_linear(ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """That of `linear`, however the sum is cut."""
    return LinearFunction.apply(ops[router_linear], x, weight)


class _Route(torch.autograd.Function):
    """Through the chosen experts' unbiased weights only: the choice is a constant and so is the bias.

    With s the chosen sigmoids, T their sum and c the scaling factor, the weights are w = c s / T, so
    ds = (c / T) (dw - sum(dw s) / T); without normalisation ds = c dw.
    """

    @staticmethod
    def forward(
        ctx: Any, ops: BoundKernels, logits: torch.Tensor, bias: torch.Tensor, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        topk_ids, topk_weights = ops[route](logits, bias, **routing)
        ctx.save_for_backward(logits, topk_ids)
        ctx.routing = routing
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights

    @staticmethod
    def backward(ctx: Any, _grad_ids: Any, grad: torch.Tensor) -> Any:
        logits, topk_ids = ctx.saved_tensors
        scores = torch.sigmoid(logits.gather(1, topk_ids))
        grad_scores = grad * ctx.routing["routed_scaling_factor"]
        if ctx.routing["norm_topk_prob"]:
            total = scores.sum(1, keepdim=True)
            grad_scores = (grad_scores - (grad_scores * scores).sum(1, keepdim=True) / total) / total
        grad_logits = torch.zeros_like(logits).scatter(1, topk_ids, grad_scores * scores * (1 - scores))
        return None, grad_logits, None, None


@route.gradient
def _differentiable_route(
    ops: BoundKernels, logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **routing: Unpack[Routing]
) -> tuple[torch.Tensor, torch.Tensor]:
    return _Route.apply(ops, logits, e_score_correction_bias, routing)


@moe_router.gradient
def _differentiable_moe_router(
    ops: BoundKernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    **routing: Unpack[Routing],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _differentiable_route(ops, _differentiable_router_linear(ops, x, weight), e_score_correction_bias, **routing)


@router_linear.cases
def _router_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that fill no chunk of K."""
    rows, columns, depth = sizes(rng, at)
    depth += rng.choice((0, 0, 8, 120))
    size = size_of_numbers(rng)
    return router_linear.case(numbers(rng, rows, depth) * size, numbers(rng, min(columns, 512), depth) * size)


@route.cases
def _route_case(rng: random.Random, at: Sizes) -> Case:
    """Routers of V3, Kimi-K2 and Moonlight and a tiny one; half of the cases have ties."""
    experts, n_group, topk_group, topk = rng.choice(((256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6), (16, 4, 2, 4)))
    rows = rng.choice(at.rows)
    logits = numbers(rng, rows, experts).float()
    if rng.random() < 0.5:  # ties
        logits = (logits * 4).round() / 4
    bias = torch.zeros(experts) if rng.random() < 0.5 else numbers(rng, experts).float() * 0.1
    return route.case(
        logits,
        bias,
        num_experts_per_tok=topk,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=rng.random() < 0.8,
        routed_scaling_factor=2.5,
    )


@moe_router.cases
def _moe_router_case(rng: random.Random, at: Sizes) -> Case:
    """The same routers, from hidden states."""
    (logits, bias), routing = route.draw(rng, at)
    depth = min(rng.choice(at.depths), MOST_PRODUCTS // logits.numel() // 8 * 8 + 8)
    weight = numbers(rng, logits.shape[1], depth) * depth**-0.5
    return moe_router.case(numbers(rng, len(logits), depth), weight, bias, **routing)
