"""The sum of a token's experts, in ascending order, then the shared one."""

from __future__ import annotations

import pytest
import torch
from bits import FLOATS, generator, normal, same_bits

from dsv3_plugin.ops.combine import combine, combine_gradient


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_its_gradient_is_rounded_once_and_zero_where_no_token_reads(dtype: torch.dtype) -> None:
    """Rows behind the tokens' belong to none. The rows' gradient has the bits of one rounding of the exact product."""
    tokens, k, width = 9, 4, 256
    total = tokens * k + 5
    slots = torch.randperm(total, generator=generator(2))[: tokens * k].view(tokens, k)
    expert_out, shared, grad = (
        normal(rows, width, seed=i, dtype=dtype) for i, rows in enumerate((total, tokens, tokens))
    )
    weights = torch.rand(tokens, k, generator=generator(3))
    operands = [x.requires_grad_() for x in (expert_out, weights, shared)]
    run = combine.differentiable({combine: combine, combine_gradient: combine_gradient})
    of_rows, of_weights, of_shared = torch.autograd.grad(run(expert_out, slots, weights, shared), operands, grad)
    expected = torch.zeros(total, width, dtype=dtype)
    expected[slots] = (weights.detach().unsqueeze(2) * grad.float().unsqueeze(1)).to(dtype)
    assert torch.equal(of_rows, expected) and same_bits(of_shared, grad)
    exact = (expert_out.detach().double()[slots] * grad.double().unsqueeze(1)).sum(2)
    assert (of_weights.double() - exact).abs().max() < 1e-4 * exact.abs().max()
    # The twin: a token's row that another token reads.
    assert not torch.equal(of_rows, expected.roll(1, 0))
