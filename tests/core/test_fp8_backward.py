"""The backward pass of FP8 products: against float64, expert by expert, and what is kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import normal, same_bits

from dsv3_plugin.autograd.fp8 import MasterWeights
from dsv3_plugin.hooks import Arithmetic, Setting
from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.fp8_wgrad import fp8_wgrad, quantize_fp8_columns
from dsv3_plugin.ops.operation import Operation
from dsv3_plugin.ops.quantize import dequantize_weight, quantize_fp8, quantize_weight
from dsv3_plugin.profile import FP8_FLOAT32, FP8_UE8M0, Profile, ScaleFormat
from dsv3_plugin.registry import Ops, bind, with_training

Tensor = torch.Tensor
PROFILES = {"ue8m0": FP8_UE8M0, "float32": FP8_FLOAT32}
# The distance of a gradient from the unquantized one, over that one's length: 0.038 was measured.
BOUND = 0.05
COUNTS = (70, 0, 140)


def ops_of(profile: Profile, arithmetic: Arithmetic = "cpu") -> Ops:
    return with_training(bind(Setting("cpu", arithmetic, profile)))


def case(tokens: int = 210, rows: int = 192, columns: int = 256, experts: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights and gradients as a model has them: small gradients, rows of many sizes, 192 rows fill no block."""
    x = (normal(tokens, columns) * torch.exp2(normal(tokens, 1, seed=1))).bfloat16()
    weight = (normal(experts, rows, columns, seed=2) * 0.02).bfloat16()
    grad = (normal(tokens, rows, seed=3) * 1e-5 * torch.exp2(2 * normal(tokens, 1, seed=4))).bfloat16()
    return x, weight, grad


def linear_gradients(ops: Ops, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    of_x, of_weight = torch.autograd.grad(MasterWeights(ops).linear(x, weight), (x, weight), grad)
    return of_x, of_weight


def grouped_gradients(ops: Ops, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = MasterWeights(ops).grouped_linear(x, torch.tensor(COUNTS), weight)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), grad)
    return of_x, of_weight


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def distances(ops: Ops) -> list[float]:
    """Of dX and dW of one layer, and of three experts, from those of the unquantized operands in float64."""
    x, weight, grad = case()
    wide_x, wide_weight, wide_grad = x.double(), weight.double(), grad.double()
    of_x, of_weight = linear_gradients(ops, x, weight[0], grad)
    found = [distance(of_x, wide_grad @ wide_weight[0]), distance(of_weight, wide_grad.t() @ wide_x)]
    of_x, of_weight = grouped_gradients(ops, x, weight, grad)
    parts = [each.split(COUNTS) for each in (wide_grad, wide_x)]
    rows = [g @ w for g, w in zip(parts[0], wide_weight, strict=True)]
    sums = [g.t() @ each for g, each in zip(*parts, strict=True)]
    return [*found, distance(of_x, torch.cat(rows)), distance(of_weight, torch.stack(sums))]


@pytest.mark.parametrize("arithmetic", ["cpu", "sm90"])
@pytest.mark.parametrize("scale_format", PROFILES)
def test_gradients_are_as_far_from_exact_ones_as_e4m3_makes_them(
    scale_format: ScaleFormat, arithmetic: Arithmetic
) -> None:
    found = distances(ops_of(PROFILES[scale_format], arithmetic))
    print(f"{arithmetic}, {scale_format}: {', '.join(f'{each:.4f}' for each in found)}")
    assert max(found) < BOUND


def _unscaled(products: Any) -> Any:
    return lambda grad, _, x, x_scale, counts, **kwargs: products(
        grad, torch.full_like(_, _.median()), x, x_scale, counts, **kwargs
    )


def _without_the_last_block(products: Any) -> Any:
    def run(grad: Tensor, grad_scale: Tensor, x: Tensor, x_scale: Tensor, counts: Tensor, **kwargs: Any) -> Tensor:
        shorter: Tensor = products(grad, grad_scale, x, x_scale, (counts - 1).clamp_min(0) // 128 * 128, **kwargs)
        return shorter

    return run


def _next_experts(products: Any) -> Any:
    return lambda *args, **kwargs: products(*args, **kwargs).roll(1, 0)


def _not_transposed(products: Any) -> Any:
    return lambda grad, scale, weight, weight_scale: products(grad, scale, weight.flip(0).contiguous(), weight_scale)


def _from_another_tile(quantize: Any) -> Any:
    return lambda x, x_scale, *rest: quantize(x, None if x_scale is None else x_scale.flip(1), *rest)


@pytest.mark.parametrize(
    ("op", "broken"),
    [
        (fp8_wgrad, _unscaled),
        (fp8_wgrad, _without_the_last_block),
        (fp8_wgrad, _next_experts),
        (fp8_linear, _not_transposed),
        (quantize_fp8_columns, _from_another_tile),
    ],
)
def test_a_wrong_gradient_is_seen(op: Operation[..., Any], broken: Callable[[Any], Any]) -> None:
    """The twins."""
    ops = ops_of(FP8_UE8M0)
    assert max(distances(ops.with_kernel(op, broken(ops[op])))) > BOUND


@pytest.mark.parametrize("scale_format", PROFILES)
def test_gradients_are_the_products_of_the_quantized_numbers(scale_format: ScaleFormat) -> None:
    """Each operand from its own tiles, in float64: what is left is one rounding to bf16."""
    x, weight, grad = case(experts=1)
    of_x, of_weight = linear_gradients(ops_of(PROFILES[scale_format]), x, weight[0], grad)
    tiles = torch.nn.functional.pad(grad, (0, 64))
    rows = numbers(*quantize_fp8(tiles.contiguous(), scale_format))[:, :192]
    held = dequantize_weight(*quantize_weight(weight[0], scale_format)).double()
    torch.testing.assert_close(of_x.double(), rows @ held, rtol=2**-8, atol=1e-12)
    all_rows = torch.tensor([len(x)])
    columns = numbers(*quantize_fp8_columns(grad, None, all_rows, scale_format))
    kept = numbers(*quantize_fp8_columns(*quantize_fp8(x, scale_format), all_rows, scale_format))
    torch.testing.assert_close(of_weight.double(), columns @ kept.t(), rtol=2**-8, atol=1e-12)
    # The twin: 1x128 tiles of the gradient for both. A power of two moves no number's place between two others, so that
    # only numbers far below their tile's largest would show it.
    by_rows = rows.t() @ kept.t()[: len(x)]
    assert distance(of_weight, columns @ kept.t()) < 2**-8
    assert scale_format == "ue8m0" or distance(of_weight, by_rows) > 2**-8


def numbers(values: Tensor, scale: Tensor) -> Tensor:
    """What e4m3 values with scales of 128 neighbours of a row stand for, in float64."""
    return (values.double().unflatten(1, (-1, 128)) * scale.double().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("arithmetic", ["cpu", "sm90"])
def test_experts_in_one_call_have_the_bits_of_each_alone(arithmetic: Arithmetic) -> None:
    ops = ops_of(FP8_FLOAT32, arithmetic)
    x, weight, grad = case()
    together = grouped_gradients(ops, x, weight, grad)
    assert all(same_bits(*each) for each in zip(together, grouped_gradients(ops, x, weight, grad), strict=True))
    alone = [linear_gradients(ops, *each) for each in zip(x.split(COUNTS), weight, grad.split(COUNTS), strict=True)]
    assert same_bits(together[0], torch.cat([of_x for of_x, _ in alone]))
    assert same_bits(together[1], torch.stack([of_weight for _, of_weight in alone]))
    # The twin: an expert's tokens in another order are another sum.
    order = torch.cat((torch.arange(70), torch.randperm(140, generator=torch.Generator().manual_seed(1)) + 70))
    moved = grouped_gradients(ops, x[order], weight, grad[order])
    assert same_bits(moved[0], together[0][order]) and not same_bits(moved[1][2], together[1][2])


def test_activations_are_kept_in_one_byte_a_number() -> None:
    x, weight, _ = case(experts=1)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        MasterWeights(ops_of(FP8_UE8M0)).linear(x.requires_grad_(), weight[0].requires_grad_())
    of_x = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert len(of_x) == len(kept) - 1, "the weight itself, and no copy of it"
    assert sum(tensor.nbytes for tensor in of_x) < 1.05 * x.numel()
    assert {tensor.dtype for tensor in of_x} == {torch.float8_e4m3fn, torch.float32}
