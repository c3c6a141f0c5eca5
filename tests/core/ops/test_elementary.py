"""exp, exp2, sigmoid, the fused multiply-add and the ordered sums, against their definitions in plain fp32 and fp64."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from bits import generator, normal, same_bits
from plain import plain_fold, plain_row_sum, rounded

from dsv3_plugin.ops.elementary import (
    EXP2_POLYNOMIAL,
    LOG2_E_HIGH,
    LOG2_E_LOW,
    exp2_of_nonpositive,
    exp_of_nonpositive,
    fma,
    fold_sum,
    sigmoid,
    sum_row,
)

Tensor = torch.Tensor


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Distance in units of the last place of an fp32 `found` from a float64 `exact`."""
    exponent = exact.abs().frexp().exponent - 1
    return (found.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 23)


def test_exp_is_within_three_ulp() -> None:
    sweep = torch.linspace(-87, 0, 2_000_001, dtype=torch.float64).float()
    patterns = torch.randint(0, 2**31, (1_000_000,), generator=generator(0)).to(torch.int32).view(torch.float32)
    x = torch.cat((sweep, -patterns[patterns <= 87]))
    worst = float(ulps(exp_of_nonpositive(x), x.double().exp()).max())
    print(f"exp: {worst:.3f} ulp at worst over {len(x)} numbers")
    assert 0.5 < worst <= 3


def test_exp_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, -1e-30, -torch.inf, -87.00001, -1e30, -87.0, torch.nan])
    y = exp_of_nonpositive(x)
    assert y[:6].tolist() == [1.0] * 3 + [0.0] * 3
    assert 1.1e-38 < float(y[6]) < 1.7e-38
    assert y[7].isnan()


def written_out_exp(x: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`exp_of_nonpositive` above -87, a `step` for each fused multiply-add."""
    n = (x.double() * LOG2_E_HIGH).round().float()
    f = step(x, torch.full_like(x, LOG2_E_HIGH), -n)
    f = step(x, torch.full_like(x, LOG2_E_LOW), f)
    return horner(f, step) * torch.ldexp(torch.ones_like(n), n.int())


def test_sigmoid_is_made_of_fused_steps_and_a_rounded_reciprocal() -> None:
    x = -torch.cat((normal(20_000) * 10, torch.linspace(-87, 87, 200_001))).abs().clamp(max=87)
    e = exp_of_nonpositive(x)
    assert same_bits(e, written_out_exp(x, fma))
    # The twin: product and sum rounded apart are another function.
    assert (e != written_out_exp(x, lambda a, b, c: a * b + c)).sum() > 10_000
    r = torch.from_numpy(np.float32(1) / (np.float32(1) + e.numpy()))
    assert same_bits(sigmoid(-x), r)
    assert same_bits(sigmoid(x)[x < 0], (e * r)[x < 0])
    # The twin: a quotient rounds once where the product of a reciprocal rounds twice.
    assert (sigmoid(x) != e / (1 + e)).sum() > 5_000


def test_exp2_is_within_two_ulp() -> None:
    patterns = torch.randint(0, 2**31, (1_000_000,), generator=generator(0)).to(torch.int32).view(torch.float32)
    sweep = torch.linspace(-125, 0, 2_000_001, dtype=torch.float64).float()
    x = torch.cat((sweep, -patterns[patterns <= 125]))
    worst = float(ulps(exp2_of_nonpositive(x), x.double().exp2()).max())
    print(f"exp2: {worst:.3f} ulp at worst over {len(x)} numbers")
    assert 0.5 < worst <= 2


def test_exp2_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, -1e-30, -1.0, -2.0, -125.0, -125.00001, -1e30, -torch.inf, torch.nan])
    assert exp2_of_nonpositive(x).tolist() == [1, 1, 1, 0.5, 0.25, 2.0**-125, 0, 0, 0, 0]


def horner(f: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    p = torch.full_like(f, EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        p = step(p, f, torch.full_like(f, coefficient))
    return p


def test_exp2_steps_are_fused_multiply_adds() -> None:
    x = -torch.rand(1_000_000, generator=generator(0)) / 2
    x = torch.cat((x, x * 2.0**-8, x * 2.0**-16, x * 2.0**-24))
    found = exp2_of_nonpositive(x)
    assert same_bits(found, horner(x, fma))
    # The twin: product and sum rounded apart are another function.
    assert (found != horner(x, lambda a, b, c: a * b + c)).sum() > 10_000


@pytest.mark.parametrize("function", [exp_of_nonpositive, sigmoid], ids=["exp", "sigmoid"])
def test_elementary_functions_ignore_the_shape(function: Callable[[Tensor], Tensor]) -> None:
    x = -(normal(131) * 20).abs()
    whole = function(x)
    for size in range(1, 131):
        assert same_bits(function(x[:size]), whole[:size])
        assert same_bits(function(x[size : size + 1]), whole[size : size + 1])


def test_sigmoid_is_within_four_ulp() -> None:
    x = torch.cat((torch.linspace(-87, 100, 1_000_001), normal(1_000_000, seed=1)))
    worst = float(ulps(sigmoid(x), x.double().sigmoid()).max())
    print(f"sigmoid: {worst:.3f} ulp at worst")
    assert 0.5 < worst <= 4
    edges = torch.tensor([0.0, -torch.inf, torch.inf, -1e30, 1e30, torch.nan])
    assert sigmoid(edges)[:5].tolist() == [0.5, 0.0, 1.0, 0.0, 1.0]
    assert sigmoid(edges)[5].isnan()


@pytest.mark.parametrize("lanes", [64, 512])
@pytest.mark.parametrize("size", [1, 63, 64, 500, 512, 513, 2048])
def test_fold_sum_adds_in_its_order(size: int, lanes: int) -> None:
    x = normal(4, size) * 100
    expected = [plain_fold(list(row.numpy()), lanes) for row in x]
    assert fold_sum(x, lanes).flatten().tolist() == [float(value) for value in expected]


def test_a_whole_number_of_lanes_gets_no_zeros() -> None:
    """Which would make a positive zero of negative ones. The twin: one number more, and the last lanes are padded."""
    assert same_bits(fold_sum(-torch.zeros(128), 64), -torch.zeros(1))
    assert same_bits(fold_sum(-torch.zeros(129), 64), torch.zeros(1))


def test_another_order_gives_another_sum() -> None:
    x = normal(64, 2048)
    assert not torch.equal(fold_sum(x, 512), fold_sum(x, 256))
    assert not torch.equal(fold_sum(x, 512), fold_sum(x.flip(1), 512))


@pytest.mark.parametrize("size", [1, 2, 63, 64, 500, 512, 513, 1024, 1025, 2048, 7168])
def test_sum_row_adds_in_its_order(size: int) -> None:
    x = normal(4, size) * 100
    expected = [plain_row_sum(list(row.numpy())) for row in x]
    assert sum_row(x).flatten().tolist() == [float(value) for value in expected]


def test_sum_row_of_whole_rows_adds_no_zero() -> None:
    """A zero that is added makes 0 of -0."""
    assert sum_row(torch.full((1, 4), -0.0)).signbit().all()
    assert not sum_row(torch.full((1, 3), -0.0)).signbit().any()


def test_another_order_of_a_row_gives_another_sum() -> None:
    x = normal(64, 2048)
    assert not torch.equal(sum_row(x), sum_row(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)))
    assert not torch.equal(sum_row(x), sum_row(x.roll(1, 1)))


def test_fma_is_rounded_once() -> None:
    """Sums of which fp64 loses the last bits: rounding twice, first to fp64, fails in some."""
    draw = random.Random(0)
    a, b, c = [], [], []
    for _ in range(3000):
        # A product just beside the middle between two fp32 neighbours of c: 2**24 + 1 plus or minus very little.
        a.append(float(2**12 + draw.choice((0, 1)) * 2.0**-11))
        b.append(float(2.0**-12) * (1 + draw.choice((-1, 0, 1)) * 2.0**-23))
        c.append(float(draw.choice((-1, 1)) * (2**24 + 2 * draw.randrange(1000))) * 2.0 ** draw.choice((0, 4, 9)))
    a += [draw.gauss(0, 1) for _ in range(3000)]
    b += [draw.gauss(0, 1) for _ in range(3000)]
    c += [draw.gauss(0, 1) * 2.0 ** draw.randrange(-30, 30) for _ in range(3000)]
    left, right, addend = (torch.tensor(values, dtype=torch.float32) for values in (a, b, c))
    found = fma(left, right, addend)
    triples = zip(left.tolist(), right.tolist(), addend.tolist(), strict=True)
    expected = [float(rounded(Fraction(x) * Fraction(y) + Fraction(z))) for x, y, z in triples]
    assert found.tolist() == expected
    twice = (left.double() * right.double() + addend.double()).float()
    print(f"{sum(u != v for u, v in zip(twice.tolist(), expected, strict=True))} sums differ when rounded twice")
    assert twice.tolist() != expected
