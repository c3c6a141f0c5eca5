"""The order of experts' rows: by expert, and by token within an expert."""

from __future__ import annotations

import random

import pytest
import torch

from dsv3_plugin.ops.drawing import ON_CPU
from dsv3_plugin.ops.permute import sort_by_expert

Tensor = torch.Tensor


def by_hand(topk_ids: list[list[int]], experts: int) -> tuple[list[int], list[list[int]], list[int]]:
    """The same with lists."""
    pairs = sorted((expert, token, k) for token, ids in enumerate(topk_ids) for k, expert in enumerate(ids))
    slots = [[0] * len(ids) for ids in topk_ids]
    for slot, (_, token, k) in enumerate(pairs):
        slots[token][k] = slot
    return [token for _, token, _ in pairs], slots, [sum(ids.count(e) for ids in topk_ids) for e in range(experts)]


def as_lists(found: tuple[Tensor, ...]) -> tuple[list[int], ...]:
    return tuple(x.tolist() for x in found)


@pytest.mark.parametrize("seed", range(12))
def test_pairs_are_sorted_by_expert_then_token(seed: int) -> None:
    (topk_ids, experts), _ = sort_by_expert.draw(random.Random(seed), ON_CPU)
    found = sort_by_expert(topk_ids, experts)
    assert all(x.dtype == torch.int64 for x in found)
    assert as_lists(found) == by_hand(topk_ids.tolist(), experts)
    assert as_lists(sort_by_expert(topk_ids.int(), experts)) == as_lists(found)


def test_tokens_of_one_expert_keep_their_order() -> None:
    """The twin: an unstable sort of the same pairs has other rows."""
    topk_ids = torch.tensor([[0, 2], [0, 1], [1, 2], [0, 2]])
    rows, slots, counts = sort_by_expert(topk_ids, 4)
    assert rows.tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    assert slots.tolist() == [[0, 5], [1, 3], [4, 6], [2, 7]]
    assert counts.tolist() == [3, 2, 3, 0]
    backwards = sort_by_expert(topk_ids.flip(0), 4)[0]
    assert (3 - backwards).tolist() != rows.tolist()


def test_no_tokens() -> None:
    rows, slots, counts = sort_by_expert(torch.zeros(0, 8, dtype=torch.int64), 3)
    assert (rows.shape, slots.shape, counts.tolist()) == ((0,), (0, 8), [0, 0, 0])
