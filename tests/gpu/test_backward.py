"""Backward passes on the card: FP8's has the bits of the tensor core's model; attention's repeats, near float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from bits import normal, same_bits
from hopper_card import needs_hopper

from dsv3_plugin.autograd.fp8 import MasterWeights
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.ops.attention_gradients import attention_gradients
from dsv3_plugin.ops.head_attention_gradients import has_head_gradients, head_attention_gradients
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


def head_operands(tokens: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the output, queries, keys and values, of DeepSeek-V3's widths."""
    grad, q, k, v = (
        normal(tokens, heads, width, seed=i).bfloat16().cuda() for i, width in enumerate((128, 192, 192, 128))
    )
    return grad, q, k, v


@pytest.mark.parametrize("seq_lens", [(1000,), (256, 256, 1, 487)], ids=str)
def test_attentions_backward_by_heads_repeats_and_is_near_float64(seq_lens: Sequence[int]) -> None:
    operands = head_operands(1000, 16)
    found = head_attention_gradients(*operands, seq_lens, 0.07)
    for _ in range(5):
        again = head_attention_gradients(*operands, seq_lens, 0.07)
        assert all(same_bits(one, other) for one, other in zip(found, again, strict=True))
    free = head_attention_gradients(*operands, seq_lens, 0.07, repeats=False)
    grad, *wide = (x.double().requires_grad_() for x in operands)
    outputs = []
    for end, length in zip(accumulate(seq_lens), seq_lens, strict=True):
        q, k, v = (x[end - length : end].transpose(0, 1) for x in wide)
        future = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
        outputs.append(((q @ k.mT * 0.07).masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    exact = torch.autograd.grad(torch.cat(outputs), wide, grad)
    for one, expected in zip((*found, *free), (*exact, *exact), strict=True):
        distance = float((one.double() - expected).norm() / expected.norm())
        print(f"{len(seq_lens)} sequences: {distance:.1e}")
        assert distance < 2**-7


def test_by_heads_it_takes_less_time_than_in_tiles() -> None:
    """At DeepSeek-V3's widths, 4,096 tokens and 128 heads; fp32 has no flash attention and is left to tiles."""
    tokens, heads = 4096, 128
    by_heads = head_operands(tokens, heads)
    assert has_head_gradients(by_heads[1], 128) and not has_head_gradients(by_heads[1].float(), 128)
    tiles = [normal(*shape).bfloat16().cuda() for shape in ((tokens, heads, 512), (tokens, heads, 576), (tokens, 576))]

    def measured(run: Callable[[], object]) -> tuple[float, float]:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 3, (torch.cuda.max_memory_allocated() - before) / 2**30

    of_heads = measured(lambda: head_attention_gradients(*by_heads, (tokens,), 0.07))
    of_tiles = measured(lambda: attention_gradients(tiles[0], tiles[1], tiles[2], 512, 0.04))
    for name, (milliseconds, memory) in (("by heads", of_heads), ("in tiles", of_tiles)):
        print(f"{name}: {milliseconds:.1f} ms, {memory:.2f} GiB")
    assert of_heads[0] < of_tiles[0]
