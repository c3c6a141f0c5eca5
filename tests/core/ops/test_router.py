"""Logits in slices, and the choice of experts by the rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bits import FLOATS, normal, same_bits

from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.router import K_CHUNK, route, router_linear

Tensor = torch.Tensor


def plain_route(
    scores: list[np.float32], bias: list[np.float32], k: int, n_group: int, topk_group: int, norm: bool, factor: float
) -> tuple[list[int], list[float]]:
    """The router of one token, by the rules: `sorted` is stable, so that ties keep the lower index."""
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]

    def group_score(g: int) -> np.float32:
        best = sorted((biased[e] for e in groups[g]), reverse=True)
        return best[0] + best[1]

    kept = (
        sorted(range(n_group), key=lambda g: -group_score(g))[:topk_group] if topk_group < n_group else range(n_group)
    )
    candidates = [e for g in sorted(kept) for e in groups[g]]
    chosen = sorted(sorted(candidates, key=lambda e: -biased[e])[:k])
    weights = [scores[e] for e in chosen]
    if norm:
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        weights = [weight / (total + np.float32(1e-20)) for weight in weights]
    return chosen, [float(weight * np.float32(factor)) for weight in weights]


@pytest.mark.parametrize(
    ("experts", "k", "n_group", "topk_group", "norm", "factor"),
    [
        (16, 4, 4, 2, True, 2.5),
        (32, 8, 8, 4, True, 2.5),
        (12, 3, 1, 1, True, 2.446),
        (8, 2, 4, 1, False, 1.0),
        (8, 8, 2, 2, True, 1),
    ],
)
@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["", "negative"])
def test_route_follows_the_rules(
    experts: int, k: int, n_group: int, topk_group: int, norm: bool, factor: float, shift: float
) -> None:
    """Half of the draws have few distinct logits and biases, so that ties decide."""
    for levels in (0, 3):
        logits, bias = normal(300, experts) * 2, normal(experts, seed=1) * 0.2
        if levels:
            logits, bias = (logits / 2).round().clamp(-levels, levels), (bias * 5).round() / 4
        bias = bias + shift
        ids, weights = route(
            logits,
            bias,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm,
            routed_scaling_factor=factor,
        )
        scores = sigmoid(logits).numpy()
        for row in range(300):
            expected = plain_route(list(scores[row]), list(bias.numpy()), k, n_group, topk_group, norm, factor)
            assert (ids[row].tolist(), weights[row].tolist()) == expected


def sum_in_slices(x: Tensor, weight: Tensor, size: int, order: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
    """The router's logits with slices of another size, or added in another order."""
    parts = zip(x.split(size, 1), weight.split(size, 1), strict=True)
    sums = [linear(a.contiguous(), b.contiguous(), out_dtype=torch.float32) for a, b in parts]
    total = torch.zeros(len(x), len(weight))
    for part in order(sums):
        total = total + part
    return total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("depth", [2048, 2000])
def test_router_logits_are_sums_of_slices(dtype: torch.dtype, depth: int) -> None:
    x, weight = normal(70, depth, dtype=dtype), normal(16, depth, seed=1, dtype=dtype)
    logits = router_linear(x, weight)
    assert same_bits(logits, sum_in_slices(x, weight, K_CHUNK, list))
    exact = x.double() @ weight.double().t()
    assert (logits - exact).abs().max() < 1e-3
    # The twins: slices of another size, and another order, give other bits.
    assert not torch.equal(logits, sum_in_slices(x, weight, 2 * K_CHUNK, list))
    assert not torch.equal(logits, sum_in_slices(x, weight, K_CHUNK, lambda sums: sums[::-1]))
    assert not torch.equal(logits, linear(x, weight, out_dtype=torch.float32))


def choose(logits: Tensor, bias: Tensor, k: int, n_group: int = 1, topk_group: int = 1) -> tuple[Tensor, Tensor]:
    return route(
        logits,
        bias,
        num_experts_per_tok=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def test_ties_go_to_the_lower_expert_and_group() -> None:
    assert choose(torch.zeros(1, 8), torch.zeros(8), 3)[0].tolist() == [[0, 1, 2]]
    assert choose(torch.zeros(1, 8), torch.zeros(8), 3, 4, 2)[0].tolist() == [[0, 1, 2]]
    better_third_group = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0])
    assert choose(torch.zeros(1, 8), better_third_group, 3, 4, 2)[0].tolist() == [[0, 1, 4]]


def test_masked_groups_lose_against_negative_scores() -> None:
    """Were their score 0, experts of the groups left out would win."""
    bias = torch.tensor([-3.0, -3.0, -2.0, -2.0])
    ids, weights = choose(torch.zeros(1, 4), bias, 2, 2, 1)
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 1.0]])
    ids, weights = choose(logits, torch.tensor([-1.0, 1.0, 0.0, 0.5]), 2)
    expected = sigmoid(torch.tensor([0.0, 1.0]))
    assert ids.tolist() == [[1, 3]]
    assert torch.allclose(weights[0], expected / expected.sum(), rtol=1e-6)


def test_a_row_of_the_router_is_independent_of_the_others() -> None:
    logits, bias = normal(130, 16), normal(16, seed=1) * 0.1
    ids, weights = choose(logits, bias, 4, 4, 2)
    for rows in (1, 2, 15, 64, 65):
        some_ids, some_weights = choose(logits[:rows], bias, 4, 4, 2)
        assert torch.equal(some_ids, ids[:rows]) and same_bits(some_weights, weights[:rows])
