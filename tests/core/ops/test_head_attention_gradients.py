"""Gradients of attention by heads: against float64, sequence by sequence, and what they hold in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from bits import FLOATS, normal, same_bits
from living_memory import LivingMemory
from torch.nn.attention import SDPBackend

from dsv3_plugin.errors import InputError
from dsv3_plugin.ops import head_attention_gradients as by_heads
from dsv3_plugin.ops.head_attention_gradients import has_head_gradients, head_attention_gradients

Tensor = torch.Tensor
HEADS, WIDTH, VALUES, SCALE = 3, 24, 16, 0.3
LENGTHS = 100, 100, 7, 1, 93
"""Two of one length, which are a batch; one shorter than any tile; one that sees itself alone."""


def case(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the output, queries, keys and values."""
    widths = VALUES, WIDTH, WIDTH, VALUES
    grad, q, k, v = (normal(tokens, HEADS, width, seed=i).to(dtype) for i, width in enumerate(widths))
    return grad, q, k, v


def exact(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int]) -> tuple[Tensor, ...]:
    """By autograd of the whole softmax in float64, with what no sequence sees at -inf."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    sequence = torch.repeat_interleave(torch.arange(len(seq_lens)), torch.tensor(seq_lens))
    seen = (sequence == sequence[:, None]).tril()
    scores = torch.einsum("thd,lhd->htl", wide[0], wide[1]) * SCALE
    out = torch.einsum("htl,lhv->thv", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide[2])
    return torch.autograd.grad(out, wide, grad.double())


def distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_sequence_is_on_its_own_and_near_float64(dtype: torch.dtype) -> None:
    operands = case(sum(LENGTHS), dtype)
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    found = head_attention_gradients(*operands, LENGTHS, SCALE)
    assert [x.dtype for x in found] == [dtype] * 3
    assert [x.shape for x in found] == [x.shape for x in operands[1:]]
    far = distances(found, exact(*operands, LENGTHS))
    print(f"dq {far[0]:.1e}, dk {far[1]:.1e}, dv {far[2]:.1e} from float64")
    assert max(far) < bound
    again = head_attention_gradients(*operands, LENGTHS, SCALE)
    assert all(same_bits(*each) for each in zip(found, again, strict=True))
    # The twins: a sequence that sees its neighbour, and a scale that is a fiftieth off.
    neighbours = head_attention_gradients(*operands, (200, *LENGTHS[2:]), SCALE)
    scaled = head_attention_gradients(*operands, LENGTHS, SCALE * 1.02)
    for wrong in neighbours, scaled:
        assert min(distances(wrong, exact(*operands, LENGTHS))) > bound


def test_lengths_of_a_sequence_without_tokens_and_of_none() -> None:
    operands = case(10)
    found = head_attention_gradients(*operands, (0, 4, 0, 6), SCALE)
    assert all(same_bits(*each) for each in zip(found, head_attention_gradients(*operands, (4, 6), SCALE), strict=True))
    assert [len(x) for x in head_attention_gradients(*case(0), (), SCALE)] == [0, 0, 0]
    with pytest.raises(InputError, match="sequences of 9 tokens together, q has 10"):
        head_attention_gradients(*operands, (4, 5), SCALE)


def test_torchs_modes_are_as_they_were() -> None:
    for mode in (0, 1):
        torch.set_deterministic_debug_mode(mode)
        try:
            head_attention_gradients(*case(10), (10,), SCALE)
            assert torch.get_deterministic_debug_mode() == mode
        finally:
            torch.set_deterministic_debug_mode(0)


def test_values_are_not_wider_than_keys() -> None:
    q = normal(5, HEADS, WIDTH)
    assert has_head_gradients(q, VALUES) and has_head_gradients(q, WIDTH) and not has_head_gradients(q, WIDTH + 1)


def most_memory(tokens: int) -> int:
    operands = case(tokens)
    with LivingMemory() as memory:
        head_attention_gradients(*operands, (tokens,), SCALE)
    return memory.most


def test_memory_grows_with_tokens_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_memory(1024) < 4.5 * most_memory(256)

    # The twin: an attention with its scores in memory.
    class Math:
        FLASH_ATTENTION = SDPBackend.MATH

    monkeypatch.setattr(by_heads, "SDPBackend", Math)
    assert most_memory(1024) > 8 * most_memory(256)
