"""Gradients of attention in tiles of queries: against float64, and what they hold in memory."""

from __future__ import annotations

import pytest
import torch
from bits import normal, same_bits
from living_memory import LivingMemory

from dsv3_plugin.ops import attention_gradients as tiled

Tensor = torch.Tensor
HEADS, RANK, WIDTH, SCALE = 3, 8, 12, 0.3


def case(tokens: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the output, queries and keys."""
    grad, q = normal(tokens, HEADS, RANK, seed=1), normal(tokens, HEADS, WIDTH, seed=2)
    return grad.to(dtype), q.to(dtype), normal(length, WIDTH, seed=3).to(dtype)


def exact(grad: Tensor, q: Tensor, keys: Tensor, selected: Tensor | None = None) -> tuple[Tensor, ...]:
    """By autograd of the whole softmax in float64."""
    wide_q, wide_keys = q.double().requires_grad_(), keys.double().requires_grad_()
    scores = torch.einsum("thc,lc->htl", wide_q, wide_keys) * SCALE
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(q))
    if selected is not None:
        unseen |= ~selected
    p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    out = torch.einsum("htl,lr->thr", p, wide_keys[:, :RANK])
    return torch.autograd.grad(out, (wide_q, wide_keys), grad.double())


def distances(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("scores", [1, 3 * HEADS * 50, 1 << 23], ids=["one query a tile", "three", "all"])
@pytest.mark.parametrize("chosen", [False, True], ids=["all keys", "some keys"])
def test_every_tiling_is_the_whole_softmax(scores: int, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "MOST_SCORES", scores)
    operands = case(20, 50)
    selected = (torch.arange(50) % 3 != torch.arange(20).unsqueeze(1) % 3) if chosen else None
    if selected is not None:
        selected[torch.arange(20), torch.arange(30, 50)] = True
    expected = exact(*operands, selected)
    found = tiled.attention_gradients(*operands, RANK, SCALE, selected)
    assert max(distances(found, expected)) < 1e-6
    # The twins: keys after a query, and another choice of keys.
    assert (
        min(
            distances(
                tiled.attention_gradients(*operands, RANK, SCALE, selected),
                exact(*case(20, 50)[:2], operands[2].flip(0)),
            )
        )
        > 0.1
    )
    if chosen:
        assert min(distances(found, exact(*operands))) > 0.1


def test_in_bf16_it_is_as_far_from_float64_as_rounding_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products rounded to bf16 as the forward's are: 2**-8 of a gradient's length and a little."""
    monkeypatch.setattr(tiled, "MOST_SCORES", 7 * HEADS * 300)
    operands = case(200, 300, torch.bfloat16)
    found = tiled.attention_gradients(*operands, RANK, SCALE)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    far = distances(found, exact(*operands))
    print(f"dq {far[0]:.1e}, dk {far[1]:.1e} from float64")
    assert max(far) < 2**-8
    again = tiled.attention_gradients(*operands, RANK, SCALE)
    assert all(same_bits(*each) for each in zip(found, again, strict=True))
    # The twin: a scale that is a hundredth off.
    assert min(distances(tiled.attention_gradients(*operands, RANK, SCALE * 1.01), exact(*operands))) > 2**-8


def most_memory(tokens: int) -> int:
    operands = case(tokens, tokens)
    with LivingMemory() as memory:
        tiled.attention_gradients(*operands, RANK, SCALE)
    return memory.most


def test_memory_grows_with_tokens_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "MOST_SCORES", 1 << 13)
    assert most_memory(1024) < 4.5 * most_memory(256)
    # The twin: all scores at once.
    monkeypatch.setattr(tiled, "MOST_SCORES", 1 << 40)
    assert most_memory(1024) > 12 * most_memory(256)


def test_a_tile_of_the_largest_model_has_128_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what `MOST_SCORES` says. Other tiles are another order of a key's sum: no change of a bit unseen."""
    queries: list[int] = []
    monkeypatch.setattr(tiled, "_add_tile", lambda grad, *rest: queries.append(len(grad)))
    shapes = (300, 128, 512), (300, 128, 576), (4096, 576)
    tiled.attention_gradients(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes), 512, 0.1)
    assert queries == [128, 128, 44]


@pytest.mark.parametrize(("tokens", "heads"), [(4096, 128), (16384, 16)])
def test_at_full_width_it_holds_little_beside_its_results(
    tokens: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted without computing, with products as a GPU makes them."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.empty(x.shape[0], y.shape[1], device="meta")

    monkeypatch.setattr(tiled, "_product", product)
    shapes = (tokens, heads, 512), (tokens, heads, 576), (tokens, 576)
    operands = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with LivingMemory() as memory:
        results = tiled.attention_gradients(*operands, 512, 0.1)
    beside = (memory.most - sum(found.nbytes for found in results)) / 2**30
    print(f"{tokens} tokens, {heads} heads: {beside:.2f} GiB beside its results")
    assert beside < 1.2
