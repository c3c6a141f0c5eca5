"""Attention with keys and values of each head: key blocks, chunks and neighbours, against plain fp32 and fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bits import FLOATS, normal, same_bits
from plain import plain_fold

from dsv3_plugin.ops import head_attention as heads
from dsv3_plugin.ops import tile
from dsv3_plugin.ops.elementary import LOG2_E, exp2_of_nonpositive
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.registry import definitions

Tensor = torch.Tensor

HEADS, NOPE, ROPE, WIDTH = 3, 32, 16, 24
SCALE = 0.3
# Around the borders of blocks of 128 keys.
BORDERS = (0, 1, 126, 127, 128, 129, 255, 256, 257, 299)


class Part(NamedTuple):
    """Queries of a sequence, which are its last tokens, and its keys and values."""

    q: Tensor
    k: Tensor
    rope: Tensor
    v: Tensor

    def chunk(self, first: int, last: int) -> Part:
        """Of a whole sequence the queries from `first` to before `last`, and what they may see."""
        return Part(self.q[first:last], self.k[:last], self.rope[:last], self.v[:last])


def sequence(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Part:
    """A whole one."""
    return Part(
        normal(length, HEADS, NOPE + ROPE, seed=seed, dtype=dtype),
        normal(length, HEADS, NOPE, seed=seed + 1000, dtype=dtype),
        normal(length, ROPE, seed=seed + 2000, dtype=dtype),
        normal(length, HEADS, WIDTH, seed=seed + 3000, dtype=dtype),
    )


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def attend(*parts: Part, run: Callable[..., Tensor] = head_attention) -> list[Tensor]:
    """All in one call."""
    queries, keys = ([len(part[i]) for part in parts] for i in (0, 1))
    operands = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    return list(run(*operands, starts(queries), starts(keys), scale=SCALE).split(queries))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks_and_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    own = sequence(300, 0, dtype)
    (whole,) = attend(own)
    assert whole.isfinite().all()
    for chunks in ([1] * 300, [128, 128, 44], [127, 1, 130, 42], [299, 1], [5, 295], [64, 64, 64, 108]):
        end, found = 0, []
        for chunk in chunks:
            found += attend(own.chunk(end, end + chunk))
            end += chunk
        assert same_bits(torch.cat(found), whole), f"chunks {chunks[:4]}"
    mates = [sequence(length, length, dtype) for length in (1, 129, 400)]
    batch = [mates[0], own.chunk(280, 300), mates[1].chunk(126, 129), own.chunk(0, 130), mates[2].chunk(330, 400)]
    found = attend(*batch)
    assert same_bits(found[1], whole[280:]) and same_bits(found[3], whole[:130]), "batch mates"
    for i in 0, 2, 4:
        assert same_bits(found[i], attend(batch[i])[0])


def test_blocks_that_begin_with_the_chunk_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: keys are taken in blocks from the chunk's first query backwards."""
    own = sequence(300, 0)
    (whole,) = attend(own)

    def from_the_chunk(*args: object) -> Tensor:
        machine, queries, keys, values, scale = args
        before = len(keys) - len(queries)  # type: ignore[arg-type]
        empty = -before % heads.KEY_BLOCK
        padded = [torch.nn.functional.pad(x, (0, 0, empty, 0)) for x in (keys, values)]  # type: ignore[arg-type]
        return honest(machine, queries, *padded, scale)  # type: ignore[arg-type]

    honest = heads.attend_head
    monkeypatch.setattr(heads, "attend_head", from_the_chunk)
    assert same_bits(attend(own)[0], whole), "a chunk that begins with the prompt"
    assert not same_bits(attend(own.chunk(200, 300))[0], whole[200:])


def test_chunks_change_no_bit_on_hopper() -> None:
    """In the model of its arithmetic, whose bits are others."""
    run = definitions("sm90")["head_attention"].run
    own = sequence(140, 0, torch.bfloat16)
    (whole,) = attend(own, run=run)
    parts = [attend(own.chunk(*span), run=run)[0] for span in ((0, 100), (100, 129), (129, 140))]
    assert same_bits(torch.cat(parts), whole)
    on_cpu = attend(own)[0]
    assert not same_bits(on_cpu, whole) and (on_cpu.float() - whole.float()).abs().max() < 2e-2


def test_a_head_is_alone() -> None:
    """So ranks may hold some of them. Keys and values may be views of wider tensors."""
    own = sequence(150, 0, torch.bfloat16)
    (whole,) = attend(own)
    first, last = torch.tensor([0, 150]), slice(1, 3)
    wide = torch.cat((own.k, own.v), 2)
    k, v = wide[:, last].split([NOPE, WIDTH], 2)
    found = head_attention(own.q[:, last].contiguous(), k, own.rope, v, first, first, scale=SCALE)
    assert same_bits(found, whole[:, last])


def plain_attention(own: Part, position: int) -> Tensor:
    """The query at `position`, block by block; only the matrix products are the library's."""
    f = np.float32

    def exp2(x: np.ndarray) -> np.ndarray:
        return exp2_of_nonpositive(torch.from_numpy(x)).numpy()

    rows = []
    for head in range(HEADS):
        q = own.q[position : position + 1, head]
        keys = torch.cat((own.k[: position + 1, head], own.rope[: position + 1]), 1)
        largest, total, output = f(-np.inf), f(0), np.zeros(WIDTH, f)
        for start in range(0, position + 1, 128):
            count = min(128, position + 1 - start)
            block, values = torch.zeros(128, NOPE + ROPE), torch.zeros(128, WIDTH)
            block[:count] = keys[start : start + 128].float()
            values[:count] = own.v[start : min(start + 128, position + 1), head].float()
            scores = tile.tiled_linear(q.float(), block).numpy()[0]
            scores[count:] = -np.inf
            # Products are exact in fp64; the second rounding of a difference shows once in 2**29.
            products = scores.astype(np.float64) * np.float64(f(SCALE * LOG2_E))
            new = np.maximum(largest, f(np.ceil(products.max() / 8) * 8))
            p = torch.from_numpy(exp2((products - new).astype(f))).to(q.dtype).float()
            alpha = exp2(np.array([largest - new], f))[0]
            total = total * alpha + plain_fold(list(p.numpy()), 128)
            output = output * alpha + tile.tiled_linear(p.unsqueeze(0), values.t().contiguous()).numpy()[0]
            largest = new
        rows.append(torch.from_numpy(output * (f(1) / total)).to(own.q.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_in_plain_fp32(dtype: torch.dtype) -> None:
    own = sequence(300, 0, dtype)
    (out,) = attend(own)
    for position in BORDERS:
        assert same_bits(out[position], plain_attention(own, position)), position


def float64_attention(own: Part) -> Tensor:
    """Differentiable."""
    q, k, rope, v = (x.double() for x in own)
    scores = torch.einsum("qhd,khd->hqk", q[..., :NOPE], k) + torch.einsum("qhd,kd->hqk", q[..., NOPE:], rope)
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", (scores * SCALE).masked_fill(future, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_attention_against_float64(dtype: torch.dtype, bound: float) -> None:
    own = sequence(300, 0, dtype)
    exact = float64_attention(own)
    error = float((attend(own)[0] - exact).abs().max())
    print(f"{dtype}: {error:.2e} of {float(exact.abs().max()):.2f}")
    assert error < bound
    # One more key seen is far outside.
    longer = own._replace(**{name: torch.cat((x, x[:1])) for name, x in zip(Part._fields[1:], own[1:], strict=True)})
    assert (float64_attention(longer) - exact).abs().max() > 10 * bound


@pytest.mark.parametrize(("name", "value"), [("KEY_BLOCK", 64), ("KEY_BLOCK", 256), ("MAXIMUM", 1)])
def test_another_block_or_another_step_gives_other_bits(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a kernel that has others is another arithmetic, if only in its last bits."""
    own = sequence(300, 0)
    (whole,) = attend(own)
    if name == "MAXIMUM":
        monkeypatch.setattr(heads, "step_above", lambda x, y: (x * y / value).ceil() * value)
    else:
        monkeypatch.setattr(heads, name, value)
    (other,) = attend(own)
    assert int((other != whole).sum()) > 100
    assert (other - whole).abs().max() < 1e-5


def test_large_scores_neither_overflow_nor_leak() -> None:
    """What rounds a probability rounds its sum: a key that is alone is returned as it is."""
    own = sequence(200, 0, torch.bfloat16)
    own.k[150] = own.q[-1, :, :NOPE] * 1000
    (out,) = attend(own)
    assert out.isfinite().all()
    assert (out[-1] - own.v[150]).abs().max() == 0
    assert same_bits(out[:150], attend(own.chunk(0, 150))[0])


def test_sequences_without_queries_and_no_sequence() -> None:
    own, mate = sequence(40, 0), sequence(30, 1)
    nothing, found = attend(mate.chunk(30, 30), own)
    assert nothing.shape == (0, HEADS, WIDTH)
    assert same_bits(found, attend(own)[0])
    assert attend(own.chunk(0, 0))[0].shape == (0, HEADS, WIDTH)
    zero = torch.tensor([0])
    assert head_attention(*own.chunk(0, 0), zero, zero, scale=SCALE).shape == (0, HEADS, WIDTH)


# Its gradient


def gradients(*parts: Part) -> list[Tensor]:
    """Of each operand of all parts together, for a gradient that is the same wherever the cuts are."""
    queries, keys = ([len(part[i]) for part in parts] for i in (0, 1))
    operands = [torch.cat(of_all).requires_grad_() for of_all in zip(*parts, strict=True)]
    run = head_attention.differentiable({head_attention: head_attention})  # type: ignore[arg-type]
    out = run(*operands, starts(queries), starts(keys), scale=SCALE)
    return list(torch.autograd.grad(out, operands, normal(*out.shape, seed=7, dtype=out.dtype)))


def expected_gradients(*parts: Part) -> list[Tensor]:
    """Of the float64 oracle."""
    operands = [[x.double().requires_grad_() for x in part] for part in parts]
    out = torch.cat([float64_attention(Part(*part)) for part in operands])
    weights = normal(*out.shape, seed=7).double()
    found = torch.autograd.grad(out, [x for part in operands for x in part], weights)
    return [torch.cat(found[i::4]) for i in range(4)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def test_gradients_of_whole_prompts_and_of_chunks() -> None:
    parts = sequence(70, 0), sequence(140, 1).chunk(100, 140), sequence(9, 2)
    expected = expected_gradients(*parts)
    far = distance(gradients(*parts), expected)
    print(f"{far:.1e}")
    assert far < 1e-5
    # The twin: a chunk that is taken for the first one.
    first = parts[1]._replace(k=parts[1].k[:40], rope=parts[1].rope[:40], v=parts[1].v[:40])
    assert distance(gradients(parts[0], first, parts[2])[:1], expected[:1]) > 1e-3
