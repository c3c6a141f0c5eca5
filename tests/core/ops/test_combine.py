"""The sum of a token's experts, in ascending order, then the shared one."""

from __future__ import annotations

import pytest
import torch
from bits import FLOATS, generator, normal, same_bits

from dsv3_plugin.ops.combine import combine


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_combine_adds_ascending_experts_then_the_shared_one(dtype: torch.dtype) -> None:
    tokens, k, width = 6, 4, 40
    expert_out, shared = normal(tokens * k, width, dtype=dtype), normal(tokens, width, seed=1, dtype=dtype)
    slots = torch.randperm(tokens * k, generator=generator(2)).view(tokens, k)
    weights = torch.rand(tokens, k, generator=generator(3))
    found = combine(expert_out, slots, weights, shared)
    for t in range(tokens):
        rows = [expert_out[slot].float().numpy() for slot in slots[t].tolist()]
        acc = weights[t, 0].numpy() * rows[0]
        for i in range(1, k):
            acc = acc + weights[t, i].numpy() * rows[i]
        assert same_bits(found[t], torch.tensor(acc + shared[t].float().numpy()).to(dtype))
    assert same_bits(combine(expert_out, slots[2:3], weights[2:3], shared[2:3]), found[2:3])
    if dtype == torch.float32:
        descending = combine(expert_out, slots.flip(1), weights.flip(1), shared)
        assert not torch.equal(descending, found)
