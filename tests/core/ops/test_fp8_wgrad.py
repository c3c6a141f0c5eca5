"""128x1 tiles and the sums of weight gradients, on exact fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from bits import SCALE_FORMATS, normal, same_bits
from plain import BF16_BITS, rounded

from dsv3_plugin.ops import fp8_wgrad as fp8
from dsv3_plugin.ops.fp8_weight import quantize_fp8_weight
from dsv3_plugin.ops.quantize import quantize_fp8, quantize_weight, scale_for
from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor
# No tokens, a part of a block, two blocks and a part, one block.
COUNTS = (0, 5, 300, 0, 128)


def blocks_of(counts: tuple[int, ...]) -> list[tuple[int, range]]:
    """For each block in order its expert and the rows of its tokens."""
    found, first = [], 0
    for e, count in enumerate(counts):
        rows = range(first, first + count)
        found += [(e, rows[i : i + 128]) for i in range(0, count, 128)]
        first += count
    return found


def test_there_is_room_for_every_spread_of_the_tokens() -> None:
    rng = random.Random(0)
    for _ in range(500):
        experts, tokens = rng.randint(1, 20), rng.randint(0, 3000)
        cuts = sorted(rng.randint(0, tokens) for _ in range(experts - 1))
        counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))
        assert len(blocks_of(counts)) <= fp8.most_blocks(tokens, experts), counts
    assert [fp8.most_blocks(tokens, 1) for tokens in (0, 1, 128, 129)] == [0, 1, 1, 2], "a dense layer wastes none"
    assert fp8.most_blocks(130, 3) == len(blocks_of((1, 1, 128))), "and there is no more room than one spread needs"


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_tile_is_128_tokens_of_a_column(scale_format: ScaleFormat) -> None:
    x = normal(sum(COUNTS), 130) * torch.exp2(normal(1, 130, seed=1) * 4)
    values, scales = fp8.quantize_fp8_columns(x, None, torch.tensor(COUNTS), scale_format)
    blocks = blocks_of(COUNTS)
    assert values.shape == (130, 128 * fp8.most_blocks(len(x), 5)) and scales.shape == (130, values.shape[1] // 128)
    found = values.float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)
    for block, (_, rows) in enumerate(blocks):
        tokens = x[list(rows)].t()
        assert same_bits(scales[:, block], scale_for(tokens.abs().amax(1), scale_format))
        # Half a step of e4m3: 2**-4 of a number, or of its subnormal numbers 2**-10.
        step = torch.maximum(tokens.abs() * 2.0**-4, scales[:, block, None] * 2.0**-10)
        assert ((found[:, block, : len(rows)] - tokens).abs() <= step * 1.000001).all()
        assert not found[:, block, len(rows) :].any()
    assert not found[:, len(blocks) :].any() and (scales[:, len(blocks) :] == 1).all()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_cached_activations_are_quantized_from_the_numbers_that_they_stand_for(scale_format: ScaleFormat) -> None:
    x = normal(sum(COUNTS), 256) * torch.exp2(normal(1, 256, seed=1) * 4)
    cached, x_scale = quantize_fp8(x, scale_format)
    numbers = (cached.float().unflatten(1, (-1, 128)) * x_scale.unsqueeze(-1)).flatten(1)
    counts = torch.tensor(COUNTS)
    found = fp8.quantize_fp8_columns(cached, x_scale, counts, scale_format)
    for one, other in zip(found, fp8.quantize_fp8_columns(numbers, None, counts, scale_format), strict=True):
        assert same_bits(one, other)
    # The twin: not from what they were quantized from.
    assert not same_bits(found[0], fp8.quantize_fp8_columns(x, None, counts, scale_format)[0])


def operands(scale_format: ScaleFormat, rows: int = 3, columns: int = 4) -> tuple[Tensor, ...]:
    """grad and x with their scales, and the counts."""
    counts = torch.tensor(COUNTS)
    grad = fp8.quantize_fp8_columns(normal(sum(COUNTS), rows) * 1e-3, None, counts, scale_format)
    return *grad, *fp8.quantize_fp8_columns(normal(sum(COUNTS), columns, seed=1), None, counts, scale_format), counts


def exact(
    grad: Tensor, grad_scale: Tensor, x: Tensor, x_scale: Tensor, bits: int, *, fused: bool = True, order: int = 1
) -> list[float]:
    """The contract on fractions: e4m3 values are integers of 2**-9, so that a dot product is a sum of integers."""
    left, right = ([[int(v * 512) for v in row] for row in m.float().tolist()] for m in (grad, x))
    blocks = list(enumerate(blocks_of(COUNTS)))[::order]
    results = []
    for e in range(len(COUNTS)):
        for n, a in enumerate(left):
            for k, b in enumerate(right):
                acc = Fraction(0)
                for block, _ in (found for found in blocks if found[1][0] == e):
                    span = slice(128 * block, 128 * block + 128)
                    raw = rounded(Fraction(sum(i * j for i, j in zip(a[span], b[span], strict=True)), 2**18))
                    scale = rounded(Fraction(grad_scale[n, block].item()) * Fraction(x_scale[k, block].item()))
                    acc = rounded(raw * scale + acc) if fused else rounded(rounded(raw * scale) + acc)
                results.append(float(rounded(acc, bits)))
    return results


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_weight_gradient_is_the_exact_arithmetic(scale_format: ScaleFormat) -> None:
    *matrices, counts = operands(scale_format)
    found = fp8.fp8_wgrad(*matrices, counts, out_dtype=torch.float32)
    assert found.shape == (len(COUNTS), 3, 4)
    assert found.flatten().tolist() == exact(*matrices, 24)
    assert fp8.fp8_wgrad(*matrices, counts).flatten().tolist() == exact(*matrices, BF16_BITS)
    # The twins: blocks in another order, and a product that is rounded before it is added. With powers of two these
    # short sums have no rounding.
    if scale_format == "float32":
        assert found.flatten().tolist() != exact(*matrices, 24, order=-1)
        assert found.flatten().tolist() != exact(*matrices, 24, fused=False)


def test_an_experts_gradient_is_of_its_own_tokens() -> None:
    grad, x = normal(sum(COUNTS), 8), normal(sum(COUNTS), 128, seed=1)

    def gradients(counts: tuple[int, ...], grad: Tensor, x: Tensor) -> Tensor:
        held = torch.tensor(counts)
        columns = (fp8.quantize_fp8_columns(each, None, held, "ue8m0") for each in (grad, x))
        return fp8.fp8_wgrad(*(part for each in columns for part in each), held)

    together, first = gradients(COUNTS, grad, x), 0
    assert not together[[0, 3]].any(), "experts without tokens"
    for e, count in enumerate(COUNTS):
        own = slice(first, first + count)
        assert same_bits(together[e], gradients((count,), grad[own], x[own])[0]) or not count
        first += count
    # The twin: one token fewer, which the next expert has.
    moved = gradients((0, 4, 301, 0, 128), grad, x)
    assert not same_bits(moved[1], together[1]) and not same_bits(moved[2], together[2])
    assert same_bits(moved[4], together[4])


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_transposed_weight_is_the_forwards(scale_format: ScaleFormat) -> None:
    weight = normal(2, 192, 256) * torch.exp2(normal(2, 1, 256, seed=1) * 4)
    values, scale = quantize_fp8_weight(weight, scale_format)
    transposed, of_transposed = quantize_fp8_weight(weight, scale_format, transposed=True)
    assert transposed.shape == (2, 256, 256) and not transposed[..., 192:].float().any(), "rows of whole blocks"
    assert same_bits(transposed[..., :192].transpose(1, 2), values)
    assert same_bits(of_transposed.transpose(1, 2), scale)
    alone = quantize_weight(weight[1], scale_format)
    assert same_bits(values[1], alone[0]) and same_bits(scale[1], alone[1])
    # The twin: blocks that hold other numbers have other scales.
    assert not same_bits(quantize_fp8_weight(weight.roll(64, 2), scale_format)[1], scale)
