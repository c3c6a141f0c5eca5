"""TransformerEngine's scales (`recipe_common.cuh`, its vector and square block quantizers) beside the contract's.

`scale = 448 / amax`, correctly rounded; a mantissa cut off for powers of two; e4m3 of `x * scale`; kept is `1 / scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bits import normal, same_bits

from dsv3_plugin.ops.elementary import fma
from dsv3_plugin.ops.quantize import dequantize_weight, quantize_weight, scale_for, to_e4m3
from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor
E4M3_MAX = torch.tensor(448.0)
# Of numbers in bf16, which it takes where 448 / amax has no fp32 number.
LARGEST = torch.finfo(torch.bfloat16).max


def their_scale(amax: Tensor, powers_of_two: bool) -> Tensor:
    """Of fp32 `amax`, by which numbers are multiplied."""
    scale = (E4M3_MAX / amax).clamp_max(LARGEST)
    if powers_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)


def every_bf16() -> Tensor:
    """Each finite positive number, and zero."""
    return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()


def test_their_powers_of_two_are_the_contracts_but_for_the_smallest() -> None:
    amax = every_bf16()
    theirs, ours = 1 / their_scale(amax, True), scale_for(amax, "ue8m0")
    different = amax[theirs != ours]
    print(f"{len(different)} of {len(amax)}, all below 2**{different.max().log2().item():.1f}")
    assert len(different) > 0 and different.max() < 2.0**-118
    # Of numbers in fp32 those next to a border, too.
    borders = torch.tensor([448 * 2.0**e for e in range(-120, 110)])
    beside = torch.cat([borders.nextafter(torch.tensor(to)) for to in (torch.inf, -torch.inf)])
    assert same_bits(1 / their_scale(beside, True), scale_for(beside, "ue8m0"))
    # The twin: the nearest power of two and not the one below.
    nearest = torch.exp2(torch.round(torch.log2(E4M3_MAX / beside)))
    assert (1 / nearest != scale_for(beside, "ue8m0")).any()


def outputs(x: Tensor, weight: Tensor, rule: str, *, folded: bool = False) -> Tensor:
    """bf16 [M, N] of x [M, K] and weight [N, K] quantized by a rule; `folded`: scales come one by one."""
    rows = x.unflatten(1, (-1, 128)), (2,)
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3)
    (values, x_scale), (w_values, w_scale) = (_by_rule(rule, *each) for each in (rows, blocks))
    a, b = values.flatten(1).double(), w_values.flatten(2).flatten(0, 1).double()
    columns = w_scale[:, 0, :, 0].repeat_interleave(128, 0)
    acc = torch.zeros(len(x), len(weight))
    for k in range(x.shape[1] // 128):
        span = slice(128 * k, 128 * k + 128)
        raw = (a[:, span] @ b[:, span].t()).float()
        of_x, of_weight = x_scale[:, k], columns[None, :, k].expand_as(raw)
        acc = fma(raw * of_x, of_weight, acc) if folded else fma(raw, of_x * of_weight, acc)
    return acc.bfloat16()


def _by_rule(rule: str, blocks: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    amax = blocks.abs().amax(dims, keepdim=True)
    if rule == "theirs":
        scale = their_scale(amax, False)
        return to_e4m3(blocks * scale), 1 / scale
    if rule == "contract":
        return to_e4m3(blocks / scale_for(amax, "float32")), scale_for(amax, "float32")
    if rule == "448 / amax in torch":  # a reciprocal, and then a product
        scale = amax.reciprocal() * 448
        return to_e4m3(blocks * scale), 1 / scale
    kept = amax * (1 / E4M3_MAX)  # amax / 448 in torch on a GPU
    return to_e4m3(blocks / kept), kept


def test_their_fp32_scales_have_other_bits_than_the_contracts_and_than_what_torch_makes_of_either() -> None:
    """So a comparison with torch's own quotients on a card finds most outputs different, whatever rule it tries."""
    x, weight = normal(16, 7168).bfloat16().float(), normal(256, 7168, seed=1).bfloat16().float()
    theirs = outputs(x, weight, "theirs")
    share = {
        rule: float((outputs(x, weight, rule) != theirs).double().mean())
        for rule in ("contract", "448 / amax in torch", "amax / 448 in torch on a GPU")
    }
    print({rule: f"{differ:.1%}" for rule, differ in share.items()})
    assert 0.2 < share["contract"] < min(share["448 / amax in torch"], share["amax / 448 in torch on a GPU"]) < 0.7
    # The order of the two scales is not what one sees in bf16.
    assert (outputs(x, weight, "theirs", folded=True) != theirs).double().mean() < 0.01


def moved(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], master: torch.dtype) -> float:
    """Share of a quantized weight's numbers that are others once it was read into a master and quantized again."""
    numbers = dequantize_weight(*quantize(normal(1024, 2048, seed=2) * torch.linspace(1, 2, 2048)))
    again = dequantize_weight(*quantize(numbers.to(master).float()))
    return float((again != numbers).double().mean())


def their_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = _by_rule("theirs", weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3))
    return values.flatten(2).flatten(0, 1), scale[:, 0, :, 0]


def test_fp32_scales_do_not_survive_a_master_weight_in_bf16_by_either_rule_nor_by_theirs_in_fp32() -> None:
    """So a trainer that quantizes in each pass does not hold a checkpoint with such scales."""
    ours = {name: partial(quantize_weight, scale_format=name) for name in ("ue8m0", "float32")}
    share = {
        (rule, str(master)): moved(quantize, master)
        for rule, quantize in (ours | {"theirs": their_weight}).items()
        for master in (torch.bfloat16, torch.float32)
    }
    print({of: f"{each:.1%}" for of, each in share.items()})
    assert share["ue8m0", "torch.bfloat16"] == share["float32", "torch.float32"] == 0
    assert min(share["float32", "torch.bfloat16"], share["theirs", "torch.bfloat16"]) > 0.9
    assert share["theirs", "torch.float32"] > 0.05


@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
def test_weights_of_all_experts_are_quantized_as_each_alone(scale_format: ScaleFormat) -> None:
    weight = normal(3, 192, 256) * torch.exp2(normal(3, 1, 1, seed=1) * 4)
    together, alone = quantize_weight(weight, scale_format), [quantize_weight(each, scale_format) for each in weight]
    assert all(same_bits(a, torch.stack(each)) for a, each in zip(together, zip(*alone, strict=True), strict=True))
