"""Backward passes on the card: FP8's has the bits of the tensor core's model; attention's repeats, near float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bits import normal, same_bits
from hopper_card import needs_hopper

from dsv3_plugin.autograd.fp8 import MasterWeights
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.ops.attention_gradients import attention_gradients
from dsv3_plugin.profile import FP8_FLOAT32, FP8_UE8M0, Profile
from dsv3_plugin.registry import Ops, bind, with_training

pytestmark = needs_hopper
Tensor = torch.Tensor
COUNTS = (70, 0, 140, 129)


def ops_on(device: str, profile: Profile) -> Ops:
    capability = (9, 0) if device == "cuda" else None
    return with_training(bind(Setting(device, "sm90", profile, capability, V3_LATENT), "fast"))


def gradients(
    device: str, profile: Profile, multiply: Callable[[MasterWeights, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Of x and of the weight; small gradients, and weights whose rows fill no block."""
    tokens = sum(COUNTS)
    x = (normal(tokens, 256) * torch.exp2(normal(tokens, 1, seed=1))).bfloat16().to(device).requires_grad_()
    weight = (normal(len(COUNTS), 192, 256, seed=2) * 0.02).bfloat16().to(device).requires_grad_()
    grad = (normal(tokens, 192, seed=3) * 1e-5).bfloat16().to(device)
    out = multiply(MasterWeights(ops_on(device, profile)), x, weight)
    return [found.cpu() for found in torch.autograd.grad(out, (x, weight), grad)]


def by_one(masters: MasterWeights, x: Tensor, weight: Tensor) -> Tensor:
    return masters.linear(x, weight[0])


def by_experts(masters: MasterWeights, x: Tensor, weight: Tensor) -> Tensor:
    return masters.grouped_linear(x, torch.tensor(COUNTS, device=x.device), weight)


@pytest.mark.parametrize("profile", [FP8_UE8M0, FP8_FLOAT32], ids=["ue8m0", "float32"])
@pytest.mark.parametrize("multiply", [by_one, by_experts])
def test_a_cpu_predicts_the_cards_gradients(
    multiply: Callable[[MasterWeights, Tensor, Tensor], Tensor], profile: Profile
) -> None:
    for found, expected in zip(gradients("cuda", profile, multiply), gradients("cpu", profile, multiply), strict=True):
        assert same_bits(found, expected)


@pytest.mark.parametrize(("tokens", "heads"), [(1000, 16), (300, 128)])
def test_attentions_backward_repeats_and_is_near_float64(tokens: int, heads: int) -> None:
    grad, q = normal(tokens, heads, 512, seed=1).bfloat16(), normal(tokens, heads, 576, seed=2).bfloat16()
    keys = normal(tokens, 576, seed=3).bfloat16()
    found = attention_gradients(grad.cuda(), q.cuda(), keys.cuda(), 512, 0.04)
    again = attention_gradients(grad.cuda(), q.cuda(), keys.cuda(), 512, 0.04)
    assert all(same_bits(one.cpu(), other.cpu()) for one, other in zip(found, again, strict=True))
    wide_q, wide_keys = q.double().cuda().requires_grad_(), keys.double().cuda().requires_grad_()
    scores = torch.einsum("thc,lc->htl", wide_q, wide_keys) * 0.04
    future = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1)
    out = torch.einsum("htl,lr->thr", scores.masked_fill(future, -torch.inf).softmax(-1), wide_keys[:, :512])
    for one, expected in zip(found, torch.autograd.grad(out, (wide_q, wide_keys), grad.double().cuda()), strict=True):
        distance = float((one.double() - expected).norm() / expected.norm())
        print(f"{tokens} tokens, {heads} heads: {distance:.1e}")
        assert distance < 2**-8
